"""The packaged weights in a faster format: near to what they were, made once, and never in the way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from culturepark.models.local.recode import cache_folder, recoded

gguf: Any = pytest.importorskip("gguf")
Q4_1, Q8_0, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F32"))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recoded.cache_clear()
    path = tmp_path / "weights.gguf"
    values = np.random.default_rng(1).normal(size=(64, 128)).astype(np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ب", "한"])
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(values, Q4_1), raw_dtype=Q4_1)
    writer.add_tensor("blk.0.ffn_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_stay_and_so_does_all_else(weights: Path) -> None:
    before, after = gguf.GGUFReader(str(weights)), gguf.GGUFReader(str(recoded(weights, "d" * 64)))
    old, new = ({tensor.name: tensor for tensor in reader.tensors} for reader in (before, after))
    assert [tensor.tensor_type for tensor in new.values()] == [Q8_0, F32]
    assert (new["blk.0.ffn_norm.weight"].data == old["blk.0.ffn_norm.weight"].data).all()
    was = gguf.quants.dequantize(old["blk.0.ffn_up.weight"].data, Q4_1).reshape(-1, 32)
    now = gguf.quants.dequantize(new["blk.0.ffn_up.weight"].data, Q8_0).reshape(-1, 32)
    largest = np.abs(was).max(axis=1, keepdims=True)
    assert (np.abs(was - now) <= 0.005 * largest).all()
    named = [{f.name: f.contents() for f in reader.fields.values()} for reader in (before, after)]
    for fields in named:
        fields.pop("general.file_type", None)
        fields.pop("GGUF.kv_count")
    assert named[0] == named[1]


def test_it_is_made_once_and_again_if_it_is_damaged(weights: Path) -> None:
    made = recoded(weights, "d" * 64)
    assert made.parent == cache_folder()
    whole, before = made.read_bytes(), made.stat().st_ino
    recoded.cache_clear()
    assert recoded(weights, "d" * 64) == made
    assert made.stat().st_ino == before
    made.write_bytes(whole[:-1])
    recoded.cache_clear()
    assert recoded(weights, "d" * 64) == made
    assert made.read_bytes() == whole
    assert {path.suffix for path in cache_folder().iterdir()} == {".gguf", ".sha256"}


@pytest.mark.parametrize("trouble", ["a file in its place", "no home", "not allowed", "no gguf"])
def test_where_it_cannot_be_made_the_file_is_read_as_it_is(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def fail(error: Exception) -> Any:
        raise error

    match trouble:
        case "a file in its place":
            (tmp_path / "file").touch()
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        case "no home":
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(Path, "home", lambda: fail(RuntimeError("no home directory")))
        case "not allowed":
            monkeypatch.setattr(Path, "open", lambda *_: fail(PermissionError(13, "not allowed")))
        case _:
            monkeypatch.setitem(sys.modules, "gguf", None)
    assert recoded(weights, "d" * 64) == weights
