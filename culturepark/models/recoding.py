"""The packaged weights in a format that the engine multiplies fast.

They come in Q4_1, for which the engine has no fast product of matrices. In Q8_0 they keep their values, to
within half a percent of the largest in each 32, and a prompt takes less time (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

import structlog

FORMAT = "Q8_0"


def cache_folder() -> Path:
    """Where model files are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "culturepark" / "gguf"


def recoded(path: Path, digest: str) -> Path:
    """The file at `path`, whose sha256 is `digest`, with its Q4_1 tensors in Q8_0; made at first use.

    Where it cannot be made, on a full disk or in a home that is read-only, the file as it is.
    """
    target = cache_folder() / f"{digest[:16]}-{FORMAT}.gguf"
    if target.is_file():
        return target
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(path, part)
        os.replace(part, target)  # several processes may make it at once; each makes the same
    except OSError as error:
        structlog.get_logger().warning("weights_not_recoded", why=str(error))
        return path
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return target


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
