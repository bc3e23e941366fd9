"""Parquet shards: written whole, read back, then named; checked against the manifest; strays quarantined."""

# pyarrow ships no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from culturepark.errors import RunDirError
from culturepark.store.files import PART, REAL, Files, disk_errors, make_dirs, orphan_path, write_new
from culturepark.store.manifest import Manifest, Shard, missing_entry
from culturepark.store.paths import inside

_PART_NAME = re.compile(r"part-([0-9]{6,9})-.*")
_SHARD_REPAIR = "Put the file back from a copy of the run, or begin a new run directory."


class Stray(Struct, frozen=True):
    """A file that no commit names: where it was and where it is now, both relative to the run directory.

    `moved_to` is empty for one that stays for now: it may be of a commit that is just being made.
    """

    path: str
    moved_to: str


def commit_table(root: Path, path: str, table: Any, kind: str, files: Files = REAL) -> Shard:
    """Write `table` as zstd Parquet to `path` below `root`; returns what a manifest entry says of it.

    The file is fsynced and read back before it gets its name, and a file that is there already is never
    overwritten. Equal tables give equal bytes. The shard counts only once a manifest entry names it.
    Raises RunDirError.
    """
    target = inside(root, path)
    make_dirs(target.parent, files)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = memoryview(sink.getvalue())
    shard = Shard(path, table.num_rows, len(content), hashlib.sha256(content).hexdigest(), kind)

    def check(part: Path) -> None:
        problems = _problems(part, shard)
        if problems:
            what = f"read back, this is not what was written: {'; '.join(problems)}"
            raise RunDirError(str(target), what, "Check the disk.")

    try:
        write_new(target, [content], files, check)
    except FileExistsError as error:
        fix = "Let one process at a time write here, then resume the run."
        raise RunDirError(str(target), "a file of this name exists", fix) from error
    return shard


def shard_path(kind: str, commit: int, epoch: int) -> str:
    """Where a shard of this commit goes. The epoch keeps its name apart from one that a crash left behind."""
    return f"{kind}/part-{commit:06d}-{epoch:04d}.parquet"


def require_shards(root: Path, manifest: Manifest) -> None:
    """Refuse a run of which a shard is missing or has another size; no content is read.

    Raises RunDirError naming the file.
    """
    for shard in (shard for entry in manifest.entries for shard in entry.shards):
        path = root / shard.path
        with disk_errors(path):
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise RunDirError(str(path), "this shard is missing", _SHARD_REPAIR) from None
        if size != shard.bytes:
            what = f"this shard has {size} bytes, not {shard.bytes}"
            raise RunDirError(str(path), what, _SHARD_REPAIR)


def verify_shard(root: Path, shard: Shard) -> list[str]:
    """What is wrong with the file of `shard`, each problem beginning with its path; empty if nothing is."""
    try:
        problems = _problems(inside(root, shard.path), shard)
    except RunDirError as error:
        problems = [error.what]
    return [f"{shard.path}: {problem}" for problem in problems]


def quarantine_strays(
    root: Path, directories: Iterable[str], manifest: Manifest, files: Files = REAL
) -> list[Stray]:
    """Move the files below these directories that no commit names to `orphans/`, in a stable order.

    They come from a crash between a shard and its commit. Unfinished files (`.part`) of the run directory
    itself and of the manifest's go too. Those of the commit to come stay until its number is in use: an
    earlier writer may not know yet that it was replaced, and make that commit. Only for the holder of the
    `RunLock`. Raises RunDirError, also for a shard of a later commit still: then it is entries of the
    manifest that are missing.
    """
    root = root.resolve()
    # Links are followed in the directories' names, never in the file's own.
    named = {(root / path).parent.resolve() / Path(path).name for path in manifest.paths}
    found = [path for directory in directories for path in _files_below(inside(root, directory))]
    found = [path for path in found if path not in named]
    for place in (root, manifest.directory.resolve()):
        with disk_errors(place):
            found += [path for path in place.glob(f"*{PART}") if path.is_file()]
    strays: list[Stray] = []
    coming = len(manifest.entries) + 1
    for path in sorted({*found}):
        relative = path.relative_to(root)
        commit = _commit_of(path)
        if commit > coming:
            raise missing_entry(manifest.path_of(coming), f", though {relative} was made after it")
        if commit == coming:
            strays.append(Stray(relative.as_posix(), ""))
            continue
        target = orphan_path(root, "-".join(relative.parts))
        make_dirs(target.parent, files)
        with disk_errors(path):
            files.replace(path, target)
            files.fsync_dir(target.parent)
            files.fsync_dir(path.parent)
        strays.append(Stray(relative.as_posix(), target.relative_to(root).as_posix()))
    return strays


def _commit_of(path: Path) -> int:
    """The number of the commit that a shard was made for; 0 if its name does not say."""
    found = _PART_NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def _files_below(directory: Path) -> Iterator[Path]:
    with disk_errors(directory):
        for parent, _, names in os.walk(directory):
            yield from (Path(parent, name) for name in names)


def _problems(path: Path, shard: Shard) -> list[str]:
    try:
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):  # so that the disk is asked, not the cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                return [f"it has {size} bytes, not {shard.bytes}"]
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return ["its content has changed (the sha256 differs)"]
            rows: Any = pq.ParquetFile(file).metadata.num_rows
            return [f"it has {rows} rows, not {shard.rows}"] if rows != shard.rows else []
    except FileNotFoundError:
        return ["it is missing"]
    except (OSError, pa.ArrowException) as error:
        return [f"it cannot be read ({error})"]
