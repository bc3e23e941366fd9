"""Log, manifest, shards and recovery together, against a model of a few lines, whatever the disk does.

The records are of every kind that a run writes: turns, calls of a refinement, outcomes. Power fails and
processes die between any two operations of the disk, and in the middle of a write.
"""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec import Struct

from culturepark.dialogue.conductor import Conductor
from culturepark.dialogue.slots import REFINERS
from culturepark.errors import RunDirError
from culturepark.messages import CallFailed, InProgress, Outcome, Spoke, Step, Turn, encode
from culturepark.store import funnel as funnels
from culturepark.store import ledger
from culturepark.store.cells import Sealed
from culturepark.store.integrity import live_segments
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.manifest import Manifest
from culturepark.store.readers import rows
from culturepark.store.rundir import SHARD_DIRS
from culturepark.store.segments import replay
from culturepark.store.shards import verify_shard
from culturepark.usage import Usage
from tests import builders
from tests.faults import Crash, FaultyFiles
from tests.property.test_ledger import settings_of

Record = Outcome | Spoke | Step
CRASH = st.tuples(st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**32))
"""Whether the power fails or only the process ends, how much of what was not synced stays, a seed."""
NUMBER = st.integers(0, 19)
BUSY = st.sampled_from([0, 1, 2, 9, 19])
"""Dialogues of which much is heard."""
KEYS = (b"extract", b"verify", b"embed")


class Known(Struct):
    """What follows from records, in their order, if nothing is ever lost."""

    ended: dict[int, Outcome] = {}
    turns: dict[int, list[Turn]] = {}
    steps: dict[int, dict[bytes, Step]] = {}

    @classmethod
    def of(cls, records: list[Record]) -> Known:
        known = cls()
        for record in records:
            assert known.add(record)
        return known

    def add(self, record: Record) -> bool:
        """Add a record; False if nothing is to follow from it."""
        number = record.number
        if number in self.ended:
            return False
        if isinstance(record, Outcome):
            self.ended[number] = record
            self.turns.pop(number, None)
            self.steps.pop(number, None)
            return True
        turns, steps = self.turns.get(number, []), self.steps.get(number, {})
        if isinstance(record, Spoke):
            if record.turn.number != len(turns) + 1:
                return False
            turns = [*turns, record.turn]
        else:
            if record.key in steps:
                return False
            steps = {**steps, record.key: record}
        self.turns[number], self.steps[number] = turns, steps
        return True

    def begun(self) -> list[InProgress]:
        return [
            InProgress(n, tuple(self.turns[n]), tuple(self.steps[n].values())) for n in sorted(self.turns)
        ]

    def spent(self) -> dict[str, Usage]:
        """What all calls took. An ended dialogue's outcome says it for all of its calls."""
        total: defaultdict[str, Usage] = defaultdict(Usage)
        for outcome in self.ended.values():
            for role, usage in outcome.usage.items():
                total[role] += usage
        for number, turns in self.turns.items():
            for turn in turns:
                total["speaker"] += turn.usage
            for step in self.steps[number].values():
                total[step.role] += step.usage
        return {role: usage for role, usage in total.items() if usage != Usage()}


