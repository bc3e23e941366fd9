"""Quality of a run's data, as a model judges it (LLM as a judge).

A judge is asked multiple-choice questions (`asking.Asker`), each option in each place equally often. Where
options are tied, as for a judge that goes by their place, they share the credit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct

from culturepark.evaluation.asking import Answer, Asker, Question, counts_of
from culturepark.evaluation.measure import Better, Measurement
from culturepark.evaluation.quality import by_dialogue, ratio_of_sums
from culturepark.evaluation.run_data import ALL, TASK, Opinion, RunData, Turn, sampled, sampled_turns
from culturepark.prompts import judge as words
from culturepark.refine.verify import VERDICTS


class Sample(Struct, frozen=True):
    """What a judge is asked about: kept opinions, opinions with the verifier's verdict, and turns."""

    kept: tuple[Opinion, ...]
    verified: tuple[Opinion, ...]
    turns: tuple[Turn, ...]
    demonyms: dict[str, str]

    @property
    def questions(self) -> int:
        """How many questions there are."""
        return 2 * len(self.kept) + len(self.verified) + len(self.turns) + sum(t.meets for t in self.turns)


def draw_sample(run_data: RunData, at_most: int, rng_seed: int) -> Sample:
    """A random sample of at most `at_most` of each; the same seed draws the same. Raises RunDirError."""

    def id_of(one: Opinion) -> str:
        return one.id

    return Sample(
        tuple(sampled(run_data.kept, at_most, rng_seed, id_of)),
        tuple(sampled((one for one in run_data.opinions if one.verdict), at_most, rng_seed, id_of)),
        tuple(sampled_turns(run_data, at_most, rng_seed)),
        {culture: of.demonym for culture, of in run_data.run.plan.cultures.items()},
    )


# --- asking


async def _ask(asker: Asker, questions: Sequence[tuple[str, str, Mapping[str, str]]]) -> list[Answer]:
    """Answers to questions of (id, text, options), each option in each place once."""
    return await asker.ask_balanced(
        [Question(key, words.SYSTEM, text, tuple(options.values())) for key, text, options in questions]
    )


# --- a run's data


async def evaluate(asker: Asker, run_data: RunData, sample: Sample) -> list[Measurement]:
    """Kinds and subtypes of samples, what turns do, and agreement with the run's verifier.

    Raises EndpointError.
    """
    return [
        *await _kinds(asker, run_data, sample.kept),
        *await _turns(asker, run_data, sample),
        *await _verdicts(asker, sample.verified),
    ]


def _shares(
    run_data: RunData,
    metric: str,
    better: Better,
    opinions: Sequence[Opinion | Turn],
    answers: Sequence[Answer],
    place: int,
    floors: Mapping[str, float | None],
) -> list[Measurement]:
    """How often the option at `place` was chosen, of all and by culture; invalid answers are missing."""
    found: list[Measurement] = []
    pairs = list(zip(opinions, answers, strict=True))
    for culture in ("", *(run_data.cultures if len(run_data.cultures) > 1 else ())):
        of = [one for one in pairs if not culture or one[0].culture == culture]
        if not of:
            continue
        valid = [(one, credit[place]) for one, answer in of if (credit := answer.credit)]
        dialogues = run_data.dialogues if not culture else run_data.only((culture,)).dialogues
        ids = {one.dialogue_id for one, _ in of}
        counts = counts_of([answer for _, answer in of])
        found.append(
            ratio_of_sums(
                TASK,
                culture or ALL,
                metric,
                better,
                [dialogue for dialogue in dialogues if dialogue.id in ids],
                by_dialogue([one for one, _ in valid], [value for _, value in valid]),
                n=counts.n,
                draws=counts.draws,
                invalid_rate=counts.invalid_rate,
                floors=floors,
            )
        )
    return found


async def _kinds(asker: Asker, run_data: RunData, kept: Sequence[Opinion]) -> list[Measurement]:
    if not kept:
        return []
    answers = await _ask(asker, [(f"kind/{o.id}", words.kind_question(o.text), words.KINDS) for o in kept])
    at_random = {"random": 1 / len(words.KINDS)}
    found = [
        one
        for place, kind in enumerate(words.KINDS)
        for one in _shares(run_data, f"share_{kind}", "neither", kept, answers, place, at_random)
    ]
    for place, kind in enumerate(words.KINDS):
        of_kind = [o for o, answer in zip(kept, answers, strict=True) if place in answer.modes]
        found += await _subtypes(asker, run_data, kind, of_kind)
    return found


async def _subtypes(asker: Asker, run_data: RunData, kind: str, kept: Sequence[Opinion]) -> list[Measurement]:
    """Shares of the subtypes among the samples of a kind, tied ones included."""
    options = words.SUBTYPES[kind]
    questions = [(f"{kind}/{o.id}", words.subtype_question(o.text, kind), options) for o in kept]
    answers = await _ask(asker, questions)
    at_random = {"random": 1 / len(options)}
    return [
        one
        for place, name in enumerate(options)
        for one in _shares(run_data, f"{kind}_{name}", "neither", kept, answers, place, at_random)
    ]


async def _turns(asker: Asker, run_data: RunData, sample: Sample) -> list[Measurement]:
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
        questions = [(f"{metric}/{turn.id}", text, options) for turn, text in zip(turns, texts, strict=True)]
        answers = await _ask(asker, questions)
        found += _shares(run_data, metric, "higher", turns, answers, 0, {"random": 0.5})
    return found


def _turn_question(metric: str, turn: Turn, demonyms: Mapping[str, str]) -> str:
    if metric == "extends_topic":
        return words.extends_question(turn.statement, turn.before, turn.text)
    mine, other = demonyms.get(turn.culture, turn.culture), demonyms.get(turn.other, turn.other)
    return words.understands_question(turn.statement, turn.before, turn.text, mine, other)


async def _verdicts(asker: Asker, verified: Sequence[Opinion]) -> list[Measurement]:
    if not verified:
        return []
    questions = [
        (f"verdict/{o.id}", words.verdict_question(o.statement, o.stance, o.text), words.VERDICTS)
        for o in verified
    ]
    return [agreement(verified, await _ask(asker, questions))]


def agreement(verified: Sequence[Opinion], answers: Sequence[Answer]) -> Measurement:
    """Cohen's kappa of the run's verifier and this judge; ties and invalid answers are missing. A dialogue is
    one row: its confusion matrix of the two."""
    tables = {one.dialogue_id: np.zeros((len(VERDICTS), len(VERDICTS))) for one in verified}
    n = 0
    for one, answer in zip(verified, answers, strict=True):
        if len(answer.modes) == 1:
            tables[one.dialogue_id][VERDICTS.index(one.verdict), answer.modes[0]] += 1  # pyright: ignore[reportArgumentType]
            n += 1
    counts = counts_of(answers)
    return Measurement(
        task=TASK,
        subset=ALL,
        metric="verifier_kappa",
        better="higher",
        unit="dialogue",
        units=tuple(tables),
        values=tuple(tuple(float(count) for count in table.flat) for table in tables.values()),
        n=n,
        draws=counts.draws,
        invalid_rate=counts.invalid_rate,
        statistic="kappa_of_tables",
        floors={"constant": 0.0, "random": 0.0},
        paired=False,
    )
