"""The ledger: what every planned dialogue came to, durable and exactly once.

Outcomes go to the write-ahead log first; once synced they are acknowledged and never lost. So do the turns
and the refinement's calls of dialogues under way, each before what follows from it is begun. Outcomes are
held in their cells (`culturepark.store.cells`) until there are rows enough for shards; shards and the
manifest entry that names them are one commit, after which the log segments that held those outcomes are
dropped.

The order of a commit: shards, manifest entry, a new log segment, head; then the old segments are deleted.
Before anything is acknowledged, committed or deleted, the writer checks that its epoch (fencing token) is
the newest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path

import msgspec
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
from culturepark.store import funnel as funnels
from culturepark.store.cells import Cells, Sealed
from culturepark.store.files import REAL, Files
from culturepark.store.funnel import Funnel
from culturepark.store.head import Head, read_head, remove_older_heads, write_head
from culturepark.store.integrity import require_all
from culturepark.store.lock import RunLock
from culturepark.store.manifest import Manifest, Shard, missing_entry
from culturepark.store.readers import kept_vectors, shard_rows
from culturepark.store.rundir import SHARD_DIRS, Run
from culturepark.store.segments import list_segments
from culturepark.store.shards import Stray, commit_table, quarantine_strays, shard_path
from culturepark.store.wal import Log
from culturepark.usage import UsageByRole, add

_SEGMENT_BYTES = 64 << 20
"""Length in bytes from which a log segment is finished and another begun."""


class Recovery(Struct, frozen=True):
    """What opening a ledger found: sealed cells, outcomes read back from the log, and what was set aside."""

    sealed: int
    replayed: int
    set_aside: tuple[str, ...]


class _Underway(Struct):
    """A dialogue under way: how far it has come, and the first log segment that holds some of it."""

    segment: int
    turns: int = 0
    calls: set[bytes] = msgspec.field(default_factory=set[bytes])
    usage: UsageByRole = {}


class Ledger:
    """The only writer of a run directory. `lock` proves it."""

    def __init__(self, run: Run, lock: RunLock, files: Files = REAL) -> None:
        """Recover what earlier writers left, and begin where they ended. Raises RunDirError if something is
        missing or damaged that cannot be done again."""
        self._run = run
        self._plan = run.plan
        self._root: Path = run.root
        self._lock = lock
        self._files = files
        self._manifest = Manifest.open(self._root / "manifest", lock.epoch, files)
        head = read_head(self._manifest.directory)
        require_all(self._root, self._manifest, head)
        self._strays: list[Stray] = []
        set_aside = self._quarantine()
        self._cells = Cells(run)
        self._in_progress: dict[int, _Underway] = {}
        self.underway: Funnel = Counter()
        """Usage, as funnels count it, of dialogues that have begun and not ended."""
        self._term = head.term if head else None
        self._needed = Counter[int]()  # by log segment: what in it is neither sealed nor ended
        self._unsynced: list[tuple[int, Outcome]] = []
        self._pending: set[int] = set()
        facts = (entry.data_as(Sealed) for entry in self._manifest.entries)
        sealed = self._cells.recall(facts, kept_vectors(self._root, self._manifest))
        segments = head.segments if head else tuple(list_segments(self._root / "log"))
        if head is None:  # before the first segment with an epoch, so that a missing head is known as such
            self._write_head(segments)
        self._log = Log.open(self._root / "log", files, lock.epoch, segments)
        replayed = self._replay_log()
        self._require_known(self._strays)
        self._drop_spare()
        remove_older_heads(self._manifest.directory, lock.epoch, files)
        self._log.remove_replaced()
        self.report = Recovery(sealed, replayed, (*set_aside, *(str(d) for d in self._log.damage)))

    # --- what is known

    def has(self, number: int) -> bool:
        """Whether this dialogue's outcome is here."""
        return self._cells.has(number)

    def done(self) -> bytes:
        """One bit a dialogue of the plan, set for those that have ended."""
        return self._cells.done()

    @property
    def funnels(self) -> dict[str, Funnel]:
        """Counts by culture, of everything that is durable."""
        return self._cells.funnels

    @property
    def waiting(self) -> int:
        """Outcomes held in memory, and rows of dialogues."""
        return self._cells.waiting

    def spent(self) -> UsageByRole:
        """The usage of all calls that are on disk, by role."""
        total: Funnel = Counter(self.underway)
        for funnel in self.funnels.values():
            funnels.add(total, funnel)
        return funnels.usage_of(total)

    # --- records

    def begin(self, term: int) -> list[InProgress]:
        """What is on disk of dialogues that have not ended.

        From now on only turns of this term (the moderator's incarnation number) count, so that no
        conductor's turns follow on another's. The term is durable when this returns.
        """
        self._term = term
        self._advance_head(self._log.names())
        self._lock.check()
        return self.in_progress(set(self._in_progress))

    def in_progress(self, numbers: Collection[int]) -> list[InProgress]:
        """What is on disk of these dialogues, as far as they have not ended; read from the log."""
        turns: dict[int, list[Turn]] = {n: [] for n in sorted(numbers) if n in self._in_progress}
        steps: dict[int, dict[bytes, Step]] = {n: {} for n in turns}
        for logged in self._log.replay():
            head = decode_head(logged.payload)
            if head.number not in turns:
                continue
            record = decode_record(logged.payload)
            if isinstance(record, Spoke) and record.turn.number == len(turns[record.number]) + 1:
                turns[record.number].append(record.turn)
            elif isinstance(record, Step):
                steps[record.number][record.key] = record
        return [InProgress(n, tuple(said), tuple(steps[n].values())) for n, said in turns.items()]

    def append(self, raw: bytes) -> Outcome | None:
        """Add an encoded record to the next `sync`; returns it if it is an outcome, and its dialogue's first.

        What is known already, and what comes of a dialogue that has ended, is dropped (idempotent). Raises
        RunDirError for a turn before the first `begin`: it is not known whether it counts.
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
        known = self._in_progress.get(head.number) or _Underway(segment)
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
        known.usage = add(known.usage, {role: usage})
        funnels.add(self.underway, funnels.of_usage({role: usage}))
        if head.number not in self._in_progress:
            self._in_progress[head.number] = known
            self._needed[segment] += 1
        return True

    def sync(self) -> list[int]:
        """Make durable what was appended; returns the numbers that may be acknowledged.

        Cells that are whole now are selected, and shards sealed if there are enough.
        """
        synced, self._unsynced = self._unsynced, []
        self._log.sync()
        self._lock.check()
        self._pending.difference_update(outcome.number for _, outcome in synced)
        for segment, outcome in synced:
            self._hold(outcome, segment)
        self._cells.select_whole()
        if self._cells.full:
            self.seal()
        elif self._log.size_bytes > _SEGMENT_BYTES:
            self._log.rotate()
            self._advance_head(self._log.names())
        return [outcome.number for _, outcome in synced]

    def seal(self) -> None:
        """Write the selected cells as shards and commit them; then drop their log segments."""
        if not self._cells.selected:
            return
        self._lock.check()
        number = len(self._manifest.entries) + 1
        shards = [
            commit_table(self._root, shard_path(kind, number, self._lock.epoch), table, kind, self._files)
            for kind, table in self._cells.tables()
        ]
        self._lock.check()
        self._manifest.append(shards, self._cells.facts())
        self._needed.subtract(self._cells.mark_sealed())
        self._lock.check()
        self._log.rotate()
        self._drop_spare()
        if self._strays:  # the number that they were for is in use now
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

    def _drop_spare(self) -> None:
        """Write the head, then delete the oldest log segments, those that nothing needs any more."""
        segments = self._log.segments()
        spare = list(takewhile(lambda segment: self._needed[segment] <= 0, segments[:-1]))
        self._advance_head(self._log.names()[len(spare) :])
        self._lock.check()
        for segment in spare:
            self._log.drop(segment)

    def _advance_head(self, segments: tuple[str, ...]) -> None:
        """`_write_head`; on an error the log refuses further work: the head may not name its segment."""
        try:
            self._write_head(segments)
        except BaseException as error:
            self._log.refuse(f"the head could not be written ({type(error).__name__})")
            raise

    def _write_head(self, segments: tuple[str, ...]) -> None:
        """Make durable what the next writer has to find: these log segments, and the manifest as it is."""
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
        """Refuse a run that lost its newest manifest entry: raises RunDirError naming the entry.

        What a crash before a commit left in `strays` is in the log, too. If it is not, though the log is
        whole, the commit was made and the log segments were dropped.
        """
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

    def _replay_log(self) -> int:
        count = 0
        for logged in self._log.replay():
            record = decode_head(logged.payload)
            if not 0 <= record.number < len(self._plan):
                what = f"the log holds dialogue {record.number}, which the plan does not have."
                raise RunDirError(str(self._root / "log"), what, "This log belongs to another run.")
            if self.has(record.number):
                continue
            if isinstance(record, Outcome):
                self._hold(record, logged.segment)
                count += 1
            else:
                self._goes_on(record, logged.segment)
        self._cells.select_whole()
        return count

    def _hold(self, outcome: Outcome, segment: int) -> None:
        self._cells.add(outcome, segment)
        self._needed[segment] += 1
        if known := self._in_progress.pop(outcome.number, None):
            self._needed[known.segment] -= 1
            self.underway.subtract(funnels.of_usage(known.usage))
