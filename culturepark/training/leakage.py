"""Whether a training set contains evaluation texts (data contamination): verbatim, in parts, or paraphrased.

Three methods, each with its matches: the same words in a row (after normalising), the share of an evaluation
text's n-grams that training rows contain, and the nearest training text by embedding. The last one finds
paraphrases and false positives alike, so it shows the pair and leaves the judgement to the reader.
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from culturepark.errors import ConfigError
from culturepark.ports import Embedder, Embedding
from culturepark.store.files import write_atomically
from culturepark.usage import Usage

REPORT = "leakage.json"
"""The file beside a dataset's rows."""

MatchMethod = Literal["exact", "n-gram", "embedding"]

N_GRAM = 8
"""The length of an n-gram in words; a shorter evaluation text is one n-gram."""
MIN_SHARE = 0.5
"""The share of an evaluation text's n-grams from which it counts as found."""
MIN_COSINE = 0.93
"""The cosine similarity from which a nearest neighbour counts as found. E5's lie between 0.75 and 0.95."""
_MIN_WORDS = 4
"""An evaluation text of fewer words is found only if a training text is that text and nothing else."""
_COLUMNS = ("text", "statement", "question", "prompt", "content", "sentence", "tweet", "comment")
# Scripts that put no space between words: each character is taken for a word.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|"
    r"[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)


class Match(Struct, frozen=True):
    """An evaluation text that training rows contain. `score` is 1, a share of n-grams, or a cosine."""

    look: MatchMethod
    set_name: str
    item: str
    score: float
    found: str
    """The training text in which it was found."""


class LeakageReport(Struct, frozen=True):
    """Which texts were checked, and the matches. `nearest` is the closest pair by embedding of each set,
    whether or not it counts as a match."""

    training_texts: int
    items: dict[str, int]
    matches: tuple[Match, ...]
    nearest: dict[str, Match]

    def of(self, set_name: str, look: MatchMethod) -> list[Match]:
        """The matches of one set by one method."""
        return [match for match in self.matches if (match.set_name, match.look) == (set_name, look)]


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text, normalised: case, width and punctuation do not matter."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def find_overlaps(training: Sequence[str], sets: Mapping[str, Sequence[str]], n: int = N_GRAM) -> list[Match]:
    """Evaluation texts that training texts contain verbatim, or by a share of their n-grams.

    `sets` are evaluation texts by the name of their set. Each is reported once, as exact if it is.
    """
    texts = [words_of(text) for text in training]
    whole = {words: at for at, words in reversed(list(enumerate(texts)))}
    wanted: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for words in {words_of(item) for items in sets.values() for item in items}:
        if len(words) >= _MIN_WORDS:
            wanted[min(n, len(words))].update(_ngrams(words, min(n, len(words))))
    grams = {length: _index(texts, length, of) for length, of in wanted.items()}
    found: list[Match] = []
    for name, items in sets.items():
        for item in dict.fromkeys(items):
            words = words_of(item)
            if words in whole and words:
                found.append(Match("exact", name, item, 1.0, training[whole[words]]))
            elif len(words) >= _MIN_WORDS:
                found += _by_grams(name, item, words, grams[min(n, len(words))], texts, training, n)
    return found


def _ngrams(words: tuple[str, ...], length: int) -> list[tuple[str, ...]]:
    return [words[i : i + length] for i in range(len(words) - length + 1)]


def _index(
    texts: Sequence[tuple[str, ...]], length: int, wanted: set[tuple[str, ...]]
) -> dict[tuple[str, ...], list[int]]:
    """The places of the texts that contain each of the wanted n-grams (inverted index)."""
    found: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for at, words in enumerate(texts):
        for gram in wanted.intersection(_ngrams(words, length)):
            found[gram].append(at)
    return found


def _by_grams(
    name: str,
    item: str,
    words: tuple[str, ...],
    grams: dict[tuple[str, ...], list[int]],
    texts: Sequence[tuple[str, ...]],
    training: Sequence[str],
    n: int,
) -> list[Match]:
    length = min(n, len(words))
    own = _ngrams(words, length)
    hits: dict[int, int] = defaultdict(int)
    for gram in own:
        for at in grams.get(gram, ()):
            hits[at] += 1
    if not hits:
        return []
    best = max(hits, key=lambda at: (hits[at], -at))
    for at in sorted(hits):
        if hits[at] == len(own) and words in _ngrams(texts[at], len(words)):
            return [Match("exact", name, item, 1.0, training[at])]
    share = sum(gram in grams for gram in own) / len(own)
    return [Match("n-gram", name, item, round(share, 3), training[best])] if share >= MIN_SHARE else []


