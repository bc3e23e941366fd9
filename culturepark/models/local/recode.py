"""The packaged weights, requantized to a format that the engine multiplies fast.

They come in Q4_1, for which the engine has no fast matrix product. In Q8_0 they keep their values, to within
half a percent of the largest in each block of 32, and a prompt is read faster (docs/performance.md).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import secrets
import time
from functools import cache
from pathlib import Path
from typing import Any

import structlog

FORMAT = "Q8_0"
"""The quantization that the packaged weights are converted to, as GGUF names it."""
_STALE_S = 600.0
"""A partial file that was not written to for this many seconds was left by a process that was killed."""


def cache_folder() -> Path:
    """Where model files are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "culturepark" / "gguf"


def recoded_files(digest: str) -> list[Path]:
    """What `recoded` keeps of the file whose sha256 is `digest`."""
    target = _target(digest)
    return [path for path in (target, target.with_suffix(".sha256")) if path.is_file()]


def _target(digest: str) -> Path:
    return cache_folder() / f"{digest[:16]}-{FORMAT}.gguf"


@cache
def recoded(path: Path, digest: str) -> Path:
    """The file at `path`, whose sha256 is `digest`, with its Q4_1 tensors in Q8_0; made at first use.

    Where it cannot be made, on a full disk, in a home directory that is read-only or missing, or without
    `gguf`, the file as it is.
    """
    try:
        target = _target(digest)
        sums = target.with_suffix(".sha256")
        if not _is_whole(target, sums):
            _make(path, target, sums)
    except (OSError, RuntimeError, ImportError) as error:
        structlog.get_logger().warning("weights_not_recoded", why=str(error))
        return path
    return target


def _is_whole(target: Path, sums: Path) -> bool:
    try:
        with target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sums.read_text("ascii")
    except (FileNotFoundError, ValueError):
        return False


def _make(source: Path, target: Path, sums: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{target.name}.*.part"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > _STALE_S:
            left.unlink(missing_ok=True)
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        _write(source, part)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # Several processes may make it at once, and each makes the same.
        os.replace(part, target)
        part.write_text(digest, "ascii")
        os.replace(part, sums)
    finally:
        part.unlink(missing_ok=True)


def _write(source: Path, target: Path) -> None:
    formats: Any = importlib.import_module("gguf")
    kinds = formats.GGMLQuantizationType
    reader = formats.GGUFReader(str(source))
    writer = formats.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    try:
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue  # the writer's own
            value = field.contents()
            if field.name == "general.file_type":
                value = int(formats.LlamaFileType.MOSTLY_Q8_0)
            kind, *inner = field.types
            writer.add_key_value(field.name, value, kind, sub_type=inner[-1] if inner else None)
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            if kind == kinds.Q4_1:
                kind = kinds[FORMAT]
                data = formats.quants.quantize(formats.quants.dequantize(data, tensor.tensor_type), kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    with target.open("rb") as file:
        os.fsync(file.fileno())
