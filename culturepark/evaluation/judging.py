"""Quality of what a run has made, as a model judges it, and how far that judge can be believed.

A judge is asked questions with options (`asking.Asker`), each option in each place equally often. Where
options come out level, as for a judge that goes by their place, each has its part.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

import numpy as np
from msgspec import Struct

from culturepark.evaluation.asking import Answer, Asker, Question
from culturepark.evaluation.made import Made, Opinion, Turn, sampled, sampled_turns
from culturepark.evaluation.measure import Better, Measurement
from culturepark.evaluation.quality import ALL, TASK, by_talk, summed
from culturepark.prompts import judge as words
from culturepark.refine.calibration import labelled_set
from culturepark.refine.verify import VERDICTS
from culturepark.seeds import builtin_seeds

JUDGE = "judge"
"""The task of what a judge reaches on our labelled sets."""
_VERDICT_SEEDS = 10
_LEVEL = 1e-9
_AGREES = {"for": "entails", "against": "contradicts", "off": "novel"}


class Sample(Struct, frozen=True):
    """What a judge is asked about: kept opinions, opinions with a verdict, and turns."""

    kept: tuple[Opinion, ...]
    judged: tuple[Opinion, ...]
    turns: tuple[Turn, ...]
    demonyms: dict[str, str]

    @property
    def questions(self) -> int:
        """How many questions there are."""
        return 2 * len(self.kept) + len(self.judged) + len(self.turns) + sum(t.meets for t in self.turns)


def sample_of(made: Made, at_most: int, rng_seed: int) -> Sample:
    """At most so many of each, drawn; the same seed draws the same. Raises RunDirError."""

    def id_of(one: Opinion) -> str:
        return one.id

    return Sample(
        tuple(sampled(made.kept, at_most, rng_seed, id_of)),
        tuple(sampled((one for one in made.opinions if one.verdict), at_most, rng_seed, id_of)),
        tuple(sampled_turns(made, at_most, rng_seed)),
        {culture: of.demonym for culture, of in made.run.plan.cultures.items()},
    )


# --- asking


async def _chosen(asker: Asker, of: Sequence[tuple[str, str, Mapping[str, str]]]) -> list[Answer]:
    """Answers to (id, text, options); as many draws as options, so that each stands in each place once."""
    asked = [Question(key, words.SYSTEM, text, tuple(options.values())) for key, text, options in of]
    answers = await _each(asker, asked)
    return list(answers)


async def _each(asker: Asker, asked: Sequence[Question]) -> list[Answer]:
    by_size: dict[int, list[int]] = {}
    for place, question in enumerate(asked):
        by_size.setdefault(len(question.options), []).append(place)
    found: dict[int, Answer] = {}
    for size, places in by_size.items():
        answers = await asker.ask_all([asked[place] for place in places], size)
        found.update(zip(places, answers, strict=True))
    return [found[place] for place in range(len(asked))]


def parts_of(answer: Answer) -> tuple[float, ...] | None:
    """1 for the likeliest option, shared by those that are level; None if nothing could be read."""
    if answer.shares is None:
        return None
    shares = np.array(answer.shares)
    best = shares >= shares.max() - _LEVEL
    return tuple(float(one) / int(best.sum()) for one in best)


def _invalid_rate(answers: Sequence[Answer]) -> float:
    draws = sum(answer.draws for answer in answers)
    return sum(answer.invalid * answer.draws for answer in answers) / draws if draws else 0.0


# --- a run's data


async def evaluate(asker: Asker, made: Made, sample: Sample) -> list[Measurement]:
    """Kinds and subtypes of samples, what turns do, and agreement with the run's verifier.

    Raises EndpointError.
    """
    return [
        *await _kinds(asker, made, sample.kept),
        *await _turns(asker, made, sample),
        *await _verdicts(asker, made, sample.judged),
    ]


def _shares(
    made: Made,
    metric: str,
    better: Better,
    opinions: Sequence[Opinion | Turn],
    answers: Sequence[Answer],
    values: Sequence[float | None],
    floors: Mapping[str, float | None],
) -> list[Measurement]:
    """The share of what was judged, of all and by culture; what was not read is missing."""
    found: list[Measurement] = []
    triples = list(zip(opinions, answers, values, strict=True))
    for culture in ("", *made.cultures):
        of = [one for one in triples if not culture or one[0].culture == culture]
        if not of:
            continue
        read = [(one, value) for one, _, value in of if value is not None]
        talks = made.talks if not culture else made.of_culture(culture).talks
        ids = {one.talk for one, _, _ in of}
        asked = [answer for _, answer, _ in of]
        found.append(
            summed(
                TASK,
                culture or ALL,
                metric,
                better,
                [talk for talk in talks if talk.id in ids],
                by_talk([one for one, _ in read], [value for _, value in read]),
                n=len(read),
                draws=sum(answer.draws for answer in asked),
                invalid_rate=_invalid_rate(asked),
                floors=floors,
            )
        )
    return found


async def _kinds(asker: Asker, made: Made, kept: Sequence[Opinion]) -> list[Measurement]:
    if not kept:
        return []
    answers = await _chosen(asker, [(f"kind/{o.id}", words.kind_question(o.text), words.KINDS) for o in kept])
    parts = [parts_of(answer) for answer in answers]
    found = [
        one
        for place, kind in enumerate(words.KINDS)
        for one in _shares(
            made,
            f"share_{kind}",
            "neither",
            kept,
            answers,
            [part[place] if part else None for part in parts],
            {"random": 1 / len(words.KINDS)},
        )
    ]
    for place, kind in enumerate(words.KINDS):
        mine = [o for o, part in zip(kept, parts, strict=True) if part and part[place] == max(part)]
        found += await _subtypes(asker, made, kind, mine)
    return found


async def _subtypes(asker: Asker, made: Made, kind: str, kept: Sequence[Opinion]) -> list[Measurement]:
    """Shares of the subtypes among the samples of a kind, level ones among them."""
    options = words.SUBTYPES[kind]
    asked = [(f"{kind}/{o.id}", words.subtype_question(o.text, kind), options) for o in kept]
    answers = await _chosen(asker, asked)
    parts = [parts_of(answer) for answer in answers]
    return [
        one
        for place, name in enumerate(options)
        for one in _shares(
            made,
            f"{kind}_{name}",
            "neither",
            kept,
            answers,
            [part[place] if part else None for part in parts],
            {"random": 1 / len(options)},
        )
    ]


async def _turns(asker: Asker, made: Made, sample: Sample) -> list[Measurement]:
    found: list[Measurement] = []
    meeting = [turn for turn in sample.turns if turn.meets]
    of = (
        ("extends_topic", sample.turns, words.EXTENDS),
        ("understands_other", meeting, words.UNDERSTANDS),
    )
    for metric, turns, options in of:
        if not turns:
            continue
        texts = [_turn_question(metric, turn, sample.demonyms) for turn in turns]
        asked = [(f"{metric}/{turn.id}", text, options) for turn, text in zip(turns, texts, strict=True)]
        answers = await _chosen(asker, asked)
        parts = [parts_of(answer) for answer in answers]
        values = [part[0] if part else None for part in parts]
        found += _shares(made, metric, "higher", turns, answers, values, {"random": 0.5})
    return found


def _turn_question(metric: str, turn: Turn, demonyms: Mapping[str, str]) -> str:
    if metric == "extends_topic":
        return words.extends_question(turn.statement, turn.before, turn.text)
    mine, other = demonyms.get(turn.culture, turn.culture), demonyms.get(turn.other, turn.other)
    return words.understands_question(turn.statement, turn.before, turn.text, mine, other)


async def _verdicts(asker: Asker, made: Made, judged: Sequence[Opinion]) -> list[Measurement]:
    """Cohen's kappa of the run's verifier and this judge; what the judge leaves open is missing."""
    if not judged:
        return []
    asked = [
        (f"verdict/{o.id}", words.verdict_question(o.statement, o.stance, o.text), words.VERDICTS)
        for o in judged
    ]
    answers = await _chosen(asker, asked)
    pairs = [
        (one.id, (float(VERDICTS.index(one.verdict)), float(part.index(1.0))))  # pyright: ignore[reportArgumentType]
        for one, part in zip(judged, map(parts_of, answers), strict=True)
        if part and 1.0 in part
    ]
    return [
        Measurement(
            task=TASK,
            subset=ALL,
            metric="verifier_kappa",
            better="higher",
            unit="opinion",
            units=tuple(identity for identity, _ in pairs),
            values=tuple(pair for _, pair in pairs),
            n=len(pairs),
            draws=sum(answer.draws for answer in answers),
            invalid_rate=_invalid_rate(answers),
            statistic="kappa",
            floors={"constant": 0.0, "random": 0.0},
            paired=False,
        )
    ]


# --- the judge itself


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


async def judge_measurements(asker: Asker) -> list[Measurement]:
    """The judge's accuracy on each labelled set, beside its floors. Raises EndpointError."""
    return [await _accuracy(asker, name, of) for name, of in cases().items()]