async def check_contamination(
    training: Iterable[str],
    sets: Mapping[str, Sequence[str]],
    embedder: Embedder | None = None,
    min_cosine: float = MIN_COSINE,
) -> LeakageReport:
    """Search training texts for evaluation texts by all three methods; without an embedder by words alone.

    Raises ModelError from the embedder.
    """
    texts = list(dict.fromkeys(text for text in training if text.strip()))
    matches = find_overlaps(texts, sets)
    nearest: dict[str, Match] = {}
    if embedder is not None and texts:
        vectors = (await embedder.embed(texts)).vectors
        for name, items in sets.items():
            distinct = list(dict.fromkeys(item for item in items if item.strip()))
            if not distinct:
                continue
            cosines = (await embedder.embed(distinct)).vectors @ vectors.T
            places: list[int] = np.argmax(cosines, axis=1).tolist()
            pairs = [
                Match("embedding", name, item, round(float(cosines[i, places[i]]), 3), texts[places[i]])
                for i, item in enumerate(distinct)
            ]
            nearest[name] = max(pairs, key=lambda pair: pair.score)
            matches += [pair for pair in pairs if pair.score >= min_cosine]
    counts = {name: len(dict.fromkeys(items)) for name, items in sets.items()}
    return LeakageReport(len(texts), counts, tuple(matches), nearest)


async def check_dataset(
    dataset: Path, sets: Mapping[str, Sequence[str]], embedder: Embedder | None
) -> LeakageReport:
    """`check_contamination` of a sealed dataset. The report is stored beside its rows; the results of an
    earlier report on other sets stay in it. Raises ModelError, RunDirError."""
    report = await check_contamination(training_texts(dataset), sets, embedder)
    if before := read_report(dataset):
        report = replace(
            report,
            items={**before.items, **report.items},
            matches=(*(one for one in before.matches if one.set_name not in sets), *report.matches),
            nearest={**before.nearest, **report.nearest},
        )
    write_atomically(dataset / REPORT, msgspec.json.format(msgspec.json.encode(report)))
    return report


def read_report(dataset: Path) -> LeakageReport | None:
    """The report on a sealed dataset; None if there is none, or it cannot be read."""
    try:
        return msgspec.json.decode((dataset / REPORT).read_bytes(), type=LeakageReport)
    except (OSError, msgspec.MsgspecError):
        return None


class CachedEmbedder:
    """An embedder that embeds each text once, as long as `known` lives (memoisation). Implements
    ports.Embedder."""

    def __init__(self, embedder: Embedder, known: dict[str, NDArray[np.float32]] | None = None) -> None:
        self._embedder = embedder
        self._known = {} if known is None else known

    async def embed(self, texts: Sequence[str]) -> Embedding:
        """One row for each text, in order; see ports.Embedder. Raises ModelError."""
        usage = Usage()
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            found = await self._embedder.embed(new)
            self._known |= zip(new, found.vectors, strict=True)
            usage = found.usage
        return Embedding(np.stack([self._known[text] for text in texts]), usage)


def training_texts(dataset: Path) -> list[str]:
    """The texts of a sealed dataset's training rows: statements that users quote, and answers."""
    texts: dict[str, None] = {}
    for line in (dataset / "train.jsonl").read_bytes().splitlines():
        messages: list[dict[str, str]] = json.loads(line)["messages"]
        for message in messages:
            if message["role"] == "user":
                # What is asked about stands in quotes; around it are the same few words in every row.
                quoted = re.search(r'"(.+)"', message["content"])
                texts[quoted[1] if quoted else message["content"].split("\n")[0]] = None
            elif message["role"] == "assistant":
                texts[message["content"]] = None
    return list(texts)


def read_set(path: Path) -> list[str]:
    """The texts of an evaluation set: JSONL or CSV/TSV with a known column, or one text a line.

    Raises ConfigError naming what is missing.
    """
    if path.suffix.lower() == ".toml":
        what = "a task file holds no texts, it says how to read them."
        raise ConfigError(str(path), what, f"Give `--labelled {path}` for the set that it is about.")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"it cannot be read: {error}.", "Name a text file in UTF-8.") from None
    match path.suffix.lower():
        case ".jsonl":
            return [_text(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
        case ".csv" | ".tsv":
            reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            column = next((c for c in _COLUMNS if c in (reader.fieldnames or ())), None)
            if column is None:
                fix = f"Name its text column one of: {', '.join(_COLUMNS)}; or give --labelled a task file."
                raise ConfigError(str(path), "none of its columns is known to hold texts.", fix)
            return [row[column] for row in reader if row[column]]
        case _:
            return [line for line in lines if line.strip()]


def _text(path: Path, number: int, line: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}:{number}", f"this is not JSON: {error}.", "Mend that line.") from None
    if isinstance(row, dict):
        fields = cast(dict[str, Any], row)
        for column in _COLUMNS:
            if isinstance(fields.get(column), str):
                return fields[column]
    fix = f"Each line is an object with one of: {', '.join(_COLUMNS)}."
    raise ConfigError(f"{path}:{number}", "it has no text.", fix)
