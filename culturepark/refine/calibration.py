"""How far the embedding verifier can be trusted: its thresholds, and the labelled set they come from.

The set is `data/calibration.jsonl`: for each built-in seed six short opinions of our own, two for the
statement, two against it, and two that are on neither side, of which the second is near the subject.
`scripts/calibrate_verifier.py` fits the thresholds on half of the questions, measures on the other
half and writes `data/calibration.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Label = Literal["for", "against", "off"]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

CLEAR_ACCURACY = 0.85
"""A side counts as clear where it is classified rightly with this accuracy, on the training questions."""
_CLEAR_SHARE = 0.2
"""At least this share of the opinions on a side lies above `margin`."""
_BOOTSTRAPS = 2000
"""Confidence intervals come from this many bootstrap samples of questions."""


class Labelled(Struct, frozen=True, forbid_unknown_fields=True):
    """One opinion of the set, and what it says on the seed's statement."""

    seed: str
    label: Label
    text: str


class Thresholds(Struct, frozen=True, forbid_unknown_fields=True):
    """The two numbers that decide.

    An opinion whose best cosine similarity is below `relevance` is about something else; one whose
    two best similarities differ by less than `margin` is on no clear side.
    """

    relevance: float
    margin: float


class Measure(Struct, frozen=True, forbid_unknown_fields=True):
    """A share of `n` opinions, with its 95 % bootstrap interval over questions."""

    value: float
    low: float
    high: float
    n: int


class CalibrationReport(Struct, frozen=True, forbid_unknown_fields=True):
    """What the verifier reaches on questions that the thresholds never saw.

    `three_way` is the accuracy over for, against and off; `side` the accuracy over opinions that are on
    a side, whatever their relevance, and `clear_side` that over those of them that the margin calls
    clear; `clear_share` is the share of them. `off_precision` and `off_recall` are those of telling
    opinions that are on neither side, and `near_recall` is the recall over the near misses alone.
    """

    questions: int
    three_way: Measure
    side: Measure
    clear_side: Measure
    clear_share: Measure
    off_precision: Measure
    off_recall: Measure
    near_recall: Measure


class Floors(Struct, frozen=True, forbid_unknown_fields=True):
    """The accuracy of guessing: always the most frequent label, or one of the labels at random."""

    three_way_majority: float
    three_way_random: float
    side_majority: float
    side_random: float


