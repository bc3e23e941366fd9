"""Quality of what a run has made, as a model judges it.

A judge is asked questions with options (`asking.Asker`), each option in each place equally often. Where
options come out level, as for a judge that goes by their place, each has its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct

from culturepark.evaluation.asking import Answer, Asker, Question
from culturepark.evaluation.measure import Better, Measurement
from culturepark.evaluation.quality import by_talk, summed
from culturepark.evaluation.run_data import ALL, TASK, Opinion, RunData, Turn, sampled, sampled_turns
from culturepark.prompts import judge as words
from culturepark.refine.verify import VERDICTS


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


def sample_of(made: RunData, at_most: int, rng_seed: int) -> Sample:
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
    return await asker.ask_each(asked)


def invalid_rate(answers: Sequence[Answer]) -> float:
    """The share of all draws that could not be read."""
    draws = sum(answer.draws for answer in answers)
    return sum(answer.invalid * answer.draws for answer in answers) / draws if draws else 0.0


# --- a run's data


async def evaluate(asker: Asker, made: RunData, sample: Sample) -> list[Measurement]:
    """Kinds and subtypes of samples, what turns do, and agreement with the run's verifier.

    Raises EndpointError.
    """
    return [
        *await _kinds(asker, made, sample.kept),
        *await _turns(asker, made, sample),
        *await _verdicts(asker, made, sample.judged),
    ]


def _shares(
    made: RunData,
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
    for culture in ("", *(made.cultures if len(made.cultures) > 1 else ())):
        of = [one for one in triples if not culture or one[0].culture == culture]
        if not of:
            continue
        read = [(one, value) for one, _, value in of if value is not None]
        talks = made.talks if not culture else made.only((culture,)).talks
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
                invalid_rate=invalid_rate(asked),
                floors=floors,
            )
        )
    return found


async def _kinds(asker: Asker, made: RunData, kept: Sequence[Opinion]) -> list[Measurement]:
    if not kept:
        return []
    answers = await _chosen(asker, [(f"kind/{o.id}", words.kind_question(o.text), words.KINDS) for o in kept])
    parts = [answer.parts for answer in answers]
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


async def _subtypes(asker: Asker, made: RunData, kind: str, kept: Sequence[Opinion]) -> list[Measurement]:
    """Shares of the subtypes among the samples of a kind, level ones among them."""
    options = words.SUBTYPES[kind]
    asked = [(f"{kind}/{o.id}", words.subtype_question(o.text, kind), options) for o in kept]
    answers = await _chosen(asker, asked)
    parts = [answer.parts for answer in answers]
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


async def _turns(asker: Asker, made: RunData, sample: Sample) -> list[Measurement]:
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
        parts = [answer.parts for answer in answers]
        values = [part[0] if part else None for part in parts]
        found += _shares(made, metric, "higher", turns, answers, values, {"random": 0.5})
    return found


def _turn_question(metric: str, turn: Turn, demonyms: Mapping[str, str]) -> str:
    if metric == "extends_topic":
        return words.extends_question(turn.statement, turn.before, turn.text)
    mine, other = demonyms.get(turn.culture, turn.culture), demonyms.get(turn.other, turn.other)
    return words.understands_question(turn.statement, turn.before, turn.text, mine, other)


async def _verdicts(asker: Asker, made: RunData, judged: Sequence[Opinion]) -> list[Measurement]:
    if not judged:
        return []
    asked = [
        (f"verdict/{o.id}", words.verdict_question(o.statement, o.stance, o.text), words.VERDICTS)
        for o in judged
    ]
    return [agreement(judged, await _chosen(asker, asked))]


def agreement(judged: Sequence[Opinion], answers: Sequence[Answer]) -> Measurement:
    """Cohen's kappa of the run's verifier and this judge; what the judge leaves open is missing. A dialogue
    is one row: how often the one said this and the other that."""
    tables = {one.talk: np.zeros((len(VERDICTS), len(VERDICTS))) for one in judged}
    n = 0
    for one, answer in zip(judged, answers, strict=True):
        if (parts := answer.parts) and 1.0 in parts:
            tables[one.talk][VERDICTS.index(one.verdict), parts.index(1.0)] += 1  # pyright: ignore[reportArgumentType]
            n += 1
    return Measurement(
        task=TASK,
        subset=ALL,
        metric="verifier_kappa",
        better="higher",
        unit="dialogue",
        units=tuple(tables),
        values=tuple(tuple(float(count) for count in table.flat) for table in tables.values()),
        n=n,
        draws=sum(answer.draws for answer in answers),
        invalid_rate=invalid_rate(answers),
        statistic="kappa_of_tables",
        floors={"constant": 0.0, "random": 0.0},
        paired=False,
    )
