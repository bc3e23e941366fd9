"""A file system that forgets: what a power loss, a full disk or a failing disk does, on demand.

`FaultyFiles` does all work on the real directory, so readers see what a process would see through the
kernel's cache, and keeps beside it what the medium holds: the content as of the last good fsync of a
file, and the names as of the last fsync of a directory. `power_loss` leaves only that, and of the rest
as much as chance allows. Nothing is really fsynced, so it is quick.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from culturepark.store.files import RealFiles

_BLOCK_BYTES = 16


class Crash(BaseException):
    """The process dies here. Nothing that runs after it changes the disk."""


@dataclass(eq=False)
class _Inode:
    live: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    lost: list[tuple[int, int]] = field(default_factory=list)
    """Ranges that a failed fsync gave up: in the cache, marked clean, never to reach the medium."""
    is_dir: bool = False

    def content(self, end: int) -> bytearray:
        data = self.live[:end]
        for start, stop in self.lost:
            data[start:stop] = bytes(len(data[start:stop]))
        return data


_Change = dict[Path, _Inode | None]


class FaultyFiles:
    """`Files` over `root`, which counts as durable when this is made.

    `calls` names every operation so far. Use `fail`, `crash_at` and `space_bytes` to set faults;
    after a `Crash` call `kill` or `power_loss` before going on.
    """

    def __init__(self, root: Path) -> None:
        self.calls: list[str] = []
        self.space_bytes: int | None = None
        self._real = RealFiles()
        self._faults: dict[str, tuple[int, int]] = {}
        self._crash_at: int | None = None
        self._dead = False
        self._open: dict[int, _Inode] = {}
        self._live: dict[Path, _Inode] = {}
        for path in sorted(root.rglob("*")):
            data = b"" if path.is_dir() else path.read_bytes()
            self._live[path] = _Inode(bytearray(data), data, is_dir=path.is_dir())
        self._durable = dict(self._live)
        self._pending: list[_Change] = []

    # What tests ask for

    def fail(self, call: str, code: int = errno.EIO, after: int = 0) -> None:
        """Let the next call of this name fail, or the one `after` so many more."""
        self._faults[call] = (after, code)

    def heal(self) -> None:
        """Take back what `fail` has set and no call has met."""
        self._faults.clear()

    def crash_at(self, call: int | None) -> None:
        """Die instead of the operation that is `call` operations from now; a write is half done."""
        self._crash_at = None if call is None else len(self.calls) + call

    def kill(self) -> None:
        """The process ends; the kernel keeps all that was written."""
        for fd in self._open:
            self._real.close(fd)
        self._open.clear()
        self.heal()
        self._crash_at, self._dead = None, False

    def power_loss(self, random: Random, keep: float = 0.0, holes: bool = False) -> None:
        """The machine ends. What was not fsynced is kept with the chance `keep`.

        Of a file's end a prefix is kept; with `holes`, blocks of it may be zeros.
        """
        self.kill()
        kept: set[int] = set()
        for index in range(len(self._pending)):
            if random.random() < keep:
                kept |= self._with_earlier({index})
        for index in sorted(kept):
            self._apply(self._pending[index])
        self._pending.clear()
        for path in sorted({*self._live, *self._durable}, reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            else:
                path.unlink(missing_ok=True)
        survivors: dict[Path, _Inode] = {}
        for path in sorted(self._durable):
            inode = self._durable[path]
            if not path.parent.is_dir():
                continue
            if inode.is_dir:
                path.mkdir(exist_ok=True)
            else:
                if inode not in survivors.values():
                    self._forget(inode, random, keep, holes)
                path.write_bytes(inode.live)
            survivors[path] = inode
        self._live, self._durable = survivors, dict(survivors)

    def used_bytes(self) -> int:
        return sum(len(inode.live) for inode in {id(i): i for i in self._live.values()}.values())

    # The port

    def mkdir(self, path: Path) -> None:
        self._call("mkdir")
        self._real.mkdir(path)
        self._change({path: _Inode(is_dir=True)})

    def create(self, path: Path) -> int:
        self._call("create")
        fd = self._real.create(path)
        self._open[fd] = _Inode()
        self._change({path: self._open[fd]})
        return fd

    def append_to(self, path: Path) -> int:
        self._call("append_to")
        fd = self._real.append_to(path)
        self._open[fd] = self._live[path]
        return fd

    def write(self, fd: int, data: bytes | memoryview) -> None:
        was_dead = self._dead
        try:
            self._call("write")
        except (Crash, OSError):
            if not was_dead:
                self._write(fd, data[: len(data) // 2])
            raise
        if self.space_bytes is not None:
            room = max(0, self.space_bytes - self.used_bytes())
            if room < len(data):
                self._write(fd, data[:room])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write(fd, data)

    def fsync(self, fd: int) -> None:
        inode = self._open[fd]
        try:
            self._call("fsync")
        except OSError:
            inode.lost.append((len(inode.durable), len(inode.live)))
            raise
        inode.durable = bytes(inode.content(len(inode.live)))

    def close(self, fd: int) -> None:
        self._call("close")
        del self._open[fd]
        self._real.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        self._call("replace")
        self._real.replace(source, target)
        self._change({source: None, target: self._live[source]})

    def link(self, source: Path, target: Path) -> None:
        self._call("link")
        self._real.link(source, target)
        self._change({target: self._live[source]})

    def remove(self, path: Path) -> None:
        self._call("remove")
        self._real.remove(path)
        self._change({path: None})

    def fsync_dir(self, path: Path) -> None:
        self._call("fsync_dir")
        here = {i for i, change in enumerate(self._pending) if any(name.parent == path for name in change)}
        flushed = self._with_earlier(here)
        for index in sorted(flushed):
            self._apply(self._pending[index])
        self._pending = [change for i, change in enumerate(self._pending) if i not in flushed]

    # The medium

    def _call(self, name: str) -> None:
        if self._dead:
            raise Crash
        if self._crash_at == len(self.calls):
            self._dead = True
            raise Crash
        self.calls.append(name)
        if name in self._faults:
            after, code = self._faults.pop(name)
            if after == 0:
                raise OSError(code, os.strerror(code))
            self._faults[name] = (after - 1, code)

    def _write(self, fd: int, data: bytes | memoryview) -> None:
        self._real.write(fd, data)
        self._open[fd].live += data

    def _change(self, change: _Change) -> None:
        self._pending.append(change)
        for path, inode in change.items():
            if inode is None:
                del self._live[path]
            else:
                self._live[path] = inode

    def _apply(self, change: _Change) -> None:
        for path, inode in change.items():
            if inode is None:
                self._durable.pop(path, None)
            else:
                self._durable[path] = inode

    def _with_earlier(self, chosen: set[int]) -> set[int]:
        """These changes, and the earlier ones that they rest on: those of the same names."""
        names: set[Path] = set()
        result: set[int] = set()
        for index in range(len(self._pending) - 1, -1, -1):
            if index in chosen or not names.isdisjoint(self._pending[index]):
                result.add(index)
                names.update(self._pending[index])
        return result

    @staticmethod
    def _forget(inode: _Inode, random: Random, keep: float, holes: bool) -> None:
        start, end = len(inode.durable), len(inode.live)
        if keep < 1:
            end = start + (random.randint(0, end - start) if random.random() < keep else 0)
        data = bytearray(inode.durable) + inode.content(end)[start:]
        if holes:
            for at in range(start, end, _BLOCK_BYTES):
                if random.random() < 0.5:
                    stop = min(at + _BLOCK_BYTES, end)
                    data[at:stop] = bytes(stop - at)
        inode.live, inode.durable, inode.lost = data, bytes(data), []
