"""The head: the newest writer's checkpoint, by which the next writer knows what has to be there.

One small file for each writer, `manifest/head-000003.json` for the one with epoch 3 (fencing token), replaced
atomically whenever a log segment is begun or dropped, or a moderator begins. What a head names has to be
there at the next start; a log segment that the newest head does not name is no part of the run. A writer
writes its own head alone.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec
from msgspec import Raw, Struct

from culturepark.errors import RunDirError
from culturepark.store.files import REAL, REPAIR, Files, disk_errors, names_in, other_format, write_atomically

SCHEMA = 1
"""The format of heads that this version writes and reads."""

_HEAD_NAME = re.compile(r"head-([0-9]{6}|[1-9][0-9]{6,8})\.json")


class Head(Struct, frozen=True, forbid_unknown_fields=True):
    """What a writer relies on: its log segments by name, in order, and the newest commit.

    `term` is the incarnation number of the moderator whose turns count, None before the first. `entries` is
    how many entries the manifest had, `sha256` that of the last, empty if there was none.
    """

    epoch: int
    term: int | None = msgspec.field(name="take")
    segments: tuple[str, ...]
    entries: int
    sha256: str
    schema: int = SCHEMA


class _File(Struct, forbid_unknown_fields=True):
    sha256: str
    head: Raw


class _Version(Struct):
    schema: int


def head_path(directory: Path, epoch: int) -> Path:
    """Where the head of the writer with this epoch is, in the manifest's directory."""
    return directory / f"head-{epoch:06d}.json"


def newest_head_epoch(directory: Path) -> int:
    """The epoch of the newest head in the manifest's directory; 0 if there is none. Raises RunDirError."""
    return max(_epochs(directory), default=0)


def read_head(directory: Path) -> Head | None:
    """The newest head in the manifest's directory; None in a run of a version that wrote none.

    Raises RunDirError naming the file if it is damaged or of a newer format.
    """
    while epoch := newest_head_epoch(directory):
        path = head_path(directory, epoch)
        with disk_errors(path):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # its writer was replaced since the directory was read
                continue
        return _head_in(content, path)
    return None


def write_head(directory: Path, head: Head, files: Files = REAL) -> None:
    """Make this the head of its writer, durably. Raises RunDirError."""
    body = msgspec.json.encode(head)
    write_atomically(head_path(directory, head.epoch), _frame(body), files)


def remove_older_heads(directory: Path, epoch: int, files: Files = REAL) -> None:
    """Remove the heads of earlier writers than that with `epoch`, durably. Raises RunDirError."""
    older = [one for one in _epochs(directory) if one < epoch]
    for one in older:
        path = head_path(directory, one)
        with disk_errors(path):
            try:
                files.remove(path)
            except FileNotFoundError:
                continue  # another writer was quicker
    if older:
        with disk_errors(directory):
            files.fsync_dir(directory)


def _epochs(directory: Path) -> list[int]:
    return [int(found[1]) for name in names_in(directory) if (found := _HEAD_NAME.fullmatch(name))]


def _frame(body: bytes) -> bytes:
    return b'{"sha256":"%b","head":%b}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def _head_in(content: bytes, path: Path) -> Head:
    try:
        body = bytes(msgspec.json.decode(content, type=_File).head)
        # The file must be, byte for byte, what is written for this body: nothing else goes unnoticed.
        if content != _frame(body):
            raise ValueError("the hash does not fit")
        schema = msgspec.json.decode(body, type=_Version).schema
        if schema != SCHEMA:
            raise other_format(path, "head", schema, SCHEMA)
        return msgspec.json.decode(body, type=Head)
    except (ValueError, msgspec.MsgspecError) as error:
        raise RunDirError(str(path), f"this head is damaged ({error})", REPAIR) from error