class RecoveryMachine(RuleBasedStateMachine):
    """A run's writer that dies again and again."""

    @initialize(shard_dialogues=st.sampled_from([1, 4, 2000]))
    def begin(self, shard_dialogues: int) -> None:
        self.small = mock.patch.object(ledger, "_SEGMENT_BYTES", 1000)
        self.small.start()
        self.folder = Path(tempfile.mkdtemp())
        self.run_ = builders.run_in(self.folder / "run", settings_of(shard_dialogues))
        self.outcomes = builders.outcomes(self.run_.plan)
        self.files = FaultyFiles(self.folder)
        self.must: list[Record] = []
        self.may: list[Record] = []
        self.known = Known()
        self.term = 0
        self.open()

    def teardown(self) -> None:
        """Whatever happened, the run can be finished, and its rows are those of an undisturbed one."""
        if not hasattr(self, "ledger"):
            return
        for outcome in self.outcomes:
            self.ledger.append(encode(outcome))
        self.ledger.close()
        self.lock.release()
        self.files.kill()
        self.small.stop()
        if not UNDISTURBED:
            UNDISTURBED.update(undisturbed())
        found = rows_of(self.run_.root)
        for kind in SHARD_DIRS:
            assert found[kind] == UNDISTURBED[kind]
        for culture, planned in self.run_.plan.planned().items():
            assert funnels.problems(self.ledger.funnels[culture], planned, whole=True) == []
        assert not list(replay(self.run_.root / "log", live_segments(self.run_.root)))
        shutil.rmtree(self.folder)

    @rule(number=NUMBER, again=st.booleans())
    def ends(self, number: int, again: bool) -> None:
        self.append(self.outcomes[number])
        if again:
            self.append(self.outcomes[number])

    @rule(first=st.integers(0, 18), count=st.integers(2, 8))
    def several_end(self, first: int, count: int) -> None:
        for outcome in self.outcomes[first : first + count]:
            self.append(outcome)

    @rule(number=BUSY, skipped=st.sampled_from([0, 0, 0, 1]), late=st.sampled_from([0, 0, 0, 1]))
    def speaks(self, number: int, skipped: int, late: int) -> None:
        """The next turn is said; or one too far, or again; or by an actor that is asked no more."""
        turn = len(self.known.turns.get(number, ())) + 1 + skipped
        said = Turn(turn, (turn - 1) % 2, f"turn {turn} of {number}", usage=Usage(1, 10, 0, turn))
        self.append(Spoke(number, self.term - late, said), stale=bool(late))

    @rule(number=BUSY, key=st.sampled_from(KEYS))
    def calls(self, number: int, key: bytes) -> None:
        vectors = b"\0\0\x80?" * 4 if key == b"embed" else b""
        role = {b"extract": "extractor", b"verify": "verifier", b"embed": "embedder"}[key]
        self.append(Step(number, key, role, Usage(1, 100, 0, number), f"{key} {number}", vectors=vectors))

    @rule()
    def sync(self) -> None:
        self.ledger.sync()
        self.acknowledge()

    @rule()
    def seal(self) -> None:
        self.ledger.sync()
        self.acknowledge()
        self.ledger.seal()

    @rule(at=st.integers(0, 40), seal=st.booleans(), crash=CRASH)
    def dies_while_writing(self, at: int, seal: bool, crash: tuple[bool, float, int]) -> None:
        self.files.crash_at(at)
        try:
            self.ledger.sync()
            self.acknowledge()
            if seal:
                self.ledger.seal()
        except Crash:
            pass
        self.reopen(crash)

    @rule(
        call=st.sampled_from(["write", "fsync", "fsync_dir", "link", "create", "remove", "close"]),
        code=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS]),
        after=st.integers(0, 3),
        crash=CRASH,
    )
    def disk_fails(self, call: str, code: int, after: int, crash: tuple[bool, float, int]) -> None:
        self.files.fail(call, code, after)
        try:
            self.ledger.sync()
            self.acknowledge()
            self.ledger.seal()
        except RunDirError:
            self.reopen(crash)
        self.files.heal()

    @rule(crash=CRASH)
    def dies(self, crash: tuple[bool, float, int]) -> None:
        self.reopen(crash)

    @rule(crash=CRASH)
    def the_collector_alone_restarts(self, crash: tuple[bool, float, int]) -> None:
        """The moderator lives on and does not begin again; its turns go on counting."""
        self.end(crash)
        self.open(begin=False)
        self.check_recovered()

    @rule(at=st.integers(0, 40), crash=CRASH, then=CRASH)
    def dies_and_dies_in_recovery(
        self, at: int, crash: tuple[bool, float, int], then: tuple[bool, float, int]
    ) -> None:
        self.end(crash)
        self.files.crash_at(at)
        try:
            self.open()
        except Crash:
            pass
        else:
            self.check_recovered()
        self.reopen(then)

    @invariant()
    def nothing_is_lost_or_invented(self) -> None:
        if not hasattr(self, "ledger"):
            return
        if not any(isinstance(record, Outcome) for record in self.may):  # those count once they are durable
            spent = {role: usage for role, usage in self.ledger.spent().items() if usage != Usage()}
            assert spent == self.known.spent()
        ended = {n for n in range(len(self.outcomes)) if self.ledger.has(n)}
        assert ended == {record.number for record in self.must if isinstance(record, Outcome)}
        assert self.on_disk() <= Counter(dict.fromkeys(self.known.ended, 1))

    # --- the writer

    def append(self, record: Record, stale: bool = False) -> None:
        taken = self.ledger.append(encode(record))
        before = len(self.may)
        if not stale and self.known.add(record):
            self.may.append(record)
        assert (taken is not None) == (len(self.may) > before and isinstance(record, Outcome))

    def acknowledge(self) -> None:
        self.must += self.may
        self.may = []

    def end(self, crash: tuple[bool, float, int]) -> None:
        power, keep, seed = crash
        self.lock.release()
        if power:
            self.files.power_loss(random.Random(seed), keep)
        else:
            self.files.kill()

    def open(self, begin: bool = True) -> None:
        self.lock = RunLock.acquire(self.run_.root, files=self.files)
        try:
            self.ledger = Ledger(self.run_, self.lock, self.files)
        except BaseException:
            self.lock.release()
            raise
        if begin:
            self.term += 1
            self.begun = self.ledger.begin(self.term)
        else:
            self.begun = self.ledger.in_progress(range(len(self.outcomes)))

    def reopen(self, crash: tuple[bool, float, int] = (False, 1.0, 0)) -> None:
        self.end(crash)
        self.open()
        self.check_recovered()

    def check_recovered(self) -> None:
        """It is as if the writer had stopped before one of the records that were not acknowledged."""
        for kept in range(len(self.may), -1, -1):
            known = Known.of([*self.must, *self.may[:kept]])
            if sorted(self.begun, key=lambda b: b.number) == known.begun() and all(
                self.ledger.has(n) == (n in known.ended) for n in range(len(self.outcomes))
            ):
                break
        else:
            raise AssertionError((self.begun, self.must, self.may))
        self.check_conductor()
        # What was served once is promised from now on.
        self.must, self.may, self.known = [*self.must, *self.may[:kept]], [], known
        for entry in Manifest.read(self.run_.root / "manifest").entries:
            assert not [problem for shard in entry.shards for problem in verify_shard(self.run_.root, shard)]
        damage = [line for line in self.ledger.report.set_aside if "->" not in line]
        assert all("damaged tail" in line for line in damage)

    def check_conductor(self) -> None:
        """A conductor that goes on from what was recovered holds nothing that contradicts itself."""
        plan = self.run_.plan
        replicas = dict.fromkeys([*plan.agent_cultures(), REFINERS], 1)
        begun = [one for one in self.begun if len(one.turns) <= plan.utterances_of(one.number)]
        conductor = Conductor(plan, self.run_.settings, self.ledger.done(), self.term, replicas, begun)
        conductor.validate()
        posts = conductor.fill(0.0)
        conductor.validate()
        assert len(posts) == len(self.outcomes) - conductor.progress().ended
        for post in posts:
            conductor.on(CallFailed(post.message.number, self.term, 1, "refused", "no"), 0.0)
            conductor.validate()

    def on_disk(self) -> Counter[int]:
        """How often each dialogue is in the manifest's shards."""
        manifest = Manifest.read(self.run_.root / "manifest")
        found = Counter(row["number"] for row in rows(self.run_.root, manifest, "dialogues", ("number",)))
        assert {self.run_.plan.cell_of(n) for n in found} == {
            index for entry in manifest.entries for index in entry.data_as(Sealed).cells
        }
        return found


