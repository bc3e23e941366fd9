"""One writer: the second is refused by name, a dead one leaves nothing, an old one is fenced off."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import pytest

from culturepark.errors import RunDirError
from culturepark.store.lock import RunLock, being_written
from tests.faults import Crash, FaultyFiles


def hold(path: Path, ready: Connection) -> None:
    RunLock.acquire(path)
    ready.send(os.getpid())
    ready.recv()


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, there))
    process.start()
    pid = here.recv()
    try:
        with pytest.raises(RunDirError, match=f"process {pid} on {socket.gethostname()}, since 20"):
            RunLock.acquire(tmp_path)
    finally:
        process.kill()
        process.join()
    with RunLock.acquire(tmp_path) as lock:
        assert lock.epoch == 2
        lock.check()


def test_waiting_for_a_writer_that_is_just_ending(tmp_path: Path) -> None:
    first = RunLock.acquire(tmp_path)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            first.release()

    with RunLock.acquire(tmp_path, wait_s=1, sleep=sleep) as second:
        assert second.epoch == 2
        assert len(naps) == 3
        naps.clear()
        with pytest.raises(RunDirError, match="another run is writing here"):
            RunLock.acquire(tmp_path, wait_s=0.5, sleep=naps.append)
        assert sum(naps) == pytest.approx(0.5)


def test_each_writer_has_a_higher_epoch_and_the_older_stops(tmp_path: Path) -> None:
    old = RunLock.acquire(tmp_path)
    (tmp_path / "lock").unlink()  # as if the file system did not hold locks across machines
    new = RunLock.acquire(tmp_path)
    new.check()
    with pytest.raises(RunDirError, match="no longer the writer"):
        old.check()
    new.release()
    new.release()
    with pytest.raises(RunDirError):
        new.check()
    with RunLock.acquire(tmp_path) as third:
        assert (old.epoch, new.epoch, third.epoch) == (1, 2, 3)


def test_a_race_for_an_epoch_gives_two_different_ones(tmp_path: Path) -> None:
    class Slow(FaultyFiles):
        def link(self, source: Path, target: Path) -> None:
            if target.name == "000001":  # another machine comes between the listing and the taking
                target.write_text("{}")
            super().link(source, target)

    assert RunLock.acquire(tmp_path, files=Slow(tmp_path)).epoch == 2


def test_a_link_to_the_run_directory_leads_to_the_same_lock(tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    with RunLock.acquire(tmp_path / "alias") as lock:
        assert lock.root == tmp_path / "run"
        with pytest.raises(RunDirError, match="another run is writing here"):
            RunLock.acquire(tmp_path / "run")
        (tmp_path / "alias").unlink()
        (tmp_path / "alias").symlink_to(tmp_path)  # turned elsewhere: this writer stays where it is
        lock.check()


def test_a_removed_run_directory_is_noticed(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "gone")
    with pytest.raises(RunDirError):
        lock.check()
    lock.release()


def test_an_epoch_is_never_given_twice_whatever_the_power_does(tmp_path: Path) -> None:
    random = Random(1)
    files = FaultyFiles(tmp_path)
    given: list[int] = []
    for step in range(80):
        files.crash_at(step % 13)
        try:
            lock = RunLock.acquire(tmp_path, files=files)
            given.append(lock.epoch)
            lock.release()
        except Crash:
            pass
        files.power_loss(random, keep=step % 3 / 2)
    assert len(given) >= 10
    assert given == sorted({*given})


def test_a_lock_file_with_rubbish_inside_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\xff{not json")
    with RunLock.acquire(tmp_path):
        (tmp_path / "lock").write_bytes(b"")
        with pytest.raises(RunDirError, match="has only begun"):
            RunLock.acquire(tmp_path)


def test_a_lock_that_cannot_be_asked_for_counts_as_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not being_written(tmp_path)
    with RunLock.acquire(tmp_path):
        assert being_written(tmp_path)
    assert not being_written(tmp_path)

    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert being_written(tmp_path)
