"""Each file and each directory of a run is deleted in turn: it is named, or nothing is amiss."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from culturepark.errors import CultureParkError, RunDirError
from culturepark.messages import Step, encode
from culturepark.store import ledger as ledger_module
from culturepark.store.audit import check_run
from culturepark.store.head import head_path, read_head
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.rundir import open_run
from culturepark.store.segments import list_segments, segment_of
from culturepark.usage import Usage
from tests import builders
from tests.property.test_ledger import said, settings_of
from tests.property.test_recovery import rows_of

HARMLESS = {"lock", "epochs", "epochs/000001", "epochs/000002", "epochs/000003", "orphans"}
"""What a start makes anew, and loses nothing by it."""
OF = settings_of(shard_dialogues=4)


@pytest.fixture(scope="module", autouse=True)
def many_small_segments() -> Iterator[None]:
    with mock.patch.object(ledger_module, "_SEGMENT_BYTES", 1500):
        yield


def test_damage_beside_what_a_killed_commit_left_is_reported_and_done_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run = builders.run_in(root, OF)
    lock = RunLock.acquire(root)
    ledger = Ledger(run, lock)
    ledger.begin(7)
    for outcome in builders.outcomes(run.plan):
        ledger.append(encode(outcome))
    with (
        mock.patch.object(ledger_module.Manifest, "append", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        ledger.sync()
    lock.release()
    assert list((root / "dialogues").glob("*.parquet"))
    segment = sorted((root / "log").glob("*.wal"))[-1]
    content = bytearray(segment.read_bytes())
    content[200] ^= 1
    segment.write_bytes(content)
    with RunLock.acquire(root) as lock:
        ledger = Ledger(run, lock)
        assert any("damaged" in one for one in ledger.report.set_aside)
        for outcome in builders.outcomes(run.plan):
            ledger.append(encode(outcome))
        ledger.close()
    assert [one for one in check_run(root).problems if "summary" not in one] == []


def halfway(root: Path, under_way: bool = True) -> Path:
    """A run whose collector was killed twice: commits, dialogues that ended since, and, if wanted, two that
    are under way, which keep what is old in the log."""
    run = builders.run_in(root, OF)
    outcomes = builders.outcomes(run.plan)
    for first in (0, 8, 16):
        lock = RunLock.acquire(root)
        ledger = Ledger(run, lock)
        if not first:
            ledger.begin(7)
        if under_way:
            ledger.append(said(19, 1 + first // 8, 7))
            ledger.append(encode(Step(18, b"key %d" % first, "verifier", Usage(1, 100), "yes")))
        for outcome in outcomes[first : min(first + 8, 18)]:
            ledger.append(encode(outcome))
            ledger.sync()
        lock.release()
    (root / "orphans").mkdir()
    assert len(list((root / "manifest").glob("0*.json"))) > 2
    return root


def as_an_earlier_version_wrote_it(root: Path) -> Path:
    """Without heads, and without epochs in the names of log segments."""
    live = list_segments(root / "log")
    for path in (root / "log").iterdir():
        if path.name in live:
            path.rename(root / "log" / f"{segment_of(path.name)[0]:06d}.wal")
        else:
            path.unlink()
    for path in (root / "manifest").glob("head-*"):
        path.unlink()
    return root


def state(root: Path, begins: bool = True) -> Any:
    """All that the next writer knows, and what it was told was set aside."""
    run = open_run(root, OF, builders.plan(OF))
    with RunLock.acquire(root) as lock:
        ledger = Ledger(run, lock)
        begun = ledger.begin(8) if begins else ledger.in_progress(range(20))
        return ledger.done(), begun, ledger.spent(), ledger.funnels, ledger.report.set_aside


def finished(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of the run once it has gone on to its end."""
    run = open_run(root, OF, builders.plan(OF))
    with RunLock.acquire(root) as lock:
        ledger = Ledger(run, lock)
        for outcome in builders.outcomes(run.plan):
            ledger.append(encode(outcome))
        ledger.close()
    return rows_of(root)


def delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def without(root: Path, name: str, copy: Path) -> Path:
    """A copy of the run in which this is deleted."""
    shutil.copytree(root, copy)
    delete(copy / name)
    return copy


