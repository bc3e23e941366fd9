"""How far a judge can be trusted (calibration): its accuracy on small labelled sets that come with the
project.

Opinions and turns are in `data/`; the verdict cases are the first of those that the embedding verifier is
calibrated on (`refine/calibration.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from msgspec import Struct

from culturepark.evaluation.asking import Answer, Asker, Question, counts_of
from culturepark.evaluation.data_files import data_rows
from culturepark.evaluation.measure import Measurement
from culturepark.prompts import judge as words
from culturepark.refine.calibration import labelled_set
from culturepark.seeds import builtin_seeds

JUDGE = "judge"
"""The task of these figures."""
_VERDICT_SEEDS = 10
"""The verdict cases are about at most this many of the built-in questions."""
_ROUNDING = 1e-9
"""A difference of shares that is no larger than this is rounding."""
_VERDICT_OF = {"for": "entails", "against": "contradicts", "off": "novel"}
"""The right verdict by the label of a calibration text."""


class Case(Struct, frozen=True):
    """One labelled question: `truth` is the place of the right option."""

    id: str
    text: str
    options: tuple[str, ...]
    truth: int


@cache
def cases() -> dict[str, tuple[Case, ...]]:
    """The labelled sets by name, worded as the questions about a run's data are."""
    kinds, turns = data_rows("judge_kinds.csv"), data_rows("judge_turns.csv")
    sets: dict[str, list[Case]] = {}

    def add(name: str, text: str, options: Mapping[str, str], truth: str) -> None:
        of = sets.setdefault(name, [])
        place = list(options).index(truth)
        of.append(Case(f"judge/{name}/{len(of) + 1}", text, tuple(options.values()), place))

    for row in kinds:
        add("kind", words.kind_question(row["text"]), words.KINDS, row["kind"])
    for row in kinds:
        text = words.subtype_question(row["text"], row["kind"])
        add("subtype", text, words.SUBTYPES[row["kind"]], row["subtype"])
    for row in turns:
        before = row["before"].split(" | ")
        text = words.extends_question(row["statement"], before, row["turn"])
        add("extends", text, words.EXTENDS, row["extends"])
        about = (row["statement"], before, row["turn"], row["culture"], row["other"])
        add("understands", words.understands_question(*about), words.UNDERSTANDS, row["understands"])
    for text, verdict in _verdict_cases():
        add("verdict", text, words.VERDICTS, verdict)
    return {name: tuple(of) for name, of in sets.items()}


def _verdict_cases() -> list[tuple[str, str]]:
    """The first opinion of each label on every fifth question, beside the plainest answer in favour."""
    found: list[tuple[str, str]] = []
    ordered = [seed for seed in builtin_seeds() if seed.scale != "nominal"]
    for seed in ordered[:: max(1, len(ordered) // _VERDICT_SEEDS)][:_VERDICT_SEEDS]:
        codes = sorted(option.code for option in seed.options)
        stance = seed.option(codes[0] if seed.toward == "low" else codes[-1]).label
        mine = [one for one in labelled_set() if one.seed == seed.id]
        for label, verdict in _VERDICT_OF.items():
            text = next(one.text for one in mine if one.label == label)
            found.append((words.verdict_question(seed.statement, stance, text), verdict))
    return found


async def measurements(asker: Asker) -> list[Measurement]:
    """The judge's accuracy on each labelled set, beside its floors. Raises EndpointError."""
    return [await _accuracy(asker, name, of) for name, of in cases().items()]


async def _accuracy(asker: Asker, name: str, of: Sequence[Case]) -> Measurement:
    answers = await asker.ask_balanced([Question(one.id, words.SYSTEM, one.text, one.options) for one in of])
    return accuracy(name, of, answers)


def accuracy(name: str, of: Sequence[Case], answers: Sequence[Answer]) -> Measurement:
    """How often the right option is the likeliest; tied ones share the credit. Floors are a judge that always
    chooses the place that is most often right (`constant`), and one that chooses at random."""
    truths = [one.truth for one in of]
    credits = [answer.credit for answer in answers]
    scores = [credit[truth] if credit else None for credit, truth in zip(credits, truths, strict=True)]
    counts = counts_of(answers)
    return Measurement(
        task=JUDGE,
        subset=name,
        metric="accuracy",
        better="higher",
        unit="item",
        units=tuple(one.id for one in of),
        values=tuple((score,) for score in scores),
        n=counts.n,
        draws=counts.draws,
        invalid_rate=counts.invalid_rate,
        floors={
            "constant": max(truths.count(place) for place in truths) / len(truths),
            "random": sum(1 / len(one.options) for one in of) / len(of),
        },
    )


_FIGURES_OF = {
    "kind": "share_belief, share_norm and share_custom",
    "subtype": "the shares of subtypes",
    "extends": "extends_topic",
    "understands": "understands_other",
    "verdict": "verifier_kappa",
}
"""The figures that depend on a judge's accuracy, by labelled set."""


def cautions(name: str, accuracies: Sequence[Measurement]) -> list[str]:
    """Which figures are not to be trusted, since the judge's confidence interval reaches down to its
    floors."""
    found: list[str] = []
    for one in accuracies:
        floor = max(value for value in one.floors.values() if value is not None)
        low = one.interval().low
        if low is None or low <= floor + _ROUNDING:
            found.append(
                f"{name} does not beat its floors on the labelled set `{one.subset}`: do not trust "
                f"{_FIGURES_OF[one.subset]}."
            )
    return found
