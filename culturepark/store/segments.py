"""The segments of the write-ahead log: how they are named, what is in them, and how they are read.

A segment, such as `000001-0003.wal`, the first one, by the writer with epoch 3, is 8 bytes of header
(`CPWAL`, the format's number, a check of both), then records:

    length, 4 bytes little-endian | crc32 of length and payload, 4 bytes little-endian | payload

A damaged record is named, never served. Segments of earlier versions, `000001.wal`, are of epoch 0.
"""

from __future__ import annotations

import binascii
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal
from zlib import crc32

from msgspec import Struct

from culturepark.errors import RunDirError
from culturepark.store.files import disk_errors, names_in, other_format

MAX_PAYLOAD_BYTES = 64 << 20
"""The longest payload of a record, in bytes. A damaged length beyond it is seen at once."""

CHUNK_BYTES = 1 << 20
"""Bytes that are read or copied at a time."""

_MOST_BAD_IN_A_ROW = 16
"""Damaged records in a row that are passed over in search of a good one."""

_SEGMENT_NAME = re.compile(r"([0-9]{6}|[1-9][0-9]{6,8})(?:-([0-9]{4}|[1-9][0-9]{4,8}))?\.wal")
_REPAIR = (
    "Put it back from a copy of the run; or make an empty file of this name, and what it held is done again."
)
_HEAD = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
_MAGIC = b"CPWAL"
_FORMAT = 1


def _segment_header(format_number: int) -> bytes:
    start = _MAGIC + bytes([format_number])
    return start + binascii.crc_hqx(start, 0).to_bytes(2, "little")


SEGMENT_HEADER = _segment_header(_FORMAT)


class LogEntry(Struct, frozen=True):
    """A record that was read (log entry): its payload, and where it stands."""

    segment: int
    offset: int
    payload: bytes


class Damage(Struct, frozen=True):
    """What could not be read, and where.

    `record`: one or more damaged records; reading went on behind them. `rest`: a damaged record after
    which no other could be found, up to the segment's end. `tail`: the same in the last segment, which
    is what a crash in the middle of a write looks like; a reader beside a live writer may see it too.
    `header`: the segment's first 8 bytes; its records are still served. `missing`: this whole segment, and
    perhaps more up to the next that is there.

    `bytes` counts from `offset`. `saved` is the file they were copied to, relative to the directory that
    holds the log; empty when they were not.
    """

    kind: Literal["record", "rest", "tail", "header", "missing"]
    segment: int
    offset: int
    bytes: int
    saved: str = ""

    def __str__(self) -> str:
        place = f"log segment {self.segment:06d}"
        if self.kind == "missing":
            return f"{place} is missing"
        kept = f"; kept in {self.saved}" if self.saved else ""
        return f"{place}: damaged {self.kind} at byte {self.offset}, {self.bytes} bytes{kept}"


def scan(
    directory: Path, segments: Sequence[str] | None = None, *, strict: bool = False
) -> Iterator[LogEntry | Damage]:
    """All that the log holds, in order, with each damage where it lies. Changes nothing on disk.

    `segments` are the names of those that count, in order; None: what `list_segments` finds. Holds one record
    in memory. Raises RunDirError if a segment cannot be read or has a newer format; with `strict`, also if
    one of `segments` is not there, which beside a live writer is no fault.
    """
    names = list_segments(directory) if segments is None else segments
    expected = segment_of(names[0])[0] if names else 0
    for name in names:
        number, _ = segment_of(name)
        if number != expected:
            yield Damage("missing", expected, 0, 0)
        yield from scan_segment(directory, name, name == names[-1], strict)
        expected = number + 1


def replay(directory: Path, segments: Sequence[str] | None = None) -> Iterator[LogEntry]:
    """The good records, in order; damage is passed over. Otherwise as `scan`."""
    return (item for item in scan(directory, segments) if isinstance(item, LogEntry))


def list_segments(directory: Path) -> list[str]:
    """The names of the segments on disk, in order, each number once, of its newest writer; none if there is
    no such directory."""
    newest = {number: (number, epoch) for number, epoch in sorted(segments_on_disk(directory))}
    return [segment_name(*segment) for segment in newest.values()]


