"""Answer distributions from the user's own GlobalOpinionQA file (CSV).

The file is `data/global_opinions.csv` of the data set `Anthropic/llm_global_opinions`, licence
CC BY-NC-SA 4.0 (Durmus et al. 2023, arXiv 2306.16388). Its lists are written as Python literals.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from culturepark.errors import SeedError
from culturepark.seeds.check import check_seed, unreadable
from culturepark.seeds.imported import ImportResult
from culturepark.seeds.model import Answers, Option, Seed

_COLUMNS = ("question", "selections", "options", "source")
_LONGEST_FIELD = 100_000
"""A list of more characters is refused before it is parsed."""
_SUM_RANGE = (0.98, 1.02)
"""A distribution that sums to less or more is left out; published ones are rounded."""
_SURVEYS = {"GAS": "Pew Global Attitudes Survey", "WVS": "World Values Survey"}

# A total is a count of interviews that slipped in among the options, not an answer.
_TOTAL = re.compile(r"total( \(?n\b.*)?", re.IGNORECASE)
_NO_OPINION = re.compile(
    r"dk\b.*|(don't|do not) know\b.*|no answer\b.*|refused\b.*|missing\b.*"
    r"|not (asked|applicable|available)\b.*|n/?a",
    re.IGNORECASE,
)


def import_globalopinionqa(path: str | os.PathLike[str]) -> ImportResult:
    """Turn a GlobalOpinionQA CSV file into seeds with a nominal scale.

    Country labels stay as they are in the file, so a sample such as `China (Non-national sample)`
    does not stand for the nation. Options that hold no opinion are dropped and the rest
    renormalised; the dropped part is kept in `missing`, as a share of all answers. Option codes
    are positions in the file's list, from 1, so dropping an option moves no other.

    Ids are `goqa-` and 12 hex digits of the hash of question and options. The same question with
    the same options may come again (other years, no year is given): a country's first distribution
    stays, further ones are counted in `left_out["repeated answers"]`, and countries that are new
    join the seed. A distribution whose length or sum is wrong is left out and counted, as are rows
    without a question. `overlaps` lists the seeds from WVS rows.

    Raises SeedError naming the line of a row that cannot be read, or when nothing usable is left.
    """
    drafts: dict[str, Seed] = {}
    from_wvs: dict[str, None] = {}
    left_out: Counter[str] = Counter()
    rows = 0
    for line, (question, selections, options, source) in _rows(path):
        rows += 1
        where = f"{path}: line {line}"
        statement = " ".join(question.split())
        if not statement:
            left_out["rows without a question"] += 1
            continue
        labels = [_label(option, where) for option in _literal(options, "[", "]", list, where, "options")]
        by_country = _literal(selections, "{", "}", dict, where, "selections")
        kept = tuple(
            Option(code, label)
            for code, label in enumerate(labels, start=1)
            if label and not _TOTAL.fullmatch(label) and not _NO_OPINION.fullmatch(label)
        )
        if len(kept) < 2:
            left_out["rows with fewer than two options"] += 1
            continue
        seed_id = _seed_id(statement, labels)
        answers = dict(drafts[seed_id].answers) if seed_id in drafts else {}
        for country, values in by_country.items():
            if not isinstance(country, str) or not country.strip():
                raise SeedError(where, f"{country!r} names no country.", "Download the file again.")
            distribution = _distribution(values, labels, kept)
            if isinstance(distribution, str):
                left_out[distribution] += 1
            elif country in answers:
                left_out["repeated answers"] += 1
            else:
                shares, missing = distribution
                answers[country] = Answers(
                    country=country, shares=shares, missing=missing, source=f"GlobalOpinionQA, {source}"
                )
        if not answers:
            left_out["rows with no usable country"] += 1
            continue
        drafts[seed_id] = Seed(
            id=seed_id,
            statement=statement,
            options=kept,
            survey=_SURVEYS.get(source, source),
            answers=answers,
            source=f"GlobalOpinionQA, {source}",
        )
        if source == "WVS":
            from_wvs[seed_id] = None
    if not drafts:
        raise SeedError(
            str(path), "it holds no usable question.", "Give data/global_opinions.csv as published."
        )
    for seed in drafts.values():
        check_seed(seed, str(path))
    return ImportResult(
        seeds=tuple(drafts.values()),
        rows=rows,
        countries=dict(Counter(country for seed in drafts.values() for country in seed.answers)),
        left_out=dict(left_out),
        overlaps=tuple(from_wvs),
    )


def _rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, tuple[str, str, str, str]]]:
    line = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, list[str]())
            if not set(_COLUMNS) <= set(header):
                raise SeedError(
                    str(path),
                    f"its header lacks one of {', '.join(_COLUMNS)}.",
                    "Give data/global_opinions.csv of Anthropic/llm_global_opinions.",
                )
            question, selections, options, source = (header.index(name) for name in _COLUMNS)
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise SeedError(
                        f"{path}: line {line}",
                        f"the row has {len(row)} columns and the header {len(header)}.",
                        "The file is cut short or damaged: download it again.",
                    )
                if row:
                    yield line, (row[question], row[selections], row[options], row[source])
                line = reader.line_num + 1
    except csv.Error as error:
        raise SeedError(
            f"{path}: line {line}",
            f"the row is not CSV: {error}.",
            "The file is cut short or damaged: download it again.",
        ) from error
    except UnicodeDecodeError as error:
        raise SeedError(
            str(path), f"it is not UTF-8 text (byte {error.start}).", "Give the .csv file as published."
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _literal(text: str, opening: str, closing: str, kind: type, where: str, name: str) -> Any:
    """The Python literal between the first `opening` and the last `closing`; it is never run."""
    literal = text[text.find(opening) : text.rfind(closing) + 1] if opening in text else ""
    try:
        if len(text) > _LONGEST_FIELD:
            raise ValueError(f"it is {len(text)} characters long, over {_LONGEST_FIELD}")
        value = ast.literal_eval(literal)
        if not isinstance(value, kind):
            raise ValueError(f"it is no {kind.__name__}")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise SeedError(
            where, f"{name} cannot be read: {error}.", "The file is cut short or damaged: download it again."
        ) from error
    return value


def _label(option: object, where: str) -> str:
    """An option's label. Some rows number their options: 1.0 becomes `1`."""
    if isinstance(option, str):
        return " ".join(option.replace("\u2019", "'").split())
    if isinstance(option, (int, float)) and math.isfinite(option):
        return f"{option:g}"
    raise SeedError(where, f"the option {option!r} is neither text nor number.", "Download the file again.")


