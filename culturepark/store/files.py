"""The one place that changes the disk: a small port, and files that appear whole or not at all (atomically).

What is written survives a power loss once it is fsynced and its name is, by an fsync of the directory.
The port lets tests lose everything that was not. Reading needs no port: it goes to the disk directly.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from culturepark.errors import RunDirError

PART = ".part"
"""Suffix of a file that is still being written. Nothing in such a file was acknowledged."""

ORPHANS = "orphans"
"""Directory inside the run directory for files that belong to nothing, moved there unread (quarantine)."""

REPAIR = "Put the file back from a copy of the run, or begin a new run directory; its shards are untouched."
"""What to do about a file without which it is not known what was done."""

_FULL_FSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)

_PLAIN_WORDS = {
    errno.ENOSPC: ("the disk is full", "Free some space, then resume the run."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, then resume the run."),
    errno.EROFS: ("the file system is read-only", "Make it writable, or use another run directory."),
    errno.EACCES: ("permission denied", "Run as the owner of the run directory, or correct its permissions."),
    errno.EPERM: ("the file system does not allow this", "Use a run directory on another file system."),
    errno.EIO: ("the disk reported an error", "Check the disk, then resume the run."),
    errno.EMFILE: ("too many files are open", "Raise the limit (`ulimit -n`), then resume the run."),
    errno.ENAMETOOLONG: ("the path is too long", "Use a run directory with a shorter path."),
}


class Files(Protocol):
    """What durable writing needs of a file system. Every method may raise OSError."""

    def mkdir(self, path: Path) -> None:
        """Make one directory; FileExistsError if the name is in use."""
        ...

    def create(self, path: Path) -> int:
        """Open a new file for appending; FileExistsError if the name is in use."""
        ...

    def append_to(self, path: Path) -> int:
        """Open an existing file for appending."""
        ...

    def write(self, fd: int, data: bytes | memoryview) -> None:
        """Write all of `data`; after an error, any part of it may have been written."""
        ...

    def fsync(self, fd: int) -> None:
        """Return once the file's content is on the medium. After an error it never will be."""
        ...

    def close(self, fd: int) -> None: ...

    def replace(self, source: Path, target: Path) -> None:
        """Rename; a file at `target` gives way."""
        ...

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name (hard link); FileExistsError if the name is in use."""
        ...

    def remove(self, path: Path) -> None: ...

    def fsync_dir(self, path: Path) -> None:
        """Return once the names in this directory are on the medium."""
        ...


class RealFiles:
    """The file system itself."""

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def append_to(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def write(self, fd: int, data: bytes | memoryview) -> None:
        done = os.write(fd, data)
        while done < len(data):  # a nearly full disk, or more than the kernel writes in one call
            done += os.write(fd, memoryview(data)[done:])

    def fsync(self, fd: int) -> None:
        if _FULL_FSYNC is None:
            os.fsync(fd)
        else:  # macOS: fsync alone leaves the data in the drive's own cache
            fcntl.fcntl(fd, _FULL_FSYNC)

    def close(self, fd: int) -> None:
        os.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        target.hardlink_to(source)

    def remove(self, path: Path) -> None:
        path.unlink()

    def fsync_dir(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that keeps names safe without being asked
                raise
        finally:
            os.close(fd)


REAL = RealFiles()


def disk_error(path: Path, error: OSError) -> RunDirError:
    """The error for the reader: which file, what the system said in plain words, what to do."""
    unknown = ((error.strerror or str(error)).lower(), "Check the disk, then resume the run.")
    what, fix = _PLAIN_WORDS.get(error.errno or 0, unknown)
    return RunDirError(str(path), what, fix)


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn the system's errors about `path` into RunDirError; FileExistsError is left as it is."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise disk_error(path, error) from error


def names_in(directory: Path) -> list[str]:
    """The names in a directory; none if it does not exist. Raises RunDirError."""
    with disk_errors(directory):
        try:
            return os.listdir(directory)
        except FileNotFoundError:
            return []


def other_format(path: Path, what: str, found: int, known: int) -> RunDirError:
    """The error of a file whose format this version does not read."""
    return RunDirError(
        str(path),
        f"this {what} has format {found}, and this version reads format {known}",
        "Use the version of culturepark that the run was made with.",
    )


def make_dirs(path: Path, files: Files = REAL) -> None:
    """Make `path` and what is missing above it, durably.

    The parent is fsynced even if `path` exists: a process that was killed may have made it and not
    have come that far. Raises RunDirError.
    """
    if not path.parent.is_dir():
        make_dirs(path.parent, files)
    with disk_errors(path):
        try:
            files.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise RunDirError(
                    str(path), "a file stands where a directory is needed", "Name another directory."
                ) from None
        with suppress(PermissionError):  # a parent that may be passed through but not opened
            files.fsync_dir(path.parent)


def write_atomically(path: Path, data: bytes | Iterable[bytes | memoryview], files: Files = REAL) -> None:
    """Make `path` hold `data` durably; a reader sees the old content or the new, never a part.

    `data` is the content, or chunks of it. Raises RunDirError.
    """
    _write(path, data, files, files.replace, None)


def write_view(path: Path, data: bytes, files: Files = REAL) -> None:
    """Make `path` hold `data`; a reader sees the old content or the new, never a part. It is not durable.

    Nothing is fsynced: after a power loss the file may be old, torn or missing, so only for what can be
    done without. One writer at a time; what a killed one left unfinished gives way. Raises RunDirError.
    """
    # Not a `.part`: those are set aside when a ledger is opened, and this may be written meanwhile.
    unfinished = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        with suppress(FileNotFoundError):
            files.remove(unfinished)
        fd = files.create(unfinished)
        try:
            files.write(fd, data)
        finally:
            files.close(fd)
        files.replace(unfinished, path)


def write_new(
    path: Path,
    data: bytes | Iterable[bytes | memoryview],
    files: Files = REAL,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Make a new file durably, whole or not at all; never overwrites.

    `check` gets the written file, by its temporary name, before it is published, and may raise.
    Raises FileExistsError if `path` exists, RunDirError for other errors of the disk.
    """

    def publish(part: Path, target: Path) -> None:
        # A link, since a rename would overwrite, and opening exclusively would show a part.
        try:
            files.link(part, target)
        except FileExistsError:
            # On a network file system the answer to our own success can get lost, and the call repeated.
            if not part.samefile(target):
                raise
        files.remove(part)

    _write(path, data, files, publish, check)


def _write(
    path: Path,
    data: bytes | Iterable[bytes | memoryview],
    files: Files,
    publish: Callable[[Path, Path], None],
    check: Callable[[Path], None] | None,
) -> None:
    # The name is ours alone: a writer that was fenced off cannot disturb an unfinished file of another.
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
    with disk_errors(path):
        fd = files.create(part)
        try:
            try:
                for chunk in (data,) if isinstance(data, bytes) else data:
                    files.write(fd, chunk)
                files.fsync(fd)
            finally:
                files.close(fd)
            if check is not None:
                check(part)
            publish(part, path)
        except BaseException:
            with suppress(OSError):
                files.remove(part)
            raise
        files.fsync_dir(path.parent)


def orphan_path(root: Path, name: str) -> Path:
    """A fresh name in the run directory's `orphans/`, beginning with `name`."""
    return root / ORPHANS / f"{name}.{secrets.token_hex(4)}"
