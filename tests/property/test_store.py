"""Whatever happens to the log, in whatever order: what was acknowledged is there, nothing is invented."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from culturepark.errors import RunDirError
from culturepark.store.segments import SEGMENT_HEADER, Damage, LogEntry, replay, scan
from culturepark.store.wal import Log
from tests.faults import Crash, FaultyFiles

PAYLOAD = st.binary(max_size=60)
CRASHES = st.tuples(
    st.booleans(),  # the power, or only the process
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 2**32),
)


class LogMachine(RuleBasedStateMachine):
    """The log against a list of (segment, payload) that must be there and a list that may be."""

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.directory = self.root / "log"
        self.files = FaultyFiles(self.root)
        self.log = Log.open(self.directory, self.files)
        self.must: list[tuple[int, bytes]] = []
        self.may: list[bytes] = []
        self.failed = False

    def teardown(self) -> None:
        self.files.kill()
        shutil.rmtree(self.root)

    healthy = precondition(lambda self: not self.failed)

    @healthy
    @rule(payload=PAYLOAD)
    def append(self, payload: bytes) -> None:
        self.log.append(payload)
        self.may.append(payload)

    @healthy
    @rule()
    def sync(self) -> None:
        segment = self.log.segment
        self.log.sync()
        self.acknowledge(segment)

    @healthy
    @rule()
    def rotate(self) -> None:
        self.acknowledge(self.log.rotate())

    @precondition(lambda self: not self.failed and len(self.log.segments()) > 1)
    @rule()
    def drop(self) -> None:
        oldest = self.log.segments()[0]
        self.log.drop(oldest)
        self.must = [item for item in self.must if item[0] != oldest]

    @healthy
    @rule(
        call=st.sampled_from(
            ["write", "fsync", "fsync_dir", "link", "create", "append_to", "close", "remove"]
        ),
        code=st.sampled_from([errno.EIO, errno.ENOSPC]),
    )
    def disk_fails(self, call: str, code: int) -> None:
        self.files.fail(call, code)
        segment = self.log.segment
        try:
            self.log.rotate()
            self.acknowledge(segment)
        except RunDirError:
            self.failed = True
        self.files.heal()

    @precondition(lambda self: self.failed)
    @rule(payload=PAYLOAD)
    def refuses_after_failure(self, payload: bytes) -> None:
        for act in (self.log.sync, self.log.rotate, lambda: self.log.append(payload)):
            with pytest.raises(RunDirError):
                act()

    @healthy
    @rule(at=st.integers(0, 9), rotate=st.booleans(), crash=CRASHES)
    def crash_while_writing(self, at: int, rotate: bool, crash: tuple[bool, float, bool, int]) -> None:
        self.files.crash_at(at)
        segment = self.log.segment
        try:
            if rotate:
                self.log.rotate()
            else:
                self.log.sync()
            self.acknowledge(segment)
        except Crash:
            pass
        self.end(crash)
        self.reopen(holes=crash[0] and crash[2])

    @rule(at=st.integers(0, 12), crash=CRASHES, then=CRASHES)
    def crash_and_crash_in_recovery(
        self, at: int, crash: tuple[bool, float, bool, int], then: tuple[bool, float, bool, int]
    ) -> None:
        self.end(crash)
        self.files.crash_at(at)
        try:
            Log.open(self.directory, self.files)
        except Crash:
            self.end(then)
        self.files.kill()
        self.reopen(holes=(crash[0] and crash[2]) or (then[0] and then[2]))

    @invariant()
    def what_was_acknowledged_is_there(self) -> None:
        seen = [(entry.segment, entry.payload) for entry in replay(self.directory)]
        assert seen[: len(self.must)] == self.must

    def acknowledge(self, segment: int) -> None:
        self.must += [(segment, payload) for payload in self.may]
        self.may.clear()

    def end(self, crash: tuple[bool, float, bool, int]) -> None:
        power, keep, holes, seed = crash
        if power:
            self.files.power_loss(Random(seed), keep, holes)
        else:
            self.files.kill()

    def reopen(self, holes: bool) -> None:
        self.log = Log.open(self.directory, self.files)
        self.failed = False
        seen = [(entry.segment, entry.payload) for entry in replay(self.directory)]
        assert seen[: len(self.must)] == self.must
        extra = [payload for _, payload in seen[len(self.must) :]]
        if holes:  # blocks reach the medium in any order: a later record may outlive an earlier one
            sent = iter(self.may)
            assert all(payload in sent for payload in extra)
        else:
            assert extra == self.may[: len(extra)]
        assert not [item for item in scan(self.directory) if isinstance(item, Damage)]
        # What is served after recovery has been promised: from here on it must stay.
        self.must, self.may = seen, []


TestLog = LogMachine.TestCase
TestLog.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    payloads=st.lists(PAYLOAD, max_size=8),
    damage=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 80),
)
def test_any_damage_is_accounted_for_byte_by_byte(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], damage: list[tuple[int, int]], cut: int
) -> None:
    root = tmp_path_factory.mktemp("run")
    log = Log.open(root / "log", FaultyFiles(root))
    for payload in payloads:
        log.append(payload)
    log.close()
    segment = root / "log" / "000001-0001.wal"
    content = bytearray(segment.read_bytes())
    for at, mask in damage:
        content[at % len(content)] ^= mask
    del content[max(0, len(content) - cut) :]
    segment.write_bytes(content)
    items = list(scan(root / "log"))
    # Records served and damage named cover the file without gap or overlap, and no record is invented.
    at = 0 if items and isinstance(items[0], Damage) and items[0].offset == 0 else len(SEGMENT_HEADER)
    for item in items:
        assert item.offset == at
        at += item.bytes if isinstance(item, Damage) else 8 + len(item.payload)
    assert at == len(content)
    sent = iter(payloads)
    served = [item.payload for item in items if isinstance(item, LogEntry)]
    assert all(payload in sent for payload in served)
    recovered = Log.open(root / "log", FaultyFiles(root))
    for found in recovered.damage:
        if found.bytes:
            assert (root / found.saved).read_bytes() == content[found.offset : found.offset + found.bytes]
    assert list(replay(root / "log")) == [item for item in scan(root / "log") if isinstance(item, LogEntry)]
    assert [entry.payload for entry in replay(root / "log")] == served
