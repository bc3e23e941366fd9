"""The write-ahead log: numbered segments of checksummed records, fsynced in groups (group commit).

What `sync` has returned for is there after kill -9 and after a power loss, in order. What was appended
later may be there in part, in order. A damaged record is named and set aside, never served.

A writer makes and appends to files of its own epoch alone: to go on in an earlier writer's segment it copies
it. So one that was replaced and has not noticed can harm nothing of its successor's (fencing). Which segments
count is for the head to say (`culturepark.store.head`), what is in them for `culturepark.store.segments`.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import structs

from culturepark.errors import RunDirError
from culturepark.store.files import PART, REAL, Files, disk_errors, make_dirs, orphan_path, write_new
from culturepark.store.segments import (
    CHUNK_BYTES,
    MAX_PAYLOAD_BYTES,
    SEGMENT_HEADER,
    Damage,
    LogEntry,
    frame,
    is_segment,
    list_segments,
    replay,
    scan,
    scan_segment,
    segment_name,
    segment_of,
    segments_on_disk,
)


class Log:
    """The writer's side of a log. One process at a time: see `RunLock`.

    `append` may be called while another thread is in `sync`; that sync covers what was appended before
    it began. After a failed write or fsync it is not known what reached the disk, so the log refuses all
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

        `epoch` is the writer's (fencing token), higher than that of any before; None: one more than those in
        the names. `segments` are the names of those that count, as in `scan`. A torn tail is cut, damaged
        records are removed; their bytes go to `orphans/` beside the log and are listed in `damage`. What is
        changed is a copy; the files that were there stay until `drop` and `remove_replaced`. Raises
        RunDirError, also if one of `segments` is missing.
        """
        make_dirs(directory, files)
        if epoch is None:
            epoch = 1 + max((epoch for _, epoch in segments_on_disk(directory)), default=0)
        _remove_unfinished(directory, epoch, files)
        found_names = list_segments(directory) if segments is None else segments
        names = {segment_of(name)[0]: name for name in found_names}
        found = [item for item in scan(directory, found_names, strict=True) if isinstance(item, Damage)]
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
        """The file names of all segments, oldest first."""
        return tuple(self._names.values())

    def replay(self) -> Iterator[LogEntry]:
        """The good records on disk, in order."""
        return replay(self.directory, self.names())

    def append(self, payload: bytes) -> None:
        """Add a record to the next `sync`.

        Raises ValueError if it is longer than MAX_PAYLOAD_BYTES, RunDirError if the log has failed.
        """
        length = len(payload)
        if length > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a log record may hold {MAX_PAYLOAD_BYTES} bytes, this one has {length}")
        record = frame(payload)
        with self._buffering:
            self._refuse_after_failure()
            self._frames.append(record)
            self._size_bytes += len(record)

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
            self._remove([one for one in segments_on_disk(self.directory) if one <= (segment, self._epoch)])
            del self._names[segment]

    def remove_replaced(self) -> None:
        """Delete what earlier writers made of the segment that is written to: call this once the head
        names the copy. Raises RunDirError."""
        with self._writing:
            own = (self.segment, self._epoch)
            found = segments_on_disk(self.directory)
            self._remove([one for one in found if one[0] == own[0] and one[1] < own[1]])

    def refuse(self, reason: str) -> None:
        """Refuse all further work, as after a failed write; `reason` is told in the error."""
        self._failure = self._failure or reason

    def _remove(self, segments: list[tuple[int, int]]) -> None:
        with disk_errors(self.directory):
            for number, epoch in sorted(segments):
                if epoch <= self._epoch:
                    with suppress(FileNotFoundError):  # a later writer was quicker
                        self._files.remove(self.directory / segment_name(number, epoch))
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


def _remove_unfinished(directory: Path, epoch: int, files: Files) -> None:
    """Remove what earlier writers had not finished. Raises RunDirError."""
    with disk_errors(directory):
        for part in directory.glob(f"*{PART}"):
            name = part.name.removesuffix(PART).rpartition(".")[0]
            if not is_segment(name) or segment_of(name)[1] < epoch:
                files.remove(part)


def _begin(
    directory: Path,
    number: int,
    epoch: int,
    files: Files,
    content: bytes | Iterator[bytes] = SEGMENT_HEADER,
) -> str:
    """Make a segment that holds its header, or this; returns its name. Raises RunDirError."""
    path = directory / segment_name(number, epoch)
    try:
        write_new(path, content, files)
    except FileExistsError as error:
        raise RunDirError(
            str(path), "another process has begun this log segment", "Let one process at a time write here."
        ) from error
    return path.name


def _set_aside(directory: Path, name: str, damage: Damage, files: Files) -> Damage:
    """Copy the damaged bytes to `orphans/`. Raises RunDirError."""
    segment = directory / name
    target = orphan_path(directory.parent, f"{name}.at-{damage.offset}")
    make_dirs(target.parent, files)

    def chunks() -> Iterator[bytes]:
        with segment.open("rb") as file:
            file.seek(damage.offset)
            left = damage.bytes
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk

    write_new(target, chunks(), files)
    return structs.replace(damage, saved=target.relative_to(directory.parent).as_posix())


def _clean_copy(directory: Path, name: str, last: bool, known: list[Damage]) -> Iterator[bytes]:
    """The segment's content without its damage, in chunks. Raises RunDirError."""
    batch, batch_bytes = [SEGMENT_HEADER], 0
    for item in scan_segment(directory, name, last, strict=True):
        if isinstance(item, LogEntry):
            batch.append(frame(item.payload))
            batch_bytes += len(item.payload)
            if batch_bytes >= CHUNK_BYTES:
                yield b"".join(batch)
                batch, batch_bytes = [], 0
        elif item not in known:
            where = str(directory / name)
            raise RunDirError(where, "two readings of this file differ", "Check the disk and the memory.")
    yield b"".join(batch)
