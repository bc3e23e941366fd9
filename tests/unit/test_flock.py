"""Lock files: exclusive, shared, waited for, asked about, inherited by a child, gone with the last holder."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from culturepark import flock


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = flock.open_file(path), flock.open_file(path)
    assert not flock.is_held(path)
    assert flock.try_acquire(first)
    assert flock.try_acquire(first)  # it has it already
    assert flock.is_held(path)
    assert not flock.try_acquire(second)
    assert not flock.try_acquire(second, shared=True)
    os.close(first)
    assert not flock.is_held(path)
    assert flock.try_acquire(second)
    os.close(second)


def test_shared_holders_stand_beside_each_other_and_exclude_an_exclusive_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second, third = (flock.open_file(path) for _ in range(3))
    assert flock.try_acquire(first, shared=True)
    assert flock.try_acquire(second, shared=True)
    assert not flock.try_acquire(third)
    assert not flock.is_held(path)  # by none that writes
    for fd in (first, second, third):
        os.close(fd)


def test_acquire_waits_for_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder, waiting = flock.open_file(path), flock.open_file(path)
    flock.acquire(holder)
    acquired = threading.Event()

    def wait() -> None:
        flock.acquire(waiting)
        acquired.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert not acquired.wait(0.05)
    os.close(holder)
    assert acquired.wait(10)
    thread.join()
    assert flock.is_held(path)
    os.close(waiting)


def test_a_child_that_inherited_the_descriptor_keeps_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fd = flock.open_file(path)
    flock.acquire(fd)
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(fd,), start_new_session=True
    )
    os.close(fd)  # ours; the child has its own
    assert flock.is_held(path)
    child.communicate(b"\n", timeout=30)
    assert not flock.is_held(path)


def test_a_child_inherits_nothing_unasked(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fd = flock.open_file(path)
    flock.acquire(fd)
    code = "print('here', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline()  # until its exec it has copies of all descriptors
        os.close(fd)
        assert not flock.is_held(path)
        child.communicate(b"\n", timeout=30)


def test_what_is_not_there_is_not_held_and_not_made_by_asking(tmp_path: Path) -> None:
    assert not flock.is_held(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_made_with_its_mode_and_a_link_is_refused(tmp_path: Path) -> None:
    os.close(flock.open_file(tmp_path / "lock", 0o600))
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
    (tmp_path / "alias").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        flock.open_file(tmp_path / "alias")
    assert not (tmp_path / "elsewhere").exists()
