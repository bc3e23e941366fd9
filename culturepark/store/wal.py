"""The write-ahead log: numbered segments of checksummed records, fsynced in groups.

A segment, such as `000001-0003.wal`, the first one, by the writer with epoch 3, is 8 bytes of header
(`CPWAL`, the format's number, a check of both), then records:

    length, 4 bytes little-endian | crc32 of length and payload, 4 bytes little-endian | payload

What `sync` has returned for is there after kill -9 and after a power loss, in order. What was appended
later may be there in part, in order. A damaged record is named and set aside, never served.

A writer makes and appends to files of its own epoch alone: to go on in an earlier writer's segment it copies
it. So one that was replaced and has not noticed can harm nothing of its successor's. Which files count is for
the head to say (`culturepark.store.head`). Segments of earlier versions, `000001.wal`, are of epoch 0.
"""

from __future__ import annotations

import binascii
import os
import re
import struct
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal
from zlib import crc32

from msgspec import Struct, structs

from culturepark.errors import RunDirError
from culturepark.store.files import (
    PART,
    REAL,
    Files,
    disk_errors,
    make_dirs,
    orphan_path,
    write_new,
)

MAX_PAYLOAD_BYTES = 64 << 20
"""The longest record. A damaged length field beyond it is seen at once."""

_CHUNK_BYTES = 1 << 20
_MOST_BAD_IN_A_ROW = 16
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


class Entry(Struct, frozen=True):
    """One record: its payload, and where it stands."""

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


def scan(directory: Path, segments: Sequence[str] | None = None) -> Iterator[Entry | Damage]:
    """All that the log holds, in order, with each damage where it lies. Changes nothing on disk.

    `segments` are the names of those that count, in order; None: what `list_segments` finds. Holds one record
    in memory. Raises RunDirError if a segment cannot be read or has a newer format.
    """
    return _scan(directory, list_segments(directory) if segments is None else segments)


def replay(directory: Path, segments: Sequence[str] | None = None) -> Iterator[Entry]:
    """The good records, in order; damage is passed over. Otherwise as `scan`."""
    return (item for item in scan(directory, segments) if isinstance(item, Entry))


def list_segments(directory: Path) -> list[str]:
    """The names of the segments on disk, in order, each number once, of its newest writer; none if there is
    no such directory."""
    newest = {number: (number, epoch) for number, epoch in sorted(_segments_on_disk(directory))}
    return [_name(*segment) for segment in newest.values()]


def segment_of(name: str) -> tuple[int, int]:
    """Number and epoch of the segment of this name; epoch 0 if it was made by a version without."""
    found = _SEGMENT_NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"no log segment has the name {name!r}")
    return int(found[1]), int(found[2] or 0)


