"""How far a judge can be believed: what it reaches on small labelled sets of our own.

Opinions and turns are in `data/`; the verdict cases are the first of those that the embedding verifier is
calibrated on (`refine/calibration.py`).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

from msgspec import Struct

from culturepark.evaluation.asking import Answer, Asker, Question
from culturepark.evaluation.judged_quality import invalid_rate
from culturepark.evaluation.measure import Measurement
from culturepark.prompts import judge as words
from culturepark.refine.calibration import labelled_set
from culturepark.seeds import builtin_seeds

JUDGE = "judge"
"""The task of these figures."""
_VERDICT_SEEDS = 10
_ROUNDING = 1e-9
_AGREES = {"for": "entails", "against": "contradicts", "off": "novel"}


class Case(Struct, frozen=True):
    """One labelled question: `truth` is the place of the right option."""

    id: str
    text: str
    options: tuple[str, ...]
    truth: int


@cache
def cases() -> dict[str, tuple[Case, ...]]:
    """Our labelled sets by name, worded as data is."""
    kinds, turns = _rows("judge_kinds.csv"), _rows("judge_turns.csv")
    found: dict[str, list[Case]] = {}

    def add(name: str, text: str, options: Mapping[str, str], truth: str) -> None:
        of = found.setdefault(name, [])
        at = list(options).index(truth)
        of.append(Case(f"judge/{name}/{len(of) + 1}", text, tuple(options.values()), at))

    for row in kinds:
        add("kind", words.kind_question(row["text"]), words.KINDS, row["kind"])
    for row in kinds:
        asked = words.subtype_question(row["text"], row["kind"])
        add("subtype", asked, words.SUBTYPES[row["kind"]], row["subtype"])
    for row in turns:
        before = row["before"].split(" | ")
        asked = words.extends_question(row["statement"], before, row["turn"])
        add("extends", asked, words.EXTENDS, row["extends"])
        about = (row["statement"], before, row["turn"], row["culture"], row["other"])
        add("understands", words.understands_question(*about), words.UNDERSTANDS, row["understands"])
    for asked, verdict in _verdict_cases():
        add("verdict", asked, words.VERDICTS, verdict)
    return {name: tuple(of) for name, of in found.items()}


def _verdict_cases() -> list[tuple[str, str]]:
    """The first opinion of each label on every fifth question, beside the plainest answer in favour."""
    found: list[tuple[str, str]] = []
    ordered = [seed for seed in builtin_seeds() if seed.scale != "nominal"]
    for seed in ordered[:: max(1, len(ordered) // _VERDICT_SEEDS)][:_VERDICT_SEEDS]:
        codes = sorted(option.code for option in seed.options)
        stance = seed.option(codes[0] if seed.toward == "low" else codes[-1]).label
        mine = [one for one in labelled_set() if one.seed == seed.id]
        for label, verdict in _AGREES.items():
            text = next(one.text for one in mine if one.label == label)
            found.append((words.verdict_question(seed.statement, stance, text), verdict))
    return found


def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files("culturepark.evaluation").joinpath(f"data/{name}").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


async def measurements(asker: Asker) -> list[Measurement]:
    """The judge's accuracy on each labelled set, beside its floors. Raises EndpointError."""
    return [await _accuracy(asker, name, of) for name, of in cases().items()]


async def _accuracy(asker: Asker, name: str, of: Sequence[Case]) -> Measurement:
    answers = await asker.ask_each([Question(one.id, words.SYSTEM, one.text, one.options) for one in of])
    return accuracy(name, of, answers)


def accuracy(name: str, of: Sequence[Case], answers: Sequence[Answer]) -> Measurement:
    """How often the right option is the likeliest; level ones share. Floors are the place of an option
    that is most often right, always taken, and any option."""
    truths = [one.truth for one in of]
    parts = [answer.parts for answer in answers]
    scores = [part[truth] if part else None for part, truth in zip(parts, truths, strict=True)]
    return Measurement(
        task=JUDGE,
        subset=name,
        metric="accuracy",
        better="higher",
        unit="item",
        units=tuple(one.id for one in of),
        values=tuple((score,) for score in scores),
        n=sum(score is not None for score in scores),
        draws=sum(answer.draws for answer in answers),
        invalid_rate=invalid_rate(answers),
        floors={
            "constant": max(truths.count(place) for place in truths) / len(truths),
            "random": sum(1 / len(one.options) for one in of) / len(of),
        },
    )


_RESTS_ON = {
    "kind": "share_belief, share_norm and share_custom",
    "subtype": "the shares of subtypes",
    "extends": "extends_topic",
    "understands": "understands_other",
    "verdict": "verifier_kappa",
}


def cautions(name: str, of: Sequence[Measurement]) -> list[str]:
    """Which figures are not to be trusted, since the judge does not clearly beat its floors."""
    found: list[str] = []
    for one in of:
        floor = max(value for value in one.floors.values() if value is not None)
        low = one.interval().low
        if low is None or low <= floor + _ROUNDING:
            found.append(
                f"{name} does not beat its floors on the labelled set `{one.subset}`: do not trust "
                f"{_RESTS_ON[one.subset]}."
            )
    return found
