"""One writer per run directory: a lock that ends with its process, and an epoch (fencing token)."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import msgspec
from msgspec import Struct

from culturepark import flock
from culturepark.errors import RunDirError
from culturepark.store.files import REAL, Files, disk_error, disk_errors, make_dirs, names_in, write_new
from culturepark.store.head import newest_head_epoch

_POLL_S = 0.1
"""Seconds between two attempts to lock a run directory that another process holds."""


class Holder(Struct, frozen=True):
    """The process that holds a run directory, and since when (UTC)."""

    pid: int
    host: str
    since: str


class RunLock:
    """The right to write to a run directory.

    The lock is the kernel's (`culturepark.flock`): it ends with the process, however that ends, so there is
    no stale lock. Where a network file system does not hold it across machines, the epoch does (fencing
    token): every writer is given the next number, and the older one stops at its next `check`. So: sync, then
    `check`, then acknowledge.
    """

    def __init__(self, root: Path, fd: int, epoch: int) -> None:
        """For `acquire` only."""
        self.root = root
        """The run directory, with symbolic links followed once and for all."""
        self.epoch = epoch
        """The number of this writer (fencing token), higher than that of every earlier writer."""
        self._fd = fd

    @classmethod
    def acquire(
        cls,
        run_dir: Path,
        wait_s: float = 0,
        *,
        files: Files = REAL,
        sleep: Callable[[float], object] = time.sleep,
    ) -> RunLock:
        """Become the writer of `run_dir`, which is made if need be.

        `wait_s` is for a previous writer that is just ending. Raises RunDirError naming the process that
        holds the directory.
        """
        root = run_dir.resolve()
        make_dirs(root, files)
        path = root / "lock"
        fd = _lock(path, root, math.ceil(wait_s / _POLL_S), sleep)
        try:
            me = msgspec.json.encode(
                Holder(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))
            )
            with disk_errors(path):
                os.truncate(fd, 0)
                os.pwrite(fd, me + b"\n", 0)
            return cls(root, fd, _next_epoch(root, me, files))
        except BaseException:
            os.close(fd)
            raise

    def check(self) -> None:
        """Raises RunDirError if another process has become the writer since, or the lock was released."""
        # Listed, not looked up: a network file system may remember for a while that a name was absent.
        newest = _newest_epoch(self.root / "epochs")
        if newest != self.epoch or self._fd < 0:
            raise RunDirError(
                str(self.root),
                f"this process is no longer the writer (its epoch is {self.epoch}, the newest is {newest})",
                "Another process has taken over. Let one process at a time write here.",
            )

    def release(self) -> None:
        """Release the directory. Calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _lock(path: Path, root: Path, polls: int, sleep: Callable[[float], object]) -> int:
    """An open file that holds the lock. Raises RunDirError."""
    while True:
        with disk_errors(path):
            fd = flock.open_file(path)
        try:
            if flock.try_acquire(fd):
                if os.fstat(fd).st_nlink:
                    return fd
                holder = None  # the file was deleted in the meantime, and a lock on it excludes no one
            else:
                holder = os.pread(fd, 4096, 0)
        except OSError as error:
            os.close(fd)
            raise disk_error(path, error) from error
        os.close(fd)
        if holder is None:
            continue
        if polls <= 0:
            raise RunDirError(
                str(root),
                f"another run is writing here: {_describe(holder)}",
                "Wait for it or stop it, or use another run directory.",
            )
        polls -= 1
        sleep(_POLL_S)


def _describe(holder: bytes) -> str:
    try:
        process = msgspec.json.decode(holder, type=Holder)
    except msgspec.MsgspecError:  # it is just writing its name
        return "a process that has only begun"
    return f"process {process.pid} on {process.host}, since {process.since}"


def _next_epoch(root: Path, holder: bytes, files: Files) -> int:
    """Claim the first free number durably. Raises RunDirError."""
    directory = root / "epochs"
    make_dirs(directory, files)
    while True:
        # The heads count too: names carry the epoch, so it never begins anew, even if `epochs/` was deleted.
        epoch = max(_newest_epoch(directory), newest_head_epoch(root / "manifest")) + 1
        try:
            write_new(directory / f"{epoch:06d}", holder + b"\n", files)
        except FileExistsError:
            continue  # another machine was quicker
        return epoch


def _newest_epoch(directory: Path) -> int:
    return max((int(name) for name in names_in(directory) if name.isdecimal() and name.isascii()), default=0)


def being_written(root: Path) -> bool:
    """Whether a process is writing to this run directory now."""
    try:
        fd = os.open(root / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # what cannot be opened cannot be written to by a run
        return False
    try:
        return not flock.try_acquire(fd, shared=True)
    except OSError:  # unknown: to call a run ended that is not would be the worse error
        return True
    finally:
        os.close(fd)