UNDISTURBED: dict[str, list[dict[str, Any]]] = {}


def rows_of(root: Path) -> dict[str, list[dict[str, Any]]]:
    manifest = Manifest.read(root / "manifest")
    return {kind: sorted(rows(root, manifest, kind), key=lambda row: row["id"]) for kind in SHARD_DIRS}


def undisturbed() -> dict[str, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        run = builders.run_in(Path(folder) / "run", settings_of())
        with RunLock.acquire(run.root) as lock:
            calm = Ledger(run, lock)
            for outcome in builders.outcomes(run.plan):
                calm.append(encode(outcome))
            calm.close()
        return rows_of(run.root)


TestRecovery = RecoveryMachine.TestCase
TestRecovery.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_every_kind_of_record_survives_at_every_step_of_a_power_loss() -> None:
    """All steps of one short history, one after the other: nothing is left to chance."""
    at, crashed = 0, True
    while crashed:
        machine = RecoveryMachine()
        machine.begin(shard_dialogues=1)
        machine.speaks(9, 0, 0)
        machine.calls(9, b"embed")
        machine.sync()
        machine.speaks(9, 0, 0)
        machine.calls(9, b"verify")
        machine.several_end(0, 4)
        machine.files.crash_at(at)
        try:
            machine.ledger.sync()
            machine.acknowledge()
            crashed = False
        except Crash:
            pass
        machine.reopen((True, 0.0, at))
        machine.nothing_is_lost_or_invented()
        machine.teardown()
        at += 1
    assert at > 20