class Log:
    """The writer's side of a log. One process at a time: see `RunLock`.

    `append` may be called while another thread is in `sync`; that sync covers what was appended before
    it began. After a failed write or fsync nobody knows what reached the disk, so the log refuses all
    further work; `Log.open` starts anew from what is there.
    """

    def __init__(
        self, directory: Path, names: dict[int, str], epoch: int, damage: tuple[Damage, ...], files: Files
    ) -> None:
        """For `Log.open` only."""
        self.directory = directory
        self.damage = damage
        self._names = names
        self._epoch = epoch
        self._files = files
        self._frames: list[bytes] = []
        self._buffering = threading.Lock()
        self._writing = threading.Lock()
        self._failure = ""
        self._closed = False
        path = directory / names[self.segment]
        with disk_errors(path):
            self._size_bytes = path.stat().st_size
            self._fd = files.append_to(path)

    @classmethod
    def open(
        cls,
        directory: Path,
        files: Files = REAL,
        epoch: int | None = None,
        segments: Sequence[str] | None = None,
    ) -> Log:
        """Recover the log, or begin one; then every record that `replay` yields is durable.

        `epoch` is the writer's, higher than that of any before; None: one more than those in the names.
        `segments` are the names of those that count, as in `scan`. A torn tail is cut, damaged records are
        taken out; their bytes go to `orphans/` beside the log and are listed in `damage`. What is changed is
        a copy; the files that were there stay until `drop` and `remove_replaced`. Raises RunDirError, also
        if one of `segments` is missing.
        """
        make_dirs(directory, files)
        if epoch is None:
            epoch = 1 + max((epoch for _, epoch in _segments_on_disk(directory)), default=0)
        _remove_unfinished(directory, epoch, files)
        found_names = list_segments(directory) if segments is None else segments
        names = {segment_of(name)[0]: name for name in found_names}
        found = [item for item in _scan(directory, found_names, strict=True) if isinstance(item, Damage)]
        damage = tuple(
            _set_aside(directory, names[item.segment], item, files) if item.bytes else item for item in found
        )
        # The last segment is copied even if it is whole: after a kill or a failed fsync the kernel may
        # show data that is not on the disk, and a second fsync of the same file can succeed falsely.
        copied = {item.segment for item in found if item.kind != "missing"} | {*[*names][-1:]}
        for number in sorted(copied):
            clean = _clean_copy(directory, names[number], number == [*names][-1], found)
            names[number] = _begin(directory, number, epoch, files, clean)
        if not names:
            names = {1: _begin(directory, 1, epoch, files)}
        return cls(directory, names, epoch, damage, files)

    @property
    def segment(self) -> int:
        """The number of the segment that is written to."""
        return next(reversed(self._names))

    @property
    def size_bytes(self) -> int:
        """Length of that segment with all that is appended, synced or not."""
        return self._size_bytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def segments(self) -> tuple[int, ...]:
        """The numbers of all segments, oldest first; the last is the one written to."""
        return tuple(self._names)

    def names(self) -> tuple[str, ...]:
        """The names of the same."""
        return tuple(self._names.values())

    def replay(self) -> Iterator[Entry]:
        """The good records on disk, in order."""
        return replay(self.directory, self.names())

    def append(self, payload: bytes) -> None:
        """Add a record to the next `sync`.

        Raises ValueError if it is longer than MAX_PAYLOAD_BYTES, RunDirError if the log has failed.
        """
        length = len(payload)
        if length > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a log record may hold {MAX_PAYLOAD_BYTES} bytes, this one has {length}")
        frame = _frame(payload)
        with self._buffering:
            self._refuse_after_failure()
            self._frames.append(frame)
            self._size_bytes += len(frame)

    def sync(self) -> None:
        """Return once all that was appended before is on the disk: one write, one fsync.

        Raises RunDirError; then the log has failed.
        """
        with self._writing:
            self._sync()

    def rotate(self) -> int:
        """Sync, then go on in a new segment. Returns the number of the one just finished.

        Raises RunDirError; then the log has failed.
        """
        with self._writing:
            self._sync()
            finished = self.segment
            with self._poisoned_on_error():
                fd, self._fd = self._fd, -1
                self._files.close(fd)
                name = _begin(self.directory, finished + 1, self._epoch, self._files)
                self._fd = self._files.append_to(self.directory / name)
                with self._buffering:
                    self._names[finished + 1] = name
                    self._size_bytes = len(SEGMENT_HEADER) + sum(map(len, self._frames))
            return finished

    def drop(self, segment: int) -> None:
        """Delete the oldest segment. Raises ValueError for any other and for the last, RunDirError.

        Oldest first, so that a gap in the numbers always means that a segment was lost. Files of a later
        writer's stay, whatever their number.
        """
        with self._writing:
            numbers = self.segments()
            if segment != numbers[0] or len(numbers) == 1:
                raise ValueError(f"segment {segment} cannot be dropped: the log holds {[*numbers]}")
            self._remove([one for one in _segments_on_disk(self.directory) if one <= (segment, self._epoch)])
            del self._names[segment]

    def remove_replaced(self) -> None:
        """Delete what earlier writers made of the segment that is written to: call this once the head
        names the copy. Raises RunDirError."""
        with self._writing:
            own = (self.segment, self._epoch)
            found = _segments_on_disk(self.directory)
            self._remove([one for one in found if one[0] == own[0] and one[1] < own[1]])

    def refuse(self, reason: str) -> None:
        """Take nothing more, as after a failed write."""
        self._failure = self._failure or reason

    def _remove(self, segments: list[tuple[int, int]]) -> None:
        with disk_errors(self.directory):
            for number, epoch in sorted(segments):
                if epoch <= self._epoch:
                    with suppress(FileNotFoundError):  # a later writer was quicker
                        self._files.remove(self.directory / _name(number, epoch))
            if segments:
                self._files.fsync_dir(self.directory)

    def close(self) -> None:
        """Sync what is buffered, unless the log has failed, and close the file. Raises RunDirError."""
        with self._writing:
            try:
                if not self._failure:
                    self._sync()
            finally:
                self._closed = True
                self._failure = self._failure or "the log is closed"
                if self._fd >= 0:
                    fd, self._fd = self._fd, -1
                    with disk_errors(self.directory):
                        self._files.close(fd)

    def _sync(self) -> None:
        self._refuse_after_failure()
        with self._poisoned_on_error():
            with self._buffering:
                frames, self._frames = self._frames, []
            if frames:
                self._files.write(self._fd, b"".join(frames))
                self._files.fsync(self._fd)

    def _refuse_after_failure(self) -> None:
        if self._failure:
            what = f"nothing more is written here: {self._failure}"
            raise RunDirError(str(self.directory), what, "Resume the run to go on.")

    @contextmanager
    def _poisoned_on_error(self) -> Generator[None]:
        try:
            with disk_errors(self.directory / self._names[self.segment]):
                yield
        except BaseException as error:  # an interrupt too: it can leave half a record behind
            reason = error.what if isinstance(error, RunDirError) else type(error).__name__
            self._failure = f"an earlier write failed ({reason})"
            raise