def is_segment(name: str) -> bool:
    """Whether a file of this name is a log segment."""
    return _SEGMENT_NAME.fullmatch(name) is not None


def segment_of(name: str) -> tuple[int, int]:
    """Number and epoch of the segment of this name; epoch 0 if it was made by a version without."""
    found = _SEGMENT_NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"no log segment has the name {name!r}")
    return int(found[1]), int(found[2] or 0)


def segment_name(number: int, epoch: int) -> str:
    """The name of the segment with this number, by the writer with this epoch."""
    return f"{number:06d}-{epoch:04d}.wal" if epoch else f"{number:06d}.wal"


def segments_on_disk(directory: Path) -> list[tuple[int, int]]:
    """Number and epoch of every segment, also of those that do not count."""
    return [segment_of(name) for name in names_in(directory) if is_segment(name)]


def frame(payload: bytes) -> bytes:
    """A record as it is on disk: length, checksum, payload."""
    length = len(payload)
    return _HEAD.pack(length, crc32(payload, crc32(_LENGTH.pack(length)))) + payload


def scan_segment(directory: Path, name: str, last: bool, strict: bool) -> Iterator[LogEntry | Damage]:
    """One segment as `scan` reads it; `last`: it is the one that was written to last."""
    path = directory / name
    number, _ = segment_of(name)
    to_the_end = "tail" if last else "rest"
    with disk_errors(path):
        try:
            file = path.open("rb", buffering=CHUNK_BYTES)
        except FileNotFoundError:
            if strict:
                raise missing_segment(path) from None
            return  # dropped by the writer since the directory was read
        with file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(len(SEGMENT_HEADER))
            if len(header) < len(SEGMENT_HEADER):
                yield Damage(to_the_end, number, 0, size)
                return
            if header != SEGMENT_HEADER:
                if header == _segment_header(header[len(_MAGIC)]):
                    raise other_format(path, "log", header[len(_MAGIC)], _FORMAT)
                yield Damage("header", number, 0, len(header))
            offset = len(header)
            while offset < size:
                payload = _payload_at(file, offset, size)
                if payload is not None:
                    yield LogEntry(number, offset, payload)
                    offset += _HEAD.size + len(payload)
                else:
                    end = _after_damage(file, offset, size)
                    yield Damage("record" if end < size else to_the_end, number, offset, end - offset)
                    offset = end


def _payload_at(file: BinaryIO, offset: int, size: int, flipped_bit: int = 0) -> bytes | None:
    """The payload of the record at `offset` if its checksum is right, else None.

    `flipped_bit` is put right in the stored length before it is used.
    """
    file.seek(offset)
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    length, checksum = _HEAD.unpack(head)
    length ^= flipped_bit
    if length > MAX_PAYLOAD_BYTES or offset + _HEAD.size + length > size:
        return None
    payload = file.read(length)
    return payload if crc32(payload, crc32(_LENGTH.pack(length))) == checksum else None


def _after_damage(file: BinaryIO, offset: int, size: int) -> int:
    """Where the record after the damaged one at `offset` begins; `size` if it cannot be told.

    A position counts only when a checksum proves it: that of the record there, or that of the damaged
    record itself once one bit of its length is put right. Searching byte by byte would be no proof, for
    a payload may hold what looks like a record.
    """
    for _ in range(_MOST_BAD_IN_A_ROW):
        file.seek(offset)
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return size
        length: int = _HEAD.unpack(head)[0]
        for bit in range(32):
            if _payload_at(file, offset, size, 1 << bit) is not None:
                return offset + _HEAD.size + (length ^ 1 << bit)
        offset += _HEAD.size + length
        if length > MAX_PAYLOAD_BYTES or offset >= size:
            return size
        if _payload_at(file, offset, size) is not None:
            return offset
    return size


def missing_segment(path: Path) -> RunDirError:
    """The error for a segment that counts and is not there."""
    return RunDirError(str(path), "this log segment is missing", _REPAIR)
