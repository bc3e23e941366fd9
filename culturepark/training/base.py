"""The base model of a training: what identifies it, and a form of it that can be trained.

Identifying a base model needs no torch; making a GGUF file trainable does.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from culturepark import flock
from culturepark.errors import ConfigError
from culturepark.models.local.weights import sha256_of, weights_name, weights_of
from culturepark.settings import Settings
from culturepark.store.files import make_dirs
from culturepark.training.ports import Base

_END_BYTES = 1 << 20
"""Of a large file, this many bytes at the beginning and at the end are hashed."""
_SMALL_BYTES = 64 << 20
"""A file of at most this many bytes is hashed as a whole."""


def library(name: str) -> Any:
    """A library of the extra `train`, none of which has types. Raises ImportError if it is not installed."""
    return importlib.import_module(name)


def base_of(settings: Settings) -> Base:
    """The base model that the settings name for their backend. Raises ConfigError if it is missing."""
    training = settings.training
    name = training.model or settings.roles.speaker
    model = settings.models[name]
    if training.backend == "openai":
        if model.engine != "openai":
            what = f"the service tunes its own models, and {name!r} is not one of an endpoint."
            fix = 'Name an entry of [models] with `engine = "openai"` in `training.model`.'
            raise ConfigError("training.model", what, fix)
        return Base("name", model.model)
    if training.base:
        return _folder(Path(training.base))
    if model.engine == "embedded":
        path = weights_of(model)
        return Base("gguf", weights_name(model), str(path), sha256_of(path))
    if training.backend == "command":
        return Base("name", model.model or model.engine)
    what = f"the model {name!r} is served elsewhere, so its weights are not here to be trained."
    fix = "Name a folder with the base model, as transformers saves one: `--set training.base=DIR`."
    raise ConfigError("training.base", what, fix)


def _folder(path: Path) -> Base:
    if not (path / "config.json").is_file():
        what = f"{path} holds no model: there is no config.json in it."
        raise ConfigError("training.base", what, "Name a folder as transformers saves one.")
    if not any(path.glob("*.safetensors")):
        what = f"{path} holds no weights in safetensors."
        raise ConfigError("training.base", what, "Name a folder with the model's *.safetensors files.")
    return Base("folder", path.name, str(path.resolve()), _folder_digest(path))


def _folder_digest(path: Path) -> str:
    """A sha256 over names, sizes and contents; of large files over their first and last mebibyte, which
    hold the header and some weights, since reading a large model whole takes minutes."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".model")):
        size = file.stat().st_size
        digest.update(f"{file.name}\n{size}\n".encode())
        with file.open("rb") as opened:
            if size <= _SMALL_BYTES:
                digest.update(opened.read())
            else:
                digest.update(opened.read(_END_BYTES))
                opened.seek(-_END_BYTES, os.SEEK_END)
                digest.update(opened.read())
    return digest.hexdigest()


def trainable_folder(base: Base) -> Path:
    """A folder with the model in safetensors; from a GGUF file it is made once, in float32, and cached.

    Needs torch and gguf for a GGUF file. Raises ConfigError if the base is missing or of a kind that
    transformers cannot read.
    """
    path = Path(base.path)
    if not (path / "config.json" if base.kind == "folder" else path).is_file():
        raise ConfigError(
            "base model", f"{base.path or base.name} is not there.", "Put it back, or name another."
        )
    if base.kind == "folder":
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "culturepark" / "base"
    target = cache / base.digest[:32]
    make_dirs(cache)
    lock = flock.open_file(cache / f"{target.name}.lock")
    try:
        flock.acquire(lock)  # several processes may want it at once; one makes it
        if not target.is_dir():
            part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
            try:
                _convert(path, part)
                os.rename(part, target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(lock)
    return target


def _convert(path: Path, target: Path) -> None:
    """Save the GGUF file `path` as a float32 model.

    transformers reads it as a quantised model, which can be neither trained nor saved; so its weights go into
    a new model of the same shape.
    """
    hub, torch = library("transformers"), library("torch")
    kinds, tokenizers = hub.AutoModelForCausalLM, hub.AutoTokenizer
    try:
        read = kinds.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = tokenizers.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        what = f"transformers cannot read {path.name}: {str(error).splitlines()[0][:200]}"
        fix = "Name the model as a folder of safetensors instead: `--set training.base=DIR`."
        raise ConfigError("base model", what, fix) from None
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = kinds.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
