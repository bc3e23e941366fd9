"""One small real call for each model role, with a verdict for each."""

from __future__ import annotations

import asyncio
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from culturepark.errors import CultureParkError
from culturepark.models import ModelError, open_chat, open_embedder
from culturepark.models.embedded import ChatServer, EmbeddingServer, embedded_name, require_engine
from culturepark.ports import Prompt, Sampling
from culturepark.preflight import check_endpoints, models_in_use
from culturepark.prompts.text import tidy
from culturepark.settings import CHAT_ROLES, ModelSettings, Role, RoleSettings, Settings

_DEADLINE_S = 120.0
"""A model that is loaded on demand takes its time for the first word."""
_ANSWER_TOKENS = 8
_GIB = 1 << 30
_LITTLE_SPACE_BYTES = 1 * _GIB

_FIXES = {
    "unauthorised": "Check the key in {key}, and the account behind it.",
    "no_such_model": "Check `model` in [models.{name}], and its address (it mostly ends in /v1).",
    "bad_request": 'Check [models.{name}]: some endpoints want `max_tokens_field = "max_completion_tokens"`.',
    "rate_limited": "Wait, or lower `limits.requests_in_flight`.",
    "timeout": "See whether the model is still loading, then try again.",
    "connection": "Start the model server, or correct `base_urls` in [models.{name}].",
    "invalid_reply": "Check `base_urls` in [models.{name}]: an OpenAI-compatible one mostly ends in /v1.",
}


_OF_SMALL_MODELS: dict[Role, str] = {
    "extractor": "sentences are taken word for word",
    "verifier": "the embedder verifies",
}


class Verdict(Struct, frozen=True):
    """What was found of some roles, or of this machine. `fix` is empty where nothing is wrong."""

    who: str
    ok: bool
    words: str
    fix: str = ""


async def examine_models(settings: Settings) -> list[Verdict]:
    """One verdict for each role, in their order; models that roles share are called once."""
    used = models_in_use(settings)
    found: dict[Role, Verdict] = {}
    for name, roles in used.items():
        for embedder in sorted({role == "embedder" for role in roles}):
            mine: list[Role] = [role for role in roles if (role == "embedder") == embedder]
            verdict = await _examine(settings, name, embedder)
            for role in mine:
                found[role] = replace(verdict, who=role)
                if role != mine[0]:
                    found[role] = Verdict(role, verdict.ok, f"the same model as {mine[0]}")
    if settings.refine.enabled:
        for role, instead in _OF_SMALL_MODELS.items():
            found.setdefault(role, Verdict(role, True, f"needs no call: {instead} (small profile)"))
    roles: tuple[Role, ...] = (*CHAT_ROLES, "embedder")
    return [found[role] for role in roles if role in found]


async def _examine(settings: Settings, name: str, embedder: bool) -> Verdict:
    model = settings.models[name]
    limits = replace(settings.limits, retries=0, deadline_s=min(_DEADLINE_S, settings.limits.deadline_s))
    began = time.monotonic()
    try:
        if model.engine == "openai":
            await check_endpoints(_only(settings, name))
        async with _served(model, embedder) as ready:
            began = time.monotonic()
            if embedder:
                words = await _embed(ready, replace(settings, limits=limits))
            else:
                words = await _answer(ready, replace(settings, limits=limits))
    except CultureParkError as error:
        return Verdict("", False, f"{error.where}: {error.what}", error.fix)
    except ModelError as error:
        fix = _FIXES.get(error.kind, "See the endpoint's own log.").format(name=name, key=model.api_key_env)
        return Verdict("", False, f"{error.kind}: {error.reason}", fix)
    latency_s = time.monotonic() - began
    what = embedded_name(model, embedder) if model.engine == "embedded" else model.model or model.engine
    return Verdict("", True, f"{tidy(what)}, {words}, {latency_s:.2f} s")


async def _answer(model: ModelSettings, settings: Settings) -> str:
    chat = open_chat(model, settings.limits)
    prompt = Prompt().add("user", "Answer with one word: what colour is the sky on a clear day?")
    try:
        reply = await chat.complete(
            prompt, Sampling(temperature=0.0, max_tokens=_ANSWER_TOKENS), affinity="doctor"
        )
    except ModelError as error:
        if error.kind != "empty_reply":
            raise
        return "answered with nothing at so low a limit, as models that think first do"
    finally:
        await chat.close()
    return f'answered "{" ".join(tidy(reply.text).split())[:40]}"'


async def _embed(model: ModelSettings, settings: Settings) -> str:
    embedder = open_embedder(model, settings.limits)
    try:
        vectors = await embedder.embed(["a clear sky is blue"])
    finally:
        await embedder.close()
    return f"{vectors.shape[1]} dimensions"


@asynccontextmanager
async def _served(model: ModelSettings, embedder: bool) -> AsyncGenerator[ModelSettings]:
    """The model with an address to call; an embedded one is served by this process for as long."""
    if model.engine != "embedded":
        yield model
        return
    require_engine(model, embedder)
    if embedder:
        vectors = EmbeddingServer(0)
        url = await vectors.start()
        try:
            yield replace(model, base_urls=(url,))
        finally:
            await vectors.stop()
        return
    server = await asyncio.to_thread(ChatServer, replace(model, parallel=1), 0)
    yield replace(model, base_urls=(server.url,))


def _only(settings: Settings, name: str) -> Settings:
    """Settings in which every role has this model, so that nothing else is looked at."""
    roles = RoleSettings(speaker=name, embedder=name)
    return replace(settings, roles=roles)


def examine_machine(folder: Path) -> list[Verdict]:
    """Python, Ray and the disk."""
    python = platform.python_version()
    free = shutil.disk_usage(folder).free
    little = free < _LITTLE_SPACE_BYTES
    return [
        Verdict("Python", sys.version_info >= (3, 11), python, ""),
        _ray(),
        Verdict("disk", not little, f"{free / _GIB:.1f} GiB free", "Make room." if little else ""),
    ]


def _ray() -> Verdict:
    # In a process of its own: this package works without Ray, and importing it here takes a while.
    command = [sys.executable, "-c", "import ray; print(ray.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return Verdict("Ray", False, f"it cannot be tried: {type(error).__name__}", "Run `pip install ray`.")
    if done.returncode:
        last = (tidy(done.stderr).splitlines() or ["no reason was given"])[-1][:200]
        return Verdict("Ray", False, f"it cannot be imported: {last}", "Install culturepark again.")
    return Verdict("Ray", True, tidy(done.stdout).splitlines()[-1])
