"""The ledger: what every planned dialogue came to, durable and exactly once.

Outcomes go to the log first; once synced they are acknowledged and never lost. So do the turns and the
refinement's calls of dialogues under way, each before what follows from it is begun. When all dialogues
of a cell have ended, its opinions are selected, in the order of the culture's cells, so that the
choice does not depend on who was faster. Selected cells wait in memory until there are enough for
shards; shards and the manifest entry that names them are one commit, after which the log segments
that held those outcomes are dropped. Memory holds the open cells and the rows of the next shards.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct, structs

from culturepark.errors import RunDirError
from culturepark.messages import (
    InProgress,
    Outcome,
    Spoke,
    SpokeHead,
    Step,
    StepHead,
    Turn,
    decode_head,
    decode_record,
)
from culturepark.plan import Cell
from culturepark.refine.select import Candidate, Choice, KeptVectors, select
from culturepark.store import funnel as funnels
from culturepark.store.files import REAL, Files
from culturepark.store.funnel import Funnel
from culturepark.store.head import Head, read_head, remove_older_heads, write_head
from culturepark.store.integrity import require_all
from culturepark.store.lock import RunLock
from culturepark.store.manifest import Manifest, Shard, missing_entry
from culturepark.store.readers import kept_vectors, shard_rows
from culturepark.store.rows import DIALOGUES, OPINIONS, RowBuffer, about_of, dialogue_row, opinion_row
from culturepark.store.rundir import SHARD_DIRS, Run
from culturepark.store.shards import Stray, commit_table, quarantine_strays, shard_path
from culturepark.store.wal import Log, list_segments
from culturepark.usage import Usage

_SEGMENT_BYTES = 64 << 20


class Sealed(Struct, frozen=True):
    """What a manifest entry says of its shards: the cells in them and what they add to the funnel."""

    cells: list[int]
    funnels: dict[str, dict[str, int]]


class Report(Struct, frozen=True):
    """What opening a ledger found: outcomes read back from the log, and what was set aside."""

    sealed: int
    replayed: int
    set_aside: tuple[str, ...]


class _Open(Struct):
    """A dialogue under way: how far it has come, and the first log segment that holds some of it."""

    segment: int
    turns: int = 0
    calls: set[bytes] = msgspec.field(default_factory=set[bytes])
    usage: dict[str, Usage] = {}


class _Held(Struct):
    """An outcome in an open cell, None once rows were made of it, and the log segment that keeps it safe."""

    outcome: Outcome | None
    segment: int


class Ledger:
    """The only writer of a run directory. `lock` proves it."""

    def __init__(self, run: Run, lock: RunLock, files: Files = REAL) -> None:
        self._run = run
        self._plan = run.plan
        self._facts = run.facts
        self._root: Path = run.root
        self._lock = lock
        self._files = files
        self._manifest = Manifest.open(self._root / "manifest", lock.epoch, files)
        head = read_head(self._manifest.directory)
        require_all(self._root, self._manifest, head)
        self._strays: list[Stray] = []
        set_aside = self._quarantine()
        self._sealed_cells = bytearray(self._plan.n_cells)
        self.funnels: dict[str, Funnel] = {culture: Counter() for culture in self._plan.planned()}
        """Counts by culture, of everything that is durable."""
        self._next_place: dict[str, int] = dict.fromkeys(self.funnels, 0)
        self._kept: dict[str, KeptVectors] = defaultdict(KeptVectors)
        self._open: dict[int, dict[int, _Held]] = {}
        self._begun: dict[int, _Open] = {}
        self.underway: Funnel = Counter()
        """Usage, as funnels count it, of dialogues that have begun and not ended."""
        self._term = head.term if head else None
        self._ready: dict[tuple[str, int], int] = {}
        self._rows = _buffers()
        self._rows_bytes = 0
        self._selected: list[int] = []
        self._unsealed = Counter[int]()
        self._unsynced: list[tuple[int, Outcome]] = []
        self._pending: set[int] = set()
        sealed = self._recall_sealed()
        segments = head.segments if head else tuple(list_segments(self._root / "log"))
        if head is None:  # before the first segment with an epoch, so that a missing head is known as such
            self._write_head(segments)
        self._log = Log.open(self._root / "log", files, lock.epoch, segments)
        replayed = self._recall_log()
        self._require_known(self._strays)
        self._let_go()
        remove_older_heads(self._manifest.directory, lock.epoch, files)
        self._log.remove_replaced()
        self.report = Report(sealed, replayed, (*set_aside, *(str(d) for d in self._log.damage)))

    # --- what is known

    def has(self, number: int) -> bool:
        """Whether this dialogue's outcome is here."""
        cell = self._plan.cell_of(number)
        return bool(self._sealed_cells[cell]) or number in self._open.get(cell, ())

    def done(self) -> bytes:
        """One bit a dialogue of the plan, set for those that have ended."""
        bits = np.zeros(len(self._plan), dtype=np.uint8)
        for index in np.flatnonzero(np.frombuffer(self._sealed_cells, dtype=np.uint8)):
            cell = self._plan.cell(int(index))
            bits[cell.first : cell.first + cell.size] = 1
        for held in self._open.values():
            bits[list(held)] = 1
        return np.packbits(bits).tobytes()

    @property
    def waiting(self) -> int:
        """Outcomes held in memory."""
        return sum(len(held) for held in self._open.values()) + len(self._rows["dialogues"])

    def spent(self) -> dict[str, Usage]:
        """What all calls took that are on disk, by role."""
        total: Funnel = Counter(self.underway)
        for funnel in self.funnels.values():
            funnels.add(total, funnel)
        return funnels.usage_of(total)

    # --- taking outcomes

    def begin(self, term: int) -> list[InProgress]:
        """What is on disk of dialogues that have not ended. From now on turns of this term count alone,
        so that no conductor's turns follow on another's. That is on disk, too: the next writer knows it."""
        self._term = term
        self._note(self._log.names())
        self._lock.check()
        return self.begun(set(self._begun))

    def begun(self, numbers: Collection[int]) -> list[InProgress]:
        """What is on disk of these dialogues, as far as they have not ended; read from the log."""
        turns: dict[int, list[Turn]] = {n: [] for n in sorted(numbers) if n in self._begun}
        steps: dict[int, dict[bytes, Step]] = {n: {} for n in turns}
        for entry in self._log.replay():
            head = decode_head(entry.payload)
            if head.number not in turns:
                continue
            record = decode_record(entry.payload)
            if isinstance(record, Spoke) and record.turn.number == len(turns[record.number]) + 1:
                turns[record.number].append(record.turn)
            elif isinstance(record, Step):
                steps[record.number][record.key] = record
        return [InProgress(n, tuple(said), tuple(steps[n].values())) for n, said in turns.items()]

    def append(self, raw: bytes) -> Outcome | None:
        """Take an encoded record into the next `sync`; the outcome if it is one, and the dialogue's first.

        What is known already, and what comes of a dialogue that has ended, is dropped. Raises RunDirError
        for a turn before the first `begin`: nobody knows whether it counts.
        """
        record = decode_head(raw)
        if record.number in self._pending or self.has(record.number):
            return None
        if isinstance(record, Outcome):
            self._log.append(raw)
            self._unsynced.append((self._log.segment, record))
            self._pending.add(record.number)
            return record
        if isinstance(record, SpokeHead) and record.term != self._term:
            if self._term is None:
                what = "a turn came, and no moderator has begun"
                raise RunDirError(str(self._root), what, "Run the same command again to go on.")
            return None
        if self._goes_on(record, self._log.segment):
            self._log.append(raw)
        return None

    def _goes_on(self, head: SpokeHead | StepHead, segment: int) -> bool:
        """Note a turn or call of a dialogue under way; False if it is not the next one."""
        known = self._begun.get(head.number) or _Open(segment)
        if isinstance(head, SpokeHead):
            if head.turn.number != known.turns + 1:
                return False
            known.turns += 1
            role, usage = "speaker", head.turn.usage
        else:
            if head.key in known.calls:
                return False
            known.calls.add(head.key)
            role, usage = head.role, head.usage
        known.usage[role] = known.usage.get(role, Usage()) + usage
        funnels.add(self.underway, funnels.of_usage({role: usage}))
        if head.number not in self._begun:
            self._begun[head.number] = known
            self._unsealed[segment] += 1
        return True

    def sync(self) -> list[int]:
        """Make durable what was appended; returns the numbers that may be acknowledged.

        Cells that are whole now are selected, and shards sealed if there are enough.
        """
        taken, self._unsynced = self._unsynced, []
        self._log.sync()
        self._lock.check()
        self._pending.difference_update(outcome.number for _, outcome in taken)
        for segment, outcome in taken:
            self._hold(outcome, segment)
        self._select_ready()
        settings = self._run.settings.store
        if (
            len(self._rows["dialogues"]) >= settings.shard_dialogues
            or self._rows_bytes > settings.shard_mb << 20
        ):
            self.seal()
        elif self._log.size_bytes > _SEGMENT_BYTES:
            self._log.rotate()
            self._note(self._log.names())
        return [outcome.number for _, outcome in taken]

    def seal(self) -> None:
        """Write the selected cells as shards and commit them; then let go of their log segments."""
        if not self._selected:
            return
        self._lock.check()
        number = len(self._manifest.entries) + 1
        shards = [
            commit_table(
                self._root, shard_path(kind, number, self._lock.epoch), rows.table(), kind, self._files
            )
            for kind, rows in self._rows.items()
            if len(rows)
        ]
        counts: dict[str, Funnel] = {}
        held: list[_Held] = []
        for index in self._selected:
            cell = self._plan.cell(index)
            into = counts.setdefault(cell.culture, Counter())
            funnels.add(into, self._cell_funnels.pop(index))
            held += self._open.pop(index).values()
        self._lock.check()
        self._manifest.append(shards, Sealed(self._selected, {c: dict(f) for c, f in counts.items()}))
        for index in self._selected:
            self._sealed_cells[index] = 1
        self._selected = []
        self._rows = _buffers()
        self._rows_bytes = 0
        self._unsealed.subtract(h.segment for h in held)
        self._lock.check()
        self._log.rotate()
        self._let_go()
        if self._strays:  # the number that they were for is taken
            set_aside = self._quarantine()
            self.report = structs.replace(self.report, set_aside=(*self.report.set_aside, *set_aside))

    def close(self) -> None:
        """Seal what can be sealed and close the log. Calling it again does nothing."""
        if self._log.closed:
            return
        self.sync()
        self.seal()
        self._log.close()

    # --- within

    def _let_go(self) -> None:
        """Put on disk where this writer stands, then drop the log segments that nothing needs any more."""
        segments = self._log.segments()
        spare = list(takewhile(lambda segment: self._unsealed[segment] <= 0, segments[:-1]))
        self._note(self._log.names()[len(spare) :])
        self._lock.check()
        for segment in spare:
            self._log.drop(segment)

    def _note(self, segments: tuple[str, ...]) -> None:
        """`_write_head`; on an error the log takes nothing more, as nobody would know of its segment."""
        try:
            self._write_head(segments)
        except BaseException as error:
            self._log.refuse(f"the head could not be written ({type(error).__name__})")
            raise

    def _write_head(self, segments: tuple[str, ...]) -> None:
        """Put on disk what the next writer will find: these log segments, and the manifest as it is."""
        count = len(self._manifest.entries)
        newest = self._manifest.sha256_of(count)
        head = Head(self._lock.epoch, self._term, segments, count, newest)
        write_head(self._manifest.directory, head, self._files)

    def _quarantine(self) -> list[str]:
        """Move strays aside; those that have to wait are in `_strays`. Returns what was moved, in words."""
        found = quarantine_strays(self._root, SHARD_DIRS, self._manifest, self._files)
        self._strays = [stray for stray in found if not stray.moved_to]
        return [f"{stray.path} -> {stray.moved_to}" for stray in found if stray.moved_to]

    def _require_known(self, strays: list[Stray]) -> None:
        """What a crash before a commit left is in the log, too. If it is not, though the log is whole, that
        commit was made, and its entry is gone: raises RunDirError naming it."""
        if self._log.damage:
            return  # what is not there any more is reported, and done again
        for stray in strays:
            if not all(map(self.has, self._dialogues_in(stray.path))):
                entry = self._manifest.path_of(len(self._manifest.entries) + 1)
                raise missing_entry(entry, f", though {stray.path} holds dialogues that are not in the log")

    def _dialogues_in(self, path: str) -> list[int]:
        """The dialogues in a shard that no commit names; none if it has no dialogues or cannot be read."""
        if not (path.startswith("dialogues/") and path.endswith(".parquet")):
            return []
        try:
            rows = shard_rows(self._root, Shard(path, 0, 0, "", "dialogues"), ("number",))
            return [row["number"] for row in rows]
        except RunDirError:
            return []

    def _recall_sealed(self) -> int:
        self._cell_funnels: dict[int, Funnel] = {}
        for entry in self._manifest.entries:
            facts = entry.data_as(Sealed)
            for index in facts.cells:
                self._sealed_cells[index] = 1
            for culture, counts in facts.funnels.items():
                funnels.add(self.funnels[culture], counts)
        for index in np.flatnonzero(np.frombuffer(self._sealed_cells, dtype=np.uint8)):
            cell = self._plan.cell(int(index))
            self._next_place[cell.culture] = max(self._next_place[cell.culture], cell.place + 1)
        for culture, sample_id, vector in kept_vectors(self._root, self._manifest):
            self._kept[culture].add(sample_id, vector)
        return int(np.frombuffer(self._sealed_cells, dtype=np.uint8).sum())

    def _recall_log(self) -> int:
        count = 0
        for entry in self._log.replay():
            record = decode_head(entry.payload)
            if not 0 <= record.number < len(self._plan):
                what = f"the log holds dialogue {record.number}, which the plan does not have."
                raise RunDirError(str(self._root / "log"), what, "This log belongs to another run.")
            if self.has(record.number):
                continue
            if isinstance(record, Outcome):
                self._hold(record, entry.segment)
                count += 1
            else:
                self._goes_on(record, entry.segment)
        self._select_ready()
        return count

    def _hold(self, outcome: Outcome, segment: int) -> None:
        index = self._plan.cell_of(outcome.number)
        held = self._open.setdefault(index, {})
        held[outcome.number] = _Held(outcome, segment)
        self._unsealed[segment] += 1
        if begun := self._begun.pop(outcome.number, None):
            self._unsealed[begun.segment] -= 1
            self.underway.subtract(funnels.of_usage(begun.usage))
        counts = funnels.of_outcome(outcome)
        funnels.add(self._cell_funnels.setdefault(index, Counter()), counts)
        cell = self._plan.cell(index)
        funnels.add(self.funnels[cell.culture], counts)
        if len(held) == cell.size:
            self._ready[cell.culture, cell.place] = index

    def _select_ready(self) -> None:
        """Select whole cells, each culture's in their order."""
        for culture in self._next_place:
            while (index := self._ready.pop((culture, self._next_place[culture]), None)) is not None:
                self._select(self._plan.cell(index))
                self._next_place[culture] += 1

    def _select(self, cell: Cell) -> None:
        held = [self._open[cell.index][n] for n in range(cell.first, cell.first + cell.size)]
        outcomes = [one.outcome for one in held if one.outcome is not None]
        settings = self._run.settings.refine
        candidates: list[Candidate] = []
        vectors: list[Any] = []
        for outcome in outcomes:
            stances = self._plan.brief(outcome.number).stances if outcome.opinions else ()
            for opinion in outcome.opinions:
                if opinion.rejected:
                    continue
                stance = stances[opinion.speaker]
                group = (stance.side or stance.code if stance else None, opinion.verdict)
                candidates.append(Candidate(opinion.id, opinion.text, group))
                vectors.append(np.frombuffer(opinion.vector, dtype=np.float32))
        choices = select(
            candidates,
            np.array(vectors, dtype=np.float32),
            self._kept[cell.culture],
            near_duplicate=settings.near_duplicate,
            clusters=settings.clusters,
            keep_longest=settings.faults.keep_longest,
        )
        by_id = dict(zip((c.id for c in candidates), choices, strict=True))
        counts = funnels.of_choices(choices)
        funnels.add(self.funnels[cell.culture], counts)
        funnels.add(self._cell_funnels[cell.index], counts)
        for outcome in outcomes:
            self._add_rows(outcome, by_id)
        for one in held:
            one.outcome = None
        self._selected.append(cell.index)

    def _add_rows(self, outcome: Outcome, choices: dict[str, Choice]) -> None:
        brief, facts = self._plan.brief(outcome.number), self._facts
        about = about_of(brief, facts)
        self._rows["dialogues"].add(dialogue_row(brief, outcome, about))
        for opinion in outcome.opinions:
            row = opinion_row(brief, opinion, choices.get(opinion.id), about, facts, self._plan.cultures)
            self._rows["samples" if row["kept"] else "rejected"].add(row)
            self._rows_bytes += 1500 + 3 * len(opinion.text) + len(opinion.vector)
        self._rows_bytes += 600 + sum(150 + len(turn.text) for turn in outcome.turns)


def _buffers() -> dict[str, RowBuffer]:
    return {kind: RowBuffer(DIALOGUES if kind == "dialogues" else OPINIONS) for kind in SHARD_DIRS}
