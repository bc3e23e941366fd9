"""Checks before a run that cost nothing: keys, addresses, models, the disk (preflight)."""

from __future__ import annotations

import asyncio
import difflib
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec import Struct

from culturepark.errors import ConfigError, EndpointError, RunDirError
from culturepark.models.local.engine import require_engine
from culturepark.models.replicas import base_urls_of
from culturepark.models.secrets import api_key_of, without_key
from culturepark.settings import CHAT_ROLES, ModelSettings, Role, Settings
from culturepark.text import tidy

DEADLINE_S = 10.0
"""Seconds that one probe of an endpoint may last, by the wall clock."""

_LIST_BYTES = 16 << 20
"""Bytes that are read of an endpoint's list of models."""
_HOST_OF_OPENAI = "api.openai.com"
_START = "Start the model server, correct the address, or leave the configuration out for the quickstart."


class _Model(Struct):
    id: str


class _Models(Struct):
    data: list[_Model]


def models_in_use(settings: Settings) -> dict[str, tuple[Role, ...]]:
    """The names of the models that some role needs, with these roles."""
    roles: tuple[Role, ...] = CHAT_ROLES if settings.refine.enabled else ("speaker",)
    used: dict[str, tuple[Role, ...]] = {}
    for role in roles:
        # Small models neither extract nor verify: then these roles call no model of their own.
        if role in ("extractor", "verifier") and settings.model_of(role).profile == "small":
            continue
        used[settings.roles.of(role)] = (*used.get(settings.roles.of(role), ()), role)
    if settings.refine.enabled:
        used[settings.roles.embedder] = (*used.get(settings.roles.embedder, ()), "embedder")
    return used


def check_all(settings: Settings, out: Path) -> None:
    """All checks of a run that cost nothing. Raises ConfigError, EndpointError or RunDirError."""
    check_writable(out)
    for name, roles in models_in_use(settings).items():
        if settings.models[name].engine == "embedded":
            for embedder in {role == "embedder" for role in roles}:
                require_engine(settings.models[name], embedder)
    asyncio.run(check_endpoints(settings))


def check_writable(out: Path) -> None:
    """Raises RunDirError if no file can be made where `out` is or is to be."""
    folder = out.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise RunDirError(str(folder), "this is a file, not a directory.", "Name another directory.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"nothing can be written here: {error.strerror}."
        raise RunDirError(
            str(folder), what, "Check the rights and the disk, or name another --out."
        ) from None


async def check_endpoints(settings: Settings, deadline_s: float = DEADLINE_S) -> None:
    """Ask each replica of each endpoint for its list of models, which costs nothing.

    Raises ConfigError for a key that is missing, EndpointError for an endpoint that does not
    answer, refuses the key, or does not have the model. An endpoint without such a list passes.
    """
    named = [(name, settings.models[name]) for name in models_in_use(settings)]
    remote = [(name, model) for name, model in named if model.engine == "openai"]
    keys = {name: _key_for(name, model) for name, model in remote}
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
        probes = [
            asyncio.ensure_future(_probe(session, name, model, url, keys[name], deadline_s))
            for name, model in remote
            for url in base_urls_of(model)
        ]
        try:
            await asyncio.gather(*probes)
        finally:
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)


def _key_for(name: str, model: ModelSettings) -> str:
    key = api_key_of(model)
    if not key and any(urlsplit(url).hostname == _HOST_OF_OPENAI for url in base_urls_of(model)):
        what = f"the variable {model.api_key_env} holds no key, and {_HOST_OF_OPENAI} needs one."
        fix = f"Run `export {model.api_key_env}=...`, or name another endpoint in `base_urls`."
        raise ConfigError(f"$.models.{name}.api_key_env", what, fix)
    return key


async def _probe(
    session: aiohttp.ClientSession, name: str, model: ModelSettings, url: str, key: str, deadline_s: float
) -> None:
    headers = {**model.headers, **({"Authorization": f"Bearer {key}"} if key else {})}
    where = f"$.models.{name}.base_urls"
    try:
        async with session.get(f"{url}/models", headers=headers, allow_redirects=False) as response:
            status, moved_to = response.status, response.headers.get("Location", "")
            raw = b""
            while status == 200 and len(raw) < _LIST_BYTES and (part := await response.content.read(1 << 16)):
                raw += part
    except TimeoutError:
        what = f"{url} does not answer within {deadline_s:g} s."
        raise EndpointError(where, what, _START) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        reason = _reason(error, key)
        raise EndpointError(where, f"nothing answers at {url} ({reason}).", _START) from None
    if status in (401, 403):
        has = "refuses the key in" if key else "wants a key, and there is none in"
        what = f"{url} {has} {model.api_key_env} (HTTP {status})."
        raise EndpointError(
            f"$.models.{name}.api_key_env", what, f"Put a valid key into {model.api_key_env}."
        )
    if status in (502, 503, 504):
        what = f"{url} answers, but its model server does not (HTTP {status})."
        raise EndpointError(where, what, "It may still be loading: wait and run again.")
    if 300 <= status < 400 and moved_to:
        what = f"{url} redirects to {tidy(without_key(moved_to, key))[:200]}, and redirects are not followed."
        raise EndpointError(where, what, "Name the address that it redirects to.")
    if status == 200:
        _check_listed(name, model, url, raw, key)


def _check_listed(name: str, model: ModelSettings, url: str, raw: bytes, key: str) -> None:
    try:
        listed = [tidy(without_key(one.id, key)) for one in msgspec.json.decode(raw, type=_Models).data]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # some servers answer this path with something else
    wanted = model.model
    if not listed or any(one == wanted or one.endswith(f"/{wanted}") for one in listed):
        return
    close = difflib.get_close_matches(wanted, listed, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(f'`{one}`' for one in close)}? " if close else ""
    some = ", ".join(one[:60] for one in sorted(listed)[:5])
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    what = f"{url} has no model {wanted!r}."
    raise EndpointError(f"$.models.{name}.model", what, f"{hint}It has {some}{more}.")


def _reason(error: Exception, key: str) -> str:
    cause: Any = getattr(error, "os_error", error)
    if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
        return os.strerror(cause.errno)
    return tidy(without_key(str(error) or type(error).__name__, key)).replace("\n", " ")[:200]
