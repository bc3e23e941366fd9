"""The plan: which dialogues are held, between whom, on what, holding which stance.

A plan is a sequence that is computed, not stored: `plan.brief(number)` follows from the settings,
the seeds and the number alone, so every process can work it out for itself, a message needs no
more than the number, and a plan of ten million dialogues needs no more memory than one of ten.

The order goes round by round: in each round every question of every culture gets one *cell*, up to
`cell_dialogues` dialogues of one culture and question. A cell is what is selected from and sealed
as a whole.

A plan can be one part of N (`plan.shard`), for as many runs beside each other: the cells, ordered by
culture, are cut into N consecutive blocks. A part numbers its own dialogues from 0; their ids are those
of the whole plan.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from culturepark.cultures import Culture, Gender, Persona, culture_named, draw_persona
from culturepark.errors import ConfigError
from culturepark.seeds import Answers, Seed, draw, stance_of
from culturepark.seeds.stance import Stance
from culturepark.settings import (
    IDENTITY_TABLES,
    ROLES,
    WHOLE,
    Kind,
    PlanSettings,
    Settings,
    Style,
    part_of,
)
from culturepark.versions import PLAN_VERSION, PROMPT_VERSION


class Cell(Struct, frozen=True):
    """A run of consecutive dialogues of one culture and question.

    `place` is the cell's rank among the cells of its culture.
    """

    index: int
    place: int
    culture: str
    seed_id: str
    first: int
    size: int


class Brief(Struct, frozen=True):
    """All that is known of a dialogue before its first word.

    `speakers` are in order of speaking; `stances` run beside them, None for a speaker with no
    drawn stance (the main contact). `delegates` are the indices of those whose opinions count.
    """

    number: int
    id: str
    cell: int
    kind: Kind
    style: Style
    culture: str
    seed: Seed
    answers: Answers
    speakers: tuple[Persona, ...]
    stances: tuple[Stance | None, ...]
    delegates: tuple[int, ...]
    utterances: int
    language: str
    direct_reasons: int

    @property
    def affinity(self) -> str:
        """The key that keeps its calls on one replica (affinity); see ports.ChatModel."""
        return f"{self.number}.{self.id}"


class _Span(Struct, frozen=True):
    """Consecutive rounds that ask the same pairs of culture and question, in cells of one size.

    `pairs` are indices into the pairs of the whole plan, in their order.
    """

    first_round: int
    rounds: int
    pairs: tuple[int, ...]
    size: int
    first_cell: int
    first_number: int


class _Variant(Struct, frozen=True):
    """What a dialogue is before its personas are drawn; with the speakers' cultures, in order of speaking."""

    culture_index: int
    seed_index: int
    replica: int
    kind: Kind
    style: Style
    pairing: str
    cultures: tuple[Culture, ...]


