"""The manifest (commit log of the shards): what is not named here did not happen.

Entries are numbered files, `manifest/000001.json` and so on, each made whole and never changed. Each
holds its own hash, and the hash of the entry before it: a damaged, missing or foreign entry is found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from culturepark.errors import RunDirError
from culturepark.store.files import (
    REAL,
    REPAIR,
    Files,
    disk_errors,
    make_dirs,
    names_in,
    other_format,
    write_new,
)

T = TypeVar("T")

SCHEMA = 1
"""The format of entries that this version writes and reads."""

_ENTRY_NAME = re.compile(r"(?:[0-9]{6}|[1-9][0-9]{6,8})\.json")


class Shard(Struct, frozen=True, forbid_unknown_fields=True):
    """One immutable data file. `path` is relative to the run directory, with forward slashes."""

    path: str
    rows: int
    bytes: int
    sha256: str
    kind: str


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """One commit: the shards that it adds, and the caller's own facts about them in `data`.

    `epoch` is that of the writer (fencing token). `previous` is the sha256 of the entry before, empty for the
    first.
    """

    number: int
    epoch: int
    previous: str
    shards: tuple[Shard, ...]
    data: Raw
    schema: int = SCHEMA

    def data_as(self, kind: type[T]) -> T:
        """`data` as the type that the caller gave. Raises msgspec.ValidationError."""
        return msgspec.json.decode(self.data, type=kind)


class _File(Struct, forbid_unknown_fields=True):
    sha256: str
    entry: Raw


class _Version(Struct):
    schema: int


class Manifest:
    """The commits of a run directory, in order. One writer at a time: see `RunLock`.

    After a failed `append` it is not known whether the commit took place; then the manifest refuses
    further work, and opening it again tells.
    """

    def __init__(self, directory: Path, epoch: int, files: Files) -> None:
        """For `open` and `read` only."""
        self.directory = directory
        self.epoch = epoch
        self._files = files
        self._entries: list[Entry] = []
        self._paths: set[str] = set()
        self._last_sha256 = ""
        self._refusal = "" if epoch else "it was opened for reading"
        for number in range(1, _highest(directory) + 1):
            path = self.path_of(number)
            entry, sha256 = _read(path)
            if entry.previous != self._last_sha256:
                raise RunDirError(str(path), "this entry does not follow the one before it", REPAIR)
            self._add(entry, sha256)

    @classmethod
    def open(cls, directory: Path, epoch: int, files: Files = REAL) -> Manifest:
        """Read all entries in order, for writing more under `epoch`; makes the directory if need be.

        Raises RunDirError that names the file if an entry is missing, damaged or of a newer format.
        """
        make_dirs(directory, files)
        with disk_errors(directory):
            # An entry of a writer that was killed may be visible and not yet durable.
            files.fsync_dir(directory)
        return cls(directory, epoch, files)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read all entries in order; changes nothing on disk. Raises as `open`."""
        return cls(directory, 0, REAL)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All commits, oldest first."""
        return tuple(self._entries)

    def path_of(self, number: int) -> Path:
        """Where the entry of this number is, or would be."""
        return self.directory / f"{number:06d}.json"

    def sha256_of(self, number: int) -> str:
        """The sha256 of an entry that is there; empty for number 0, that before the first."""
        return self._last_sha256 if number == len(self._entries) else self._entries[number].previous

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all shards."""
        return frozenset(self._paths)

    def shards(self, kind: str) -> Iterator[Shard]:
        """The shards of one kind, in the order of their commits."""
        return (shard for entry in self._entries for shard in entry.shards if shard.kind == kind)

    def append(self, shards: Sequence[Shard], data: Any = None) -> Entry:
        """Commit these shards, all or none; they are committed once this returns.

        `data` is whatever msgspec can encode. Raises ValueError if a shard is named already,
        RunDirError if the disk fails or another process has used the number: that one is the writer now.
        """
        if self._refusal:
            what = f"nothing is committed here: {self._refusal}"
            raise RunDirError(str(self.directory), what, "Resume the run to go on.")
        new = [shard.path for shard in shards]
        if len({*new}) < len(new) or not self._paths.isdisjoint(new):
            raise ValueError(f"a shard is named twice: {new}")
        number = len(self._entries) + 1
        path = self.path_of(number)
        facts = Raw(msgspec.json.encode({} if data is None else data))
        entry = Entry(number, self.epoch, self._last_sha256, tuple(shards), facts)
        body = msgspec.json.encode(entry)
        sha256 = hashlib.sha256(body).hexdigest()
        self._refusal = "an earlier commit failed"
        try:
            write_new(path, _frame(body, sha256), self._files)
        except FileExistsError as error:
            raise RunDirError(
                str(path),
                "another process has committed to this run",
                "Let one process at a time write here, then resume the run.",
            ) from error
        self._refusal = ""
        self._add(entry, sha256)
        return entry

    def _add(self, entry: Entry, sha256: str) -> None:
        self._entries.append(entry)
        self._paths.update(shard.path for shard in entry.shards)
        self._last_sha256 = sha256


def _highest(directory: Path) -> int:
    return max((int(name[:-5]) for name in names_in(directory) if _ENTRY_NAME.fullmatch(name)), default=0)


def _frame(body: bytes, sha256: str) -> bytes:
    return b'{"sha256":"%b","entry":%b}\n' % (sha256.encode(), body)


def missing_entry(path: Path, why: str = "") -> RunDirError:
    """The error for an entry that must be there and is not; `why` says how that is known."""
    return RunDirError(str(path), f"this entry of the manifest is missing{why}", REPAIR)


def _read(path: Path) -> tuple[Entry, str]:
    with disk_errors(path):
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise missing_entry(path) from error
    try:
        body = bytes(msgspec.json.decode(content, type=_File).entry)
        sha256 = hashlib.sha256(body).hexdigest()
        # The file must be, byte for byte, what is written for this body: nothing else goes unnoticed.
        if content != _frame(body, sha256):
            raise ValueError("the hash does not fit")
        schema = msgspec.json.decode(body, type=_Version).schema
        if schema != SCHEMA:
            raise other_format(path, "entry", schema, SCHEMA)
        return msgspec.json.decode(body, type=Entry), sha256
    except (ValueError, msgspec.MsgspecError) as error:
        raise RunDirError(str(path), f"this entry of the manifest is damaged ({error})", REPAIR) from error
