"""What must be there before a run goes on: a deleted file is noticed, and never makes a run begin anew."""

from __future__ import annotations

from pathlib import Path

from culturepark.errors import RunDirError
from culturepark.store.files import REPAIR
from culturepark.store.head import Head, head_path, read_head
from culturepark.store.manifest import Manifest, missing_entry
from culturepark.store.segments import list_segments, missing_segment, segment_of
from culturepark.store.shards import require_shards


def require_all(root: Path, manifest: Manifest, head: Head | None) -> None:
    """Refuse a run that lacks a commit, a log segment or a shard that it had.

    `head` is the newest; None in a new run, and in one that an earlier version made, where less can be told.
    Raises RunDirError naming the file and what to do.
    """
    _require_log_and_entries(root, manifest, head)
    require_shards(root, manifest)


def live_segments(root: Path) -> tuple[str, ...] | None:
    """For readers: the names of the log segments that count; None: all that are there."""
    head = read_head(root / "manifest")
    return head.segments if head else None


def what_is_missing(root: Path, manifest: Manifest) -> RunDirError | None:
    """For readers: the error that the next start of this run would raise, shards apart."""
    while True:
        head = read_head(root / "manifest")
        try:
            _require_log_and_entries(root, manifest, head)
        except RunDirError as error:
            if read_head(root / "manifest") == head:  # else a writer has gone on in the meantime
                return error
            manifest = Manifest.read(root / "manifest")
        else:
            return None


def _require_log_and_entries(root: Path, manifest: Manifest, head: Head | None) -> None:
    if head is None:
        _require_without_head(root / "log", manifest)
        return
    _require_entries(manifest, head)
    for name in head.segments:
        if not (root / "log" / name).exists():
            raise missing_segment(root / "log" / name)


def _require_entries(manifest: Manifest, head: Head) -> None:
    there = len(manifest.entries)
    if there < head.entries:
        why = f": the run had {head.entries} commits"
        raise missing_entry(manifest.path_of(there + 1), why)
    if manifest.sha256_of(head.entries) != head.sha256:
        what = "this is not the entry that the run went on from"
        raise RunDirError(str(manifest.path_of(head.entries)), what, REPAIR)


def _require_without_head(log: Path, manifest: Manifest) -> None:
    segments = [segment_of(name) for name in list_segments(log)]
    if writer := max((epoch for _, epoch in segments), default=0):
        what = "this file is missing: it says which log segments count, and how many commits there were"
        raise RunDirError(str(head_path(manifest.directory, writer)), what, REPAIR)
    if manifest.entries and not segments:
        raise RunDirError(str(log), "the log is missing", REPAIR)
    for number, (there, _) in enumerate(segments, segments[0][0] if segments else 0):
        if number != there:
            raise missing_segment(log / f"{number:06d}.wal")
    if segments and segments[0][0] > 1 and not manifest.entries:
        raise missing_entry(manifest.path_of(1), f": the log begins at segment {segments[0][0]}")
