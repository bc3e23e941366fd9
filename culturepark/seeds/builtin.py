"""The 50 built-in seeds: World Values Survey wave 7 items in our own words (see data/SOURCES.md)."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import cast

from culturepark.errors import SeedError
from culturepark.seeds.check import check_seed
from culturepark.seeds.model import Answers, Option, Scale, Seed

WVS7_SURVEY = "World Values Survey"
WVS7_WAVE = "7 (2017-2022)"

_WVS7_ID = re.compile(r"wvs7-q([1-9][0-9]{0,2})")
_AGREEING_POLES = ("agree", "common", "often", "yes")
_MISSING_COLUMNS = {
    "dont_know": "n_dont_know",
    "no_answer": "n_no_answer",
    "not_asked": "n_not_asked",
    "other": "n_other_missing",
}


@cache
def builtin_seeds() -> tuple[Seed, ...]:
    """The built-in seeds, in questionnaire order, with the answers of 14 countries.

    Answers are keyed by ISO alpha-3 code. An item that was never asked in a country has empty
    shares there. Raises SeedError if the installed data files do not fit together.
    """
    negations = {row["q_id"]: row["negation"] for row in _rows("negations.csv")}
    answers: dict[str, dict[str, Answers]] = {}
    for row in _rows("wvs7_answers.csv"):
        answers.setdefault(row["q_id"], {})[row["alpha3"]] = _answers(row)
    seeds = tuple(
        _seed(row, negations.get(row["q_id"], ""), answers[row["q_id"]]) for row in _rows("wvs7_items.csv")
    )
    for seed in seeds:
        check_seed(seed, "built-in seeds")
    return seeds


def wvs7_column(seed_id: str) -> str:
    """The column that holds a seed's item in a WVS wave-7 file: `wvs7-q27` is in `Q27`.

    Raises SeedError if the id does not name a WVS wave-7 item.
    """
    match = _WVS7_ID.fullmatch(seed_id)
    if match is None:
        raise SeedError(
            seed_id,
            "this id names no item of WVS wave 7.",
            "Give the seed an id of the form `wvs7-q27`, after the item's number.",
        )
    return f"Q{match[1]}"


def _rows(name: str) -> Iterator[dict[str, str]]:
    path = resources.files("culturepark.seeds") / "data" / name
    return csv.DictReader(path.read_text(encoding="utf-8").splitlines())


def _seed(row: dict[str, str], negation: str, answers: dict[str, Answers]) -> Seed:
    if not negation.strip():
        raise SeedError(
            f"negations.csv: {row['q_id']}", "the item has no negation.", "Reinstall culturepark."
        )
    labels = cast("dict[str, str]", json.loads(row["answer_scale_json"]))
    options = sorted((Option(int(code), label) for code, label in labels.items()), key=lambda o: o.code)
    return Seed(
        id=f"wvs7-{row['q_id'].lower()}",
        statement=row["statement"],
        options=tuple(options),
        topic=row["topic"],
        scale=cast("Scale", row["kind"]),
        toward="low" if row["low_code_means"] in _AGREEING_POLES else "high",
        negation=negation,
        survey=WVS7_SURVEY,
        wave=WVS7_WAVE,
        answers=answers,
        source="doi:10.14281/18241.20, item " + row["q_id"],
    )


def _answers(row: dict[str, str]) -> Answers:
    shares = {code: float(row[f"share_{code}"]) for code in range(11) if row[f"share_{code}"]}
    return Answers(
        country=row["country"],
        shares=shares,
        n_valid=int(row["n_valid"]),
        n_missing=int(row["n_missing"]),
        missing={
            reason: int(row[column]) for reason, column in _MISSING_COLUMNS.items() if row[column] != "0"
        },
        source="World Values Survey wave 7, unweighted",
    )