class Plan:
    """All dialogues of a run, by number from 0.

    Raises ConfigError if a culture or question is unknown, a culture has no survey answers at all,
    nothing is left to talk about, or there are more parts than cells.
    """

    def __init__(self, settings: Settings, seeds: Sequence[Seed], cultures: Mapping[str, Culture]) -> None:
        self.settings: PlanSettings = settings.plan
        self.cultures = dict(cultures)
        self._seeds = _chosen_seeds(self.settings, seeds)
        self._cultures = _delegates(self.settings, cultures)
        self.contact = culture_named(cultures, self.settings.contact, "$.plan.contact")
        pairs = [(c, s) for s in range(len(self._seeds)) for c in range(len(self._cultures))]
        self._pairs = [(c, s) for c, s in pairs if self._answers(c, s)]
        asked = {c for c, _ in self._pairs}
        if silent := [d.id for c, d in enumerate(self._cultures) if c not in asked]:
            what = f"the seeds hold no answers for {', '.join(silent)}."
            fix = "Import a survey that asked there, check `survey_keys`, or leave the culture out."
            raise ConfigError("$.plan.cultures", what, fix)
        self._per_pair = self.settings.dialogues_per_question
        self._round = min(settings.refine.cell_dialogues, self._per_pair)
        self._rounds = -(-self._per_pair // self._round)
        self._per_culture = [
            [p for p, (c, _) in enumerate(self._pairs) if c == d] for d in range(len(self._cultures))
        ]
        self._place = {p: i for pairs in self._per_culture for i, p in enumerate(pairs)}
        self._blocks = self._blocks_of_part()
        here = [c for c, (first, end) in enumerate(self._blocks) if first < end]
        self.delegates = [self._cultures[c] for c in here]
        """The cultures whose opinions this plan asks for: all, or those of this part."""
        self.unasked = [
            (self._cultures[c].id, self._seeds[s].id)
            for c, s in pairs
            if c in here and not self._answers(c, s)
        ]
        """Culture and question for each pair that gets no dialogue, as it was never asked there."""
        self._spans = list(self._span_rounds())
        self._first_cells = [span.first_cell for span in self._spans]
        self._first_numbers = [span.first_number for span in self._spans]
        last = self._spans[-1]
        self.n_cells = last.first_cell + last.rounds * len(last.pairs)
        """How many cells the plan has."""
        self._len = last.first_number + last.rounds * len(last.pairs) * last.size
        self.fingerprint = self._fingerprint(settings)
        self.brief = lru_cache(maxsize=4096)(self._brief)
        self._stance = lru_cache(maxsize=65_536)(self._held)

    @property
    def seeds(self) -> tuple[Seed, ...]:
        """The questions in use."""
        return self._seeds

    def __len__(self) -> int:
        return self._len

    def cell(self, index: int) -> Cell:
        """The cell with this index, from 0."""
        span = self._spans[bisect_right(self._first_cells, index) - 1]
        rnd, within = divmod(index - span.first_cell, len(span.pairs))
        pair = span.pairs[within]
        culture, seed = self._pairs[pair]
        rank = (span.first_round + rnd) * len(self._per_culture[culture]) + self._place[pair]
        return Cell(
            index=index,
            place=rank - self._blocks[culture][0],
            culture=self._cultures[culture].id,
            seed_id=self._seeds[seed].id,
            first=span.first_number + (index - span.first_cell) * span.size,
            size=span.size,
        )

    def cell_of(self, number: int) -> int:
        """The index of the cell that dialogue `number` belongs to."""
        span = self._span_of(number)
        return span.first_cell + (number - span.first_number) // span.size

    def culture_of(self, number: int) -> str:
        """The delegate culture of dialogue `number`."""
        return self._cultures[self._locate(number)[0]].id

    def planned(self) -> dict[str, int]:
        """Dialogues of each culture."""
        found = dict.fromkeys((d.id for d in self.delegates), 0)
        for span in self._spans:
            for culture, pairs in Counter(self._pairs[pair][0] for pair in span.pairs).items():
                found[self._cultures[culture].id] += pairs * span.rounds * span.size
        return found

    def questions_of(self, culture: str) -> int:
        """How many questions dialogues of this culture are held on."""
        pairs = {pair for span in self._spans for pair in span.pairs}
        return sum(self._cultures[self._pairs[pair][0]].id == culture for pair in pairs)

    def kinds(self) -> dict[Kind, int]:
        """Dialogues of each kind, those that there are."""
        kinds = self.settings.kinds
        found = Counter[Kind]()
        for span in self._spans:
            first = span.first_round * self._round
            end = first + (span.rounds - 1) * self._round + span.size
            for place, kind in enumerate(kinds):
                of_kind = (end - place - 1) // len(kinds) - (first - place - 1) // len(kinds)
                found[kind] += of_kind * len(span.pairs)
        return {kind: n for kind, n in found.items() if n}

    def find(self, dialogue_id: str) -> int | None:
        """The number of the dialogue with this id; None if the plan has none. Computes each brief in turn."""
        return next((n for n in range(len(self)) if self.brief(n).id == dialogue_id), None)

    def utterances_of(self, number: int) -> int:
        """Turns of dialogue `number`: one for a direct generation."""
        return 1 if self._kind(number) == "direct" else self.settings.utterances

    def agent_cultures(self) -> list[str]:
        """Cultures that need an agent."""
        contact = [self.contact.id] if "cross" in self.settings.kinds else []
        return [*contact, *(d.id for d in self.delegates)]

    # --- how a number becomes a brief

    def _blocks_of_part(self) -> list[tuple[int, int]]:
        """For each culture, the rank of its first cell in this part, and that after its last."""
        part, parts = part_of(self.settings.shard)
        sizes = [len(pairs) * self._rounds for pairs in self._per_culture]
        cells = sum(sizes)
        if parts > cells:
            what = f"the plan has {cells} cells, which make no {parts} parts."
            raise ConfigError(
                "$.plan.shard", what, "Ask for fewer parts, or set `refine.cell_dialogues` lower."
            )
        first, end = (part - 1) * cells // parts, part * cells // parts
        blocks: list[tuple[int, int]] = []
        before = 0
        for size in sizes:
            blocks.append((min(max(first - before, 0), size), min(max(end - before, 0), size)))
            before += size
        return blocks

    def _span_rounds(self) -> Iterator[_Span]:
        """The rounds of this plan. Only the last round's cells can be smaller, and only in rounds in
        which a culture's block begins or ends are some of its questions missing."""
        edges = {0, self._rounds - 1, self._rounds}
        for pairs, block in zip(self._per_culture, self._blocks, strict=True):
            for cell in block:
                edges |= {cell // len(pairs), cell // len(pairs) + 1}
        cuts = sorted(edge for edge in edges if edge <= self._rounds)
        first_cell = first_number = 0
        for begin, end in pairwise(cuts):
            chosen = sorted(
                pair
                for pairs, (first, last) in zip(self._per_culture, self._blocks, strict=True)
                for pair in pairs[max(first - begin * len(pairs), 0) : max(last - begin * len(pairs), 0)]
            )
            if not chosen:
                continue
            size = self._round if end < self._rounds else self._per_pair - self._round * (self._rounds - 1)
            span = _Span(begin, end - begin, tuple(chosen), size, first_cell, first_number)
            yield span
            first_cell += span.rounds * len(chosen)
            first_number += span.rounds * len(chosen) * size

    def _span_of(self, number: int) -> _Span:
        if not 0 <= number < self._len:
            raise IndexError(number)
        return self._spans[bisect_right(self._first_numbers, number) - 1]

    def _locate(self, number: int) -> tuple[int, int, int]:
        """Culture index, seed index and replica of a dialogue, as in the whole plan."""
        span = self._span_of(number)
        cell, within = divmod(number - span.first_number, span.size)
        rnd, pair = divmod(cell, len(span.pairs))
        culture, seed = self._pairs[span.pairs[pair]]
        return culture, seed, (span.first_round + rnd) * self._round + within

    def _kind(self, number: int) -> Kind:
        return self.settings.kinds[self._locate(number)[2] % len(self.settings.kinds)]

    def _answers(self, culture: int, seed: int) -> Answers | None:
        answers = self._seeds[seed].answers_of(self._cultures[culture].survey_keys)
        return answers if answers and answers.asked else None

    def speaking(self, number: int) -> tuple[str, ...]:
        """The cultures of the speakers of dialogue `number`, in order of speaking."""
        return tuple(culture.id for culture in self._variant(number).cultures)

    def _variant(self, number: int) -> _Variant:
        culture_index, seed_index, replica = self._locate(number)
        culture, plan = self._cultures[culture_index], self.settings
        # Kinds alternate first; the rest is shifted by question and culture, so that even one
        # dialogue a question shows every style, opener and pairing across the plan.
        variant, kind_index = divmod(replica, len(plan.kinds))
        kind = plan.kinds[kind_index]
        variant += 3 * seed_index + culture_index
        variant, style_index = divmod(variant, len(plan.styles))
        variant, opener_index = divmod(variant, len(plan.openers))
        style, opener = plan.styles[style_index], plan.openers[opener_index]
        pairing = plan.pairings[variant % len(plan.pairings)]
        if kind == "direct":
            cultures: tuple[Culture, ...] = (culture,)
        elif kind == "in-culture":
            cultures = (culture, culture)
        else:
            cultures = (self.contact, culture) if opener == "contact" else (culture, self.contact)
        return _Variant(culture_index, seed_index, replica, kind, style, pairing, cultures)

    def _brief(self, number: int) -> Brief:
        variant = self._variant(number)
        culture, seed = self._cultures[variant.culture_index], self._seeds[variant.seed_index]
        answers = self._answers(variant.culture_index, variant.seed_index)
        assert answers is not None  # pairs that were never asked are not in the plan
        plan, kind, replica = self.settings, variant.kind, variant.replica
        rng = random.Random(_digest("draw", plan.seed, culture.id, seed.id, replica))
        speakers: list[Persona] = []
        stances: list[Stance | None] = []
        for of, gender in zip(variant.cultures, _genders(variant.pairing), strict=False):
            speakers.append(draw_persona(of, gender, rng, speakers[0].name if speakers else None))
            if of is culture:
                code = draw(seed, answers, plan.stance, rng, weighted=plan.weighted)
                stances.append(self._stance(variant.culture_index, variant.seed_index, code))
            else:
                stances.append(None)
        return Brief(
            number=number,
            id="d"
            + _digest(PLAN_VERSION, plan.seed, kind, self.contact.id, culture.id, seed.id, replica)[:20],
            cell=self.cell_of(number),
            kind=kind,
            style=variant.style,
            culture=culture.id,
            seed=seed,
            answers=answers,
            speakers=tuple(speakers),
            stances=tuple(stances),
            delegates=tuple(i for i, of in enumerate(variant.cultures) if of is culture),
            utterances=1 if kind == "direct" else plan.utterances,
            language=culture.language if plan.language == "native" else "English",
            direct_reasons=plan.direct_reasons,
        )

    def _held(self, culture_index: int, seed_index: int, code: int) -> Stance:
        answers = self._answers(culture_index, seed_index)
        assert answers is not None  # as above
        return stance_of(self._seeds[seed_index], answers, code)

    def _fingerprint(self, settings: Settings) -> str:
        tables: dict[str, object] = {table: getattr(settings, table) for table in IDENTITY_TABLES}
        # Where seeds, cultures and models are found may change between resumes; what they are may not.
        tables["plan"] = msgspec.structs.replace(settings.plan, seeds=(), culture_files=())
        tables["models"] = {
            name: [
                model.engine,
                model.model,
                Path(model.path).name,
                model.hub,
                model.profile,
                model.dimensions,
            ]
            for name, model in settings.models.items()
            if name in {settings.roles.of(role) for role in ROLES}
        }
        used = [
            c for c in self.cultures.values() if c.id in {*(d.id for d in self._cultures), self.contact.id}
        ]
        # Deterministic order wants text keys; option codes are numbers.
        facts: Any = msgspec.to_builtins(
            [PLAN_VERSION, PROMPT_VERSION, tables, self._seeds, used], str_keys=True
        )
        if self.settings.shard == WHOLE:
            del facts[2]["plan"]["shard"]  # runs that began before plans had parts are whole ones
        content = msgspec.json.encode(facts, order="deterministic")
        return hashlib.sha256(content).hexdigest()[:32]


def _genders(pairing: str) -> tuple[Gender, Gender]:
    first, _, second = pairing.partition("-")
    return ("woman" if first == "woman" else "man", "woman" if second == "woman" else "man")


def _digest(*parts: object) -> str:
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()


def _chosen_seeds(settings: PlanSettings, seeds: Sequence[Seed]) -> tuple[Seed, ...]:
    if not settings.questions:
        return tuple(seeds)
    known = {seed.id: seed for seed in seeds}
    missing = [question for question in settings.questions if question not in known]
    if missing:
        what = f"no seed has the id {missing[0]!r}."
        fix = f"Ids look like {', '.join(list(known)[:3])}; `culturepark seeds list` shows all."
        raise ConfigError("$.plan.questions", what, fix)
    return tuple(known[question] for question in settings.questions)


def _delegates(settings: PlanSettings, cultures: Mapping[str, Culture]) -> list[Culture]:
    names = settings.cultures or tuple(name for name in cultures if name != settings.contact)
    if settings.contact in names and "cross" in settings.kinds:
        what = f"{settings.contact!r} is the main contact and cannot be a delegate too."
        raise ConfigError("$.plan.cultures", what, "Remove it, or set another `plan.contact`.")
    return [culture_named(cultures, name, "$.plan.cultures") for name in names]
