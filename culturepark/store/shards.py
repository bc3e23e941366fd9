"""Parquet shards: written whole, read back, then named; checked against the manifest; strays put aside."""

# pyarrow ships no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from culturepark.errors import RunDirError
from culturepark.store.files import PART, REAL, Files, disk_errors, make_dirs, orphan_path, write_new
from culturepark.store.manifest import Manifest, Shard
from culturepark.store.paths import inside


class Stray(Struct, frozen=True):
    """A file that no commit names: where it was and where it is now, both relative to the run directory."""

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
    itself and of the manifest's go too. Only for the holder of the `RunLock`. Raises RunDirError.
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
    for path in sorted({*found}):
        relative = path.relative_to(root)
        target = orphan_path(root, "-".join(relative.parts))
        make_dirs(target.parent, files)
        with disk_errors(path):
            files.replace(path, target)
            files.fsync_dir(target.parent)
            files.fsync_dir(path.parent)
        strays.append(Stray(relative.as_posix(), target.relative_to(root).as_posix()))
    return strays


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