def _name(number: int, epoch: int) -> str:
    return f"{number:06d}-{epoch:04d}.wal" if epoch else f"{number:06d}.wal"


def _segments_on_disk(directory: Path) -> list[tuple[int, int]]:
    """Number and epoch of every segment, also of those that do not count."""
    with disk_errors(directory):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
    return [segment_of(name) for name in names if _SEGMENT_NAME.fullmatch(name)]


def _remove_unfinished(directory: Path, epoch: int, files: Files) -> None:
    """Remove what earlier writers had not finished. Raises RunDirError."""
    with disk_errors(directory):
        for part in directory.glob(f"*{PART}"):
            name = part.name.removesuffix(PART).rpartition(".")[0]
            if not _SEGMENT_NAME.fullmatch(name) or segment_of(name)[1] < epoch:
                files.remove(part)


def _frame(payload: bytes) -> bytes:
    length = len(payload)
    return _HEAD.pack(length, crc32(payload, crc32(_LENGTH.pack(length)))) + payload


def _begin(
    directory: Path,
    number: int,
    epoch: int,
    files: Files,
    content: bytes | Iterator[bytes] = SEGMENT_HEADER,
) -> str:
    """Make a segment that holds its header, or this; returns its name. Raises RunDirError."""
    path = directory / _name(number, epoch)
    try:
        write_new(path, content, files)
    except FileExistsError as error:
        raise RunDirError(
            str(path), "another process has begun this log segment", "Let one process at a time write here."
        ) from error
    return path.name


def _scan(directory: Path, names: Sequence[str], strict: bool = False) -> Iterator[Entry | Damage]:
    """As `scan`; `strict`: raises RunDirError if one of these is missing."""
    expected = segment_of(names[0])[0] if names else 0
    for name in names:
        number, _ = segment_of(name)
        if number != expected:
            yield Damage("missing", expected, 0, 0)
        yield from _scan_segment(directory, name, name == names[-1], strict)
        expected = number + 1


def _scan_segment(directory: Path, name: str, last: bool, strict: bool) -> Iterator[Entry | Damage]:
    path = directory / name
    number, _ = segment_of(name)
    to_the_end = "tail" if last else "rest"
    with disk_errors(path):
        try:
            file = path.open("rb", buffering=_CHUNK_BYTES)
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
                    raise RunDirError(
                        str(path),
                        f"this log has format {header[len(_MAGIC)]}, and this version reads format {_FORMAT}",
                        "Use the version of culturepark that the run was made with.",
                    )
                yield Damage("header", number, 0, len(header))
            offset = len(header)
            while offset < size:
                payload = _payload_at(file, offset, size)
                if payload is not None:
                    yield Entry(number, offset, payload)
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


def _set_aside(directory: Path, name: str, damage: Damage, files: Files) -> Damage:
    """Copy the damaged bytes to `orphans/`. Raises RunDirError."""
    segment = directory / name
    target = orphan_path(directory.parent, f"{name}.at-{damage.offset}")
    make_dirs(target.parent, files)

    def chunks() -> Iterator[bytes]:
        with segment.open("rb") as file:
            file.seek(damage.offset)
            left = damage.bytes
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk

    write_new(target, chunks(), files)
    return structs.replace(damage, saved=target.relative_to(directory.parent).as_posix())


def _clean_copy(directory: Path, name: str, last: bool, known: list[Damage]) -> Iterator[bytes]:
    """The segment's content without its damage, in chunks. Raises RunDirError."""
    batch, batch_bytes = [SEGMENT_HEADER], 0
    for item in _scan_segment(directory, name, last, strict=True):
        if isinstance(item, Entry):
            batch.append(_frame(item.payload))
            batch_bytes += len(item.payload)
            if batch_bytes >= _CHUNK_BYTES:
                yield b"".join(batch)
                batch, batch_bytes = [], 0
        elif item not in known:
            where = str(directory / name)
            raise RunDirError(where, "two readings of this file differ", "Check the disk and the memory.")
    yield b"".join(batch)
