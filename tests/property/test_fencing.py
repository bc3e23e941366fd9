"""A writer that was replaced and has not noticed yet: nothing of its successor's is lost, at any moment.

Locks do not reach the other machine here, as on some network file systems: the epoch alone keeps them apart.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from culturepark.errors import RunDirError
from culturepark.messages import Outcome, encode
from culturepark.store.files import RealFiles
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.rundir import Run
from tests import builders
from tests.property.test_ledger import said, settings_of
from tests.property.test_recovery import rows_of

LAST = 19
"""A dialogue that is under way and ends last, so that its cell stays open."""


class Interrupted(RealFiles):
    """A disk that lets another writer in before one of its operations."""

    def __init__(self) -> None:
        self.left = -1
        self.guest: Callable[[], None] = lambda: None

    def __getattribute__(self, name: str) -> Any:
        if name in {*vars(RealFiles)} - {"fsync", "close"} and not name.startswith("_"):
            self.left -= 1
            if self.left == 0:
                try:
                    self.guest()
                except RunDirError as error:  # or it would be taken for the interrupted one's
                    raise AssertionError("the successor is not let in") from error
        return super().__getattribute__(name)

    def fsync(self, fd: int) -> None:
        """No power is lost here."""

    def fsync_dir(self, path: Path) -> None:
        """The same."""


QUICK = Interrupted()


class Writer:
    """A process that holds the run, as it believes; and what it was promised."""

    def __init__(self, run: Run, term: int, files: RealFiles = QUICK, lock: RunLock | None = None) -> None:
        self.outcomes = builders.outcomes(run.plan)
        self.term = term
        self.kept: set[int] = set()
        self.turns = 0
        self.ledger = Ledger(run, lock or RunLock.acquire(run.root, files=files), files)
        begun = {one.number: len(one.turns) for one in self.ledger.begin(term)}
        self.spoken = begun.get(LAST, 0)

    def ends(self, *numbers: int) -> None:
        """These dialogues end, and are acknowledged."""
        for number in numbers:
            self.ledger.append(encode(self.outcomes[number]))
        self.kept.update(self.ledger.sync())

    def speaks(self) -> None:
        """Another turn, which is acknowledged."""
        self.ledger.append(said(LAST, self.spoken + 1, self.term, f"of term {self.term}"))
        self.ledger.sync()
        self.spoken += 1

    def owed(self) -> list[int]:
        """What has not ended, as it knows; the last one apart."""
        return [number for number in range(LAST) if not self.ledger.has(number)]


@pytest.fixture(autouse=True)
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(fd: int, how: int) -> None:
        """The other machine's is not seen."""

    monkeypatch.setattr(fcntl, "flock", lock)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        run = builders.run_in(Path(folder) / "run", settings_of())
        writer = Writer(run, 1)
        writer.ends(*range(LAST + 1))
        writer.ledger.close()
        return rows_of(run.root)


def interrupted(tmp_path: Path, act: Callable[[Run, Interrupted, Callable[[], None]], None]) -> Iterator[Run]:
    """Runs in which `act` is let in upon before its first operation, its second, and so on to its last."""
    for at in range(1, 1000):
        run = builders.run_in(tmp_path / f"run-{at}", settings_of(shard_dialogues=4))
        files = Interrupted()

        def begin(files: Interrupted = files, at: int = at) -> None:
            files.left = at

        act(run, files, begin)
        yield run
        if files.left > 0:
            return


def assert_kept(run: Run, kept: set[int], last: Writer, expected: dict[str, list[dict[str, Any]]]) -> None:
    """The next writer knows all that was acknowledged, and ends the run as an undisturbed one."""
    after = Writer(run, 99)
    assert kept <= {number for number in range(LAST + 1) if after.ledger.has(number)}
    (begun,) = after.ledger.in_progress([LAST])
    assert [turn.number for turn in begun.turns] == list(range(1, last.spoken + 1))
    assert {turn.text for turn in begun.turns[-2:]} == {f"of term {last.term}"}
    after.ends(*range(LAST + 1))
    after.ledger.close()
    found = rows_of(run.root)
    for kind, rows in expected.items():
        assert found[kind] == rows


def stops(act: Callable[[], None]) -> None:
    """A commit that the replaced writer may have made first: then this is a clean stop."""
    error: RunDirError | None = None
    try:
        act()
    except RunDirError as caught:
        error = caught
    assert error is None or "another process has committed" in error.what


@pytest.mark.parametrize("seals_too", [False, True])
@pytest.mark.parametrize("under_way", [False, True])
def test_a_successor_comes_at_any_moment_of_a_seal(
    tmp_path: Path, undisturbed: dict[str, list[dict[str, Any]]], seals_too: bool, under_way: bool
) -> None:
    steps = 0
    writers: list[Writer] = []

    def act(run: Run, files: Interrupted, begin: Callable[[], None]) -> None:
        writers.clear()
        old = Writer(run, 1, files)
        if under_way:  # a dialogue that keeps the first segment of the log
            old.speaks()
        old.ends(0, 2)

        def successor() -> None:
            new = Writer(run, 2)
            writers.append(new)
            new.speaks()
            new.ends(new.owed()[-1])
            new.speaks()

        files.guest = successor
        begin()
        try:
            old.ends(1, 3, 4, 5)  # enough to seal
            old.ends(6, 7, 8, 9)
        except RunDirError:
            pass
        writers.append(old)

    for run in interrupted(tmp_path, act):
        steps += 1
        if len(writers) == 1:
            continue  # no other one came
        new, old = writers
        new.speaks()
        new.ends(new.owed()[-1])
        if seals_too:
            stops(lambda new=new: new.ends(*new.owed()))
        assert_kept(run, old.kept | new.kept, new, undisturbed)
    assert steps > 30


def test_a_successor_comes_at_any_moment_of_an_opening(
    tmp_path: Path, undisturbed: dict[str, list[dict[str, Any]]]
) -> None:
    steps = 0
    writers: list[Writer] = []

    def act(run: Run, files: Interrupted, begin: Callable[[], None]) -> None:
        writers.clear()
        first = Writer(run, 1)
        first.speaks()
        first.ends(0, 2, 9)
        first.ends(1, 3, 4, 5)
        first.ends(11)

        def successor() -> None:
            new = Writer(run, 3)
            writers.append(new)
            new.speaks()
            new.ends(12)
            new.speaks()

        files.guest = successor
        lock = RunLock.acquire(run.root, files=QUICK)
        begin()
        try:
            late = Writer(run, 2, files, lock)
            late.speaks()
            late.ends(13)
        except RunDirError:
            pass

    for run in interrupted(tmp_path, act):
        steps += 1
        if writers:
            new = writers[0]
            new.speaks()
            new.ends(*new.owed()[:6])
            assert_kept(run, {0, 1, 2, 3, 4, 5, 9, 11} | new.kept, new, undisturbed)
    assert steps > 20


def test_what_a_late_writer_leaves_is_no_part_of_the_run(tmp_path: Path) -> None:
    """It wrote and synced, and only then learned that it had been replaced: none of it was acknowledged."""
    run = builders.run_in(tmp_path / "run", settings_of())
    old, new = Writer(run, 1), Writer(run, 2)
    old.ledger.append(said(LAST, 1, 1, "late"))
    with pytest.raises(RunDirError, match="no longer the writer"):
        old.ledger.sync()
    new.speaks()
    (begun,) = Writer(run, 3).ledger.in_progress([LAST])
    assert [turn.text for turn in begun.turns] == ["of term 2"]
    assert isinstance(old.outcomes[0], Outcome)
