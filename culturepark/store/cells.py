"""The open cells of a run: outcomes wait until their cell is whole, then its opinions are selected.

Cells of a culture are selected in the order of the plan, so that the choice does not depend on which dialogue
was faster. The rows of selected cells wait until there are enough for shards. All of this is in memory alone
and does no I/O: until a cell is sealed, the log keeps its outcomes, and everything here follows from them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from msgspec import Struct

from culturepark.messages import Outcome
from culturepark.plan import Cell
from culturepark.ports import Vectors
from culturepark.refine.select import Candidate, Choice, KeptVectors, select
from culturepark.store import funnel as funnels
from culturepark.store.funnel import Funnel
from culturepark.store.rows import DIALOGUES, OPINIONS, RowBuffer, about_of, dialogue_row, opinion_row
from culturepark.store.rundir import SHARD_DIRS, Run


class Sealed(Struct, frozen=True):
    """What a manifest entry says of its shards: the cells in them and what they add to the funnel."""

    cells: list[int]
    funnels: dict[str, dict[str, int]]


class _Held(Struct):
    """An outcome in an open cell, None once rows were made of it, and the log segment that keeps it safe."""

    outcome: Outcome | None
    segment: int


class Cells:
    """The cells of a run, sealed or open."""

    def __init__(self, run: Run) -> None:
        self._plan = run.plan
        self._facts = run.facts
        self._settings = run.settings
        self.funnels: dict[str, Funnel] = {culture: Counter() for culture in self._plan.planned()}
        """Counts by culture, of everything that was sealed or added."""
        self.selected: list[int] = []
        """The cells whose rows wait for the next shards."""
        self._sealed = bytearray(self._plan.n_cells)
        self._next_place: dict[str, int] = dict.fromkeys(self.funnels, 0)
        self._kept: dict[str, KeptVectors] = defaultdict(KeptVectors)
        self._open: dict[int, dict[int, _Held]] = {}
        self._open_funnels: dict[int, Funnel] = {}
        self._whole: dict[tuple[str, int], int] = {}
        self._rows = _buffers()
        self._rows_bytes = 0

    def recall(self, sealed: Iterable[Sealed], kept: Iterable[tuple[str, str, Vectors]]) -> int:
        """Learn what earlier writers sealed; returns how many cells that is. Only before the first `add`.

        `kept` holds culture, id and embedding of each sample in the shards.
        """
        for facts in sealed:
            for index in facts.cells:
                self._sealed[index] = 1
            for culture, counts in facts.funnels.items():
                funnels.add(self.funnels[culture], counts)
        for index in self._sealed_indices():
            cell = self._plan.cell(index)
            self._next_place[cell.culture] = max(self._next_place[cell.culture], cell.place + 1)
        for culture, sample_id, vector in kept:
            self._kept[culture].add(sample_id, vector)
        return sum(self._sealed)

    # --- what is known

    def has(self, number: int) -> bool:
        """Whether this dialogue's outcome is sealed or held."""
        cell = self._plan.cell_of(number)
        return bool(self._sealed[cell]) or number in self._open.get(cell, ())

    def done(self) -> bytes:
        """One bit a dialogue of the plan, set for those whose outcome is sealed or held."""
        bits = np.zeros(len(self._plan), dtype=np.uint8)
        for index in self._sealed_indices():
            cell = self._plan.cell(index)
            bits[cell.first : cell.first + cell.size] = 1
        for held in self._open.values():
            bits[list(held)] = 1
        return np.packbits(bits).tobytes()

    @property
    def waiting(self) -> int:
        """Outcomes held in memory, and rows of dialogues."""
        return sum(len(held) for held in self._open.values()) + len(self._rows["dialogues"])

    @property
    def full(self) -> bool:
        """Whether the rows of selected cells are enough for shards."""
        store = self._settings.store
        return (
            len(self._rows["dialogues"]) >= store.shard_dialogues or self._rows_bytes > store.shard_mb << 20
        )

    def _sealed_indices(self) -> Iterator[int]:
        return map(int, np.flatnonzero(np.frombuffer(self._sealed, dtype=np.uint8)))

    # --- from outcomes to rows

    def add(self, outcome: Outcome, segment: int) -> None:
        """Hold the outcome of a dialogue that `has` does not know; `segment` of the log keeps it safe."""
        index = self._plan.cell_of(outcome.number)
        held = self._open.setdefault(index, {})
        held[outcome.number] = _Held(outcome, segment)
        counts = funnels.of_outcome(outcome)
        funnels.add(self._open_funnels.setdefault(index, Counter()), counts)
        cell = self._plan.cell(index)
        funnels.add(self.funnels[cell.culture], counts)
        if len(held) == cell.size:
            self._whole[cell.culture, cell.place] = index

    def select_whole(self) -> None:
        """Select from the cells that are whole, each culture's in their order, and make their rows."""
        for culture in self._next_place:
            while (index := self._whole.pop((culture, self._next_place[culture]), None)) is not None:
                self._select(self._plan.cell(index))
                self._next_place[culture] += 1

    def _select(self, cell: Cell) -> None:
        held = [self._open[cell.index][n] for n in range(cell.first, cell.first + cell.size)]
        outcomes = [one.outcome for one in held if one.outcome is not None]
        candidates, vectors = self._candidates(outcomes)
        refine = self._settings.refine
        choices = select(
            candidates,
            np.array(vectors, dtype=np.float32),
            self._kept[cell.culture],
            near_duplicate=refine.near_duplicate,
            clusters=refine.clusters,
            keep_longest=refine.faults.keep_longest,
        )
        by_id = dict(zip((c.id for c in candidates), choices, strict=True))
        counts = funnels.of_choices(choices)
        funnels.add(self.funnels[cell.culture], counts)
        funnels.add(self._open_funnels[cell.index], counts)
        for outcome in outcomes:
            self._add_rows(outcome, by_id)
        for one in held:
            one.outcome = None
        self.selected.append(cell.index)

    def _candidates(self, outcomes: list[Outcome]) -> tuple[list[Candidate], list[Vectors]]:
        """The opinions that refinement let through, and the embedding of each."""
        candidates: list[Candidate] = []
        vectors: list[Vectors] = []
        for outcome in outcomes:
            stances = self._plan.brief(outcome.number).stances if outcome.opinions else ()
            for opinion in outcome.opinions:
                if opinion.rejected:
                    continue
                stance = stances[opinion.speaker]
                group = (stance.side or stance.code if stance else None, opinion.verdict)
                candidates.append(Candidate(opinion.id, opinion.text, group))
                vectors.append(np.frombuffer(opinion.vector, dtype=np.float32))
        return candidates, vectors

    def _add_rows(self, outcome: Outcome, choices: dict[str, Choice]) -> None:
        brief, facts = self._plan.brief(outcome.number), self._facts
        about = about_of(brief, facts)
        self._rows["dialogues"].add(dialogue_row(brief, outcome, about))
        for opinion in outcome.opinions:
            row = opinion_row(brief, opinion, choices.get(opinion.id), about, facts, self._plan.cultures)
            self._rows["samples" if row["kept"] else "rejected"].add(row)
            self._rows_bytes += 1500 + 3 * len(opinion.text) + len(opinion.vector)
        self._rows_bytes += 600 + sum(150 + len(turn.text) for turn in outcome.turns)

    # --- from rows to shards

    def tables(self) -> Iterator[tuple[str, Any]]:
        """The rows of the selected cells, for each kind of shard that has any: the kind and its table."""
        return ((kind, rows.table()) for kind, rows in self._rows.items() if len(rows))

    def facts(self) -> Sealed:
        """What a manifest entry says of these tables."""
        counts: dict[str, Funnel] = {}
        for index in self.selected:
            into = counts.setdefault(self._plan.cell(index).culture, Counter())
            funnels.add(into, self._open_funnels[index])
        return Sealed(self.selected, {culture: dict(funnel) for culture, funnel in counts.items()})

    def mark_sealed(self) -> list[int]:
        """The selected cells are in shards now: let go of them.

        Returns, for each of their outcomes, the log segment that need not keep it any more.
        """
        segments: list[int] = []
        for index in self.selected:
            self._sealed[index] = 1
            del self._open_funnels[index]
            segments += [one.segment for one in self._open.pop(index).values()]
        self.selected = []
        self._rows = _buffers()
        self._rows_bytes = 0
        return segments


def _buffers() -> dict[str, RowBuffer]:
    return {kind: RowBuffer(DIALOGUES if kind == "dialogues" else OPINIONS) for kind in SHARD_DIRS}