@pytest.mark.parametrize("under_way", [True, False])
def test_everything_is_deleted_in_turn(tmp_path: Path, under_way: bool) -> None:
    root = halfway(tmp_path / "run", under_way)
    before = state(without(root, "lock", tmp_path / "calm"))
    assert bool(before[1]) == under_way
    expected = finished(tmp_path / "calm")
    harmless: set[str] = set()
    refused: dict[str, CultureParkError] = {}
    for number, path in enumerate(sorted(root.rglob("*"))):
        name = path.relative_to(root).as_posix()
        copy = without(root, name, tmp_path / str(number))
        try:
            after = state(copy)
        except CultureParkError as error:
            refused[name] = error
            with pytest.raises(CultureParkError):  # and it stays so: nothing was begun anew
                state(copy)
        else:
            assert after == before, name
            assert finished(copy) == expected
            harmless.add(name)
    for name, error in refused.items():
        assert Path(name).name in f"{error.where}: {error.what}"
        assert error.fix
    assert harmless == HARMLESS


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    root = halfway(tmp_path / "run")
    calm = state(without(root, "lock", tmp_path / "calm"))
    as_an_earlier_version_wrote_it(root)
    assert read_head(root / "manifest") is None
    assert state(root) == calm
    assert state(root, begins=False) == calm  # again, now with a head
    assert finished(root) == finished(tmp_path / "calm")
    assert not [name for name in list_segments(root / "log") if not segment_of(name)[1]]


@pytest.mark.parametrize("what", ["log", "manifest", "manifest/last", "manifest/000001.json", "log/second"])
def test_of_a_run_of_an_earlier_version_less_is_known_to_be_missing(tmp_path: Path, what: str) -> None:
    root = as_an_earlier_version_wrote_it(halfway(tmp_path / "run", under_way=what == "log/second"))
    if what == "manifest/last":
        what = f"manifest/{max(path.name for path in (root / 'manifest').iterdir())}"
    elif what == "log/second":
        what = f"log/{list_segments(root / 'log')[1]}"
    delete(root / what)
    with pytest.raises(RunDirError, match=re.escape(what)):
        state(root)


def test_a_segment_that_is_lost_for_good_may_be_given_up(tmp_path: Path) -> None:
    root = halfway(tmp_path / "run")
    expected = finished(without(root, "lock", tmp_path / "calm"))
    lost = root / "log" / list_segments(root / "log")[0]
    lost.unlink()
    with pytest.raises(RunDirError, match=f"{lost.name}: this log segment is missing") as refused:
        state(root)
    assert "make an empty file of this name" in refused.value.fix
    lost.touch()
    assert any("damaged" in line for line in state(root)[4])
    assert finished(root) == expected


def test_what_is_missing_is_a_problem_of_the_check_too(tmp_path: Path) -> None:
    root = halfway(tmp_path / "run")
    calm = check_run(root).problems
    for number, name in enumerate(("log", f"log/{list_segments(root / 'log')[0]}", "manifest")):
        problems = check_run(without(root, name, tmp_path / str(number))).problems
        assert [line for line in problems if line not in calm and name in line], (name, problems)


def test_a_damaged_head_is_named(tmp_path: Path) -> None:
    root = halfway(tmp_path / "run")
    path = head_path(root / "manifest", 3)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(RunDirError, match="this head is damaged") as caught:
            read_head(root / "manifest")
        assert caught.value.where == str(path)
    for content in (b"", whole[:-9]):
        path.write_bytes(content)
        with pytest.raises(RunDirError, match="this head is damaged"):
            state(root)


def test_the_head_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = halfway(tmp_path / "run")
    monkeypatch.setattr("culturepark.store.head.SCHEMA", 0)
    with pytest.raises(RunDirError, match="has format 1, and this version reads format 0"):
        state(root)


def test_the_epoch_never_begins_anew(tmp_path: Path) -> None:
    root = halfway(tmp_path / "run")
    delete(root / "epochs")
    with RunLock.acquire(root) as lock:
        assert lock.epoch == 4