def _seed_id(statement: str, labels: list[str]) -> str:
    key = json.dumps([statement, labels], ensure_ascii=False)
    return f"goqa-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _distribution(
    values: object, labels: list[str], kept: tuple[Option, ...]
) -> tuple[dict[int, float], dict[str, float]] | str:
    """Shares by kept code and dropped shares by label, or the reason why the list is unusable."""
    if not isinstance(values, list) or len(cast("list[object]", values)) != len(labels):
        return "distributions of the wrong length"
    shares: dict[int, float] = {}
    for code, (value, label) in enumerate(zip(cast("list[object]", values), labels, strict=True), start=1):
        if _TOTAL.fullmatch(label):
            continue
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            return "distributions with a value that is no share"
        shares[code] = float(value)
    if not _SUM_RANGE[0] <= math.fsum(shares.values()) <= _SUM_RANGE[1]:
        return "distributions with a sum outside 0.98 to 1.02"
    codes = {option.code for option in kept}
    valid = math.fsum(share for code, share in shares.items() if code in codes)
    if valid == 0:
        return "distributions without an opinion"
    missing: dict[str, float] = {}
    for code, share in shares.items():
        if code not in codes and share:
            label = labels[code - 1] or "blank"
            missing[label] = missing.get(label, 0.0) + share
    return {code: share / valid for code, share in shares.items() if code in codes}, missing
