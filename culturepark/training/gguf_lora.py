"""A LoRA adapter of PEFT (safetensors) as a GGUF file, which the embedded engine serves. Needs no torch.

The tensors keep their values. They get the names of the GGUF format, and where a format stores the rotary
halves of q and k interleaved (Llama and its kin), their output rows are put into that order, as was done to
the model itself when it was converted.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from culturepark.errors import TrainingError

Matrix = NDArray[np.float32]

# The model_type of transformers: the architecture's name in GGUF, and whether q and k are reordered.
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")


def convertible(model_config: dict[str, Any]) -> bool:
    """Whether `convert` knows this kind of model; `model_config` is its config.json."""
    return model_config.get("model_type") in _ARCHITECTURES


def convert(adapter: Path, model_config: dict[str, Any], target: Path) -> None:
    """Write the adapter in the folder `adapter` to the GGUF file `target`.

    Raises TrainingError if the adapter has a tensor without a known name in GGUF.
    """
    formats: Any = importlib.import_module("gguf")
    stored: Any = importlib.import_module("safetensors.numpy")
    kind = model_config.get("model_type", "")
    if kind not in _ARCHITECTURES:
        raise _not_convertible(f"models of type {kind!r} are not known here.")
    architecture, interleaved = _ARCHITECTURES[kind]
    about: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    if about.get("use_dora") or about.get("use_rslora"):
        raise _not_convertible("only plain LoRA can be converted.")
    heads = int(model_config["num_attention_heads"])
    kv_heads = int(model_config.get("num_key_value_heads") or heads)
    tensors: dict[str, Matrix] = {}
    for key, values in sorted(stored.load_file(adapter / "adapter_model.safetensors").items()):
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in _LAYERS:
            raise _not_convertible(f"the tensor {key!r} has no known place.")
        matrix = np.asarray(values, dtype=np.float32)
        layer = _LAYERS[match[2]]
        if interleaved and match[3] == "B" and layer in ("attn_q", "attn_k"):
            matrix = interleave(matrix, heads if layer == "attn_q" else kv_heads)
        tensors[f"blk.{match[1]}.{layer}.weight.lora_{match[3].lower()}"] = matrix
    writer = formats.GGUFWriter(str(target), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(about["lora_alpha"]))
    for name, matrix in tensors.items():
        writer.add_tensor(name, matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(rows: Matrix, heads: int) -> Matrix:
    """Rows of each head from two halves in sequence to alternating pairs (rotary interleaving); shape (rows,
    columns)."""
    n_rows, n_columns = rows.shape
    halves = rows.reshape(heads, 2, n_rows // heads // 2, n_columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(n_rows, n_columns))


def _not_convertible(what: str) -> TrainingError:
    fix = "The adapter's safetensors are whole; convert them with llama.cpp's convert_lora_to_gguf.py."
    return TrainingError("GGUF conversion", what, fix)