async def _accuracy(asker: Asker, name: str, of: Sequence[Case]) -> Measurement:
    answers = await _each(asker, [Question(one.id, words.SYSTEM, one.text, one.options) for one in of])
    return accuracy(
        JUDGE, name, [one.id for one in of], [one.truth for one in of], [len(one.options) for one in of], answers
    )  # fmt: skip


def accuracy(
    task: str,
    subset: str,
    ids: Sequence[str],
    truths: Sequence[int],
    sizes: Sequence[int],
    answers: Sequence[Answer],
    *,
    unit: str = "item",
) -> Measurement:
    """How often the right option is the likeliest; level ones share. Floors are the option that is most
    often right, always taken, and any option."""
    parts = [parts_of(answer) for answer in answers]
    scores = [part[truth] if part else None for part, truth in zip(parts, truths, strict=True)]
    return Measurement(
        task=task,
        subset=subset,
        metric="accuracy",
        better="higher",
        unit=unit,
        units=tuple(ids),
        values=tuple((score,) for score in scores),
        n=sum(score is not None for score in scores),
        draws=sum(answer.draws for answer in answers),
        invalid_rate=_invalid_rate(answers),
        floors={
            "constant": max(truths.count(place) for place in set(truths)) / len(truths) if truths else None,
            "random": float(np.mean([1 / size for size in sizes])) if sizes else None,
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
        if low is None or math.isnan(low) or low <= floor:
            found.append(
                f"{name} does not beat its floors on the labelled set `{one.subset}`: do not trust "
                f"{_RESTS_ON[one.subset]}."
            )
    return found
