"""Reading the shards that the manifest names. Changes nothing."""

# pyarrow ships no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from culturepark.errors import RunDirError
from culturepark.ports import Vectors
from culturepark.store.manifest import Manifest, Shard

_BATCH_ROWS = 1024
"""Rows of a shard that are decoded at a time."""


def rows(
    root: Path, manifest: Manifest, kind: str, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of all shards of a kind, in the order of their commits, a batch at a time.

    Raises RunDirError naming a shard that cannot be read.
    """
    for shard in manifest.shards(kind):
        yield from shard_rows(root, shard, columns)


def shard_rows(root: Path, shard: Shard, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one shard, a batch at a time. Raises RunDirError if it cannot be read."""
    path = root / shard.path
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns) if columns else None):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        what = f"it cannot be read: {error}."
        raise RunDirError(str(path), what, "Run `culturepark check` on the directory.") from None


def kept_vectors(root: Path, manifest: Manifest) -> Iterator[tuple[str, str, Vectors]]:
    """Culture, id and embedding of every sample."""
    for row in rows(root, manifest, "samples", ("culture", "id", "embedding")):
        yield row["culture"], row["id"], np.array(row["embedding"], dtype=np.float32)