class Calibration(Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds of one embedder, the questions they were fitted on and what they reach on others."""

    embedder: str
    thresholds: Thresholds
    train_questions: tuple[str, ...]
    n_train: int
    held_out: CalibrationReport
    cross_validated: CalibrationReport
    floors: Floors


@cache
def shipped_calibration() -> Calibration:
    """The calibration of the embedder that ships with culturepark."""
    return msgspec.json.decode(_data("calibration.json"), type=Calibration)


@cache
def labelled_set() -> tuple[Labelled, ...]:
    """The labelled opinions, six to a seed, in the order of the built-in seeds."""
    lines = _data("calibration.jsonl").splitlines()
    return tuple(msgspec.json.decode(line, type=Labelled) for line in lines)


def _data(name: str) -> bytes:
    return (resources.files("culturepark.refine") / "data" / name).read_bytes()


class Scored(Struct, frozen=True):
    """The labelled set as an embedder sees it: one entry for each opinion, all of the same length.

    `question` numbers the opinion's question, `truth` is 1 for, -1 against and 0 off, `near` marks the
    near misses, and `sims` has shape (opinions, 2): the similarities with the statement and with its
    negation.
    """

    question: NDArray[np.int64]
    truth: NDArray[np.int64]
    near: Flags
    sims: Floats

    def only(self, questions: Sequence[int]) -> Scored:
        """The opinions on these questions."""
        keep = np.isin(self.question, questions)
        return Scored(self.question[keep], self.truth[keep], self.near[keep], self.sims[keep])

    @property
    def relevance(self) -> Floats:
        """The better similarity of each opinion."""
        return self.sims.max(axis=1)

    @property
    def gap(self) -> Floats:
        """How much nearer each opinion is to the statement than to the negation."""
        return self.sims[:, 0] - self.sims[:, 1]


def score(labelled: Sequence[Labelled], sims: Floats) -> Scored:
    """Put labels and similarities (opinions, 2) together; questions are numbered as they come."""
    numbers: dict[str, int] = {}
    seen_off: set[str] = set()
    near: list[bool] = []
    for one in labelled:
        numbers.setdefault(one.seed, len(numbers))
        near.append(one.label == "off" and one.seed in seen_off)
        if one.label == "off":
            seen_off.add(one.seed)
    truth = {"for": 1, "against": -1, "off": 0}
    return Scored(
        np.array([numbers[one.seed] for one in labelled]),
        np.array([truth[one.label] for one in labelled]),
        np.array(near),
        sims,
    )


def fit(train: Scored) -> Thresholds:
    """Choose both thresholds on these opinions, to three decimals.

    `relevance` is the cut with the best mean of the two recalls (opinions on the statement, opinions
    off it). `margin` is the smallest cut above which the side is classified rightly CLEAR_ACCURACY of the
    time; where none is reached with a fifth of the opinions left, it is the cut that leaves a fifth.
    """
    sided = train.truth != 0
    cuts = np.unique(np.round(train.relevance, 3))
    balance = [
        float((train.relevance[sided] >= cut).mean() + (train.relevance[~sided] < cut).mean()) for cut in cuts
    ]
    relevance = float(cuts[int(np.argmax(balance))])
    gaps, right = np.abs(train.gap[sided]), np.sign(train.gap[sided]) == train.truth[sided]
    widest = float(np.quantile(gaps, 1 - _CLEAR_SHARE))
    margin = round(widest, 3)
    for cut in np.unique(np.round(gaps[gaps <= widest], 3)):
        clear = gaps >= cut
        if clear.any() and right[clear].mean() >= CLEAR_ACCURACY:
            margin = float(cut)
            break
    return Thresholds(round(relevance, 3), round(margin, 3))


def measure(pieces: Sequence[tuple[Scored, Thresholds]], rng: np.random.Generator) -> CalibrationReport:
    """Measure opinions, each piece by its own thresholds; no question may be in two pieces."""
    question = np.concatenate([scored.question for scored, _ in pieces])
    truth = np.concatenate([scored.truth for scored, _ in pieces])
    near = np.concatenate([scored.near for scored, _ in pieces])
    gap = np.concatenate([scored.gap for scored, _ in pieces])
    on = np.concatenate([scored.relevance >= at.relevance for scored, at in pieces])
    clear = np.concatenate([np.abs(scored.gap) >= at.margin for scored, at in pieces])
    side = np.sign(gap)
    sided = truth != 0
    names = np.unique(question)
    draws = rng.integers(len(names), size=(_BOOTSTRAPS, len(names)))

    def share(hit: Flags, among: Flags) -> Measure:
        hits = np.array([(hit & among)[question == name].sum() for name in names])
        counts = np.array([among[question == name].sum() for name in names])
        drawn = counts[draws].sum(axis=1)
        shares = hits[draws].sum(axis=1)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(shares, (0.025, 0.975)) if len(shares) else (0.0, 1.0)
        value = hits.sum() / max(1, counts.sum())
        return Measure(*(round(float(x), 3) for x in (value, low, high)), n=int(counts.sum()))

    return CalibrationReport(
        questions=len(names),
        three_way=share(np.where(on, side, 0) == truth, np.ones_like(sided)),
        side=share(side == truth, sided),
        clear_side=share(side == truth, sided & clear),
        clear_share=share(clear, sided),
        off_precision=share(~sided, ~on),
        off_recall=share(~on, ~sided),
        near_recall=share(~on, near),
    )


def floors(truth: NDArray[np.int64]) -> Floors:
    """What guessing reaches on these labels."""
    counts = np.array([(truth == value).sum() for value in (1, -1, 0)])
    return Floors(
        three_way_majority=round(float(counts.max() / counts.sum()), 3),
        three_way_random=round(1 / 3, 3),
        side_majority=round(float(counts[:2].max() / counts[:2].sum()), 3),
        side_random=0.5,
    )


def calibrate(
    labelled: Sequence[Labelled], sims: Floats, *, embedder: str, rng_seed: int, folds: int = 5
) -> Calibration:
    """Fit on half of the questions, measure on the others; then cross-validate over all questions.

    `sims` has shape (opinions, 2), see `Scored`. The same arguments give the same result.
    """
    rng = np.random.default_rng(rng_seed)
    scored = score(labelled, sims)
    ids = list(dict.fromkeys(one.seed for one in labelled))
    order = [int(number) for number in rng.permutation(len(ids))]
    train, held_out = order[: len(ids) // 2], order[len(ids) // 2 :]
    thresholds = fit(scored.only(train))
    pieces: list[tuple[Scored, Thresholds]] = []
    for fold in range(folds):
        test = order[fold::folds]
        rest = [number for number in order if number not in test]
        pieces.append((scored.only(test), fit(scored.only(rest))))
    return Calibration(
        embedder=embedder,
        thresholds=thresholds,
        train_questions=tuple(ids[number] for number in sorted(train)),
        n_train=len(scored.only(train).truth),
        held_out=measure([(scored.only(held_out), thresholds)], rng),
        cross_validated=measure(pieces, rng),
        floors=floors(scored.only(held_out).truth),
    )
