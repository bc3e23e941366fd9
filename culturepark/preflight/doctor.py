"""One small real call for each model role, with a verdict for each."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from culturepark.errors import CultureParkError
from culturepark.models.errors import ModelError
from culturepark.models.local.engine import embedded_name
from culturepark.models.local.serving import served
from culturepark.models.open import open_chat, open_embedder
from culturepark.ports import Prompt, Sampling
from culturepark.preflight.checks import check_endpoints, models_in_use
from culturepark.prompts.full import OPINIONS_SCHEMA, VERDICT_SCHEMA
from culturepark.prompts.profile import sampling_with
from culturepark.prompts.registry import profile_named
from culturepark.settings import ROLES, LimitSettings, ModelSettings, Role, RoleSettings, Settings
from culturepark.text import tidy

_DEADLINE_S = 120.0
"""Seconds that one call may last: a model that is loaded on demand needs many for its first word."""
_ANSWER_TOKENS = 16
"""The limit of tokens of a call without a schema."""
_SCHEMA_TOKENS = 96
"""The limit of tokens of a call with a schema: enough for the shortest reply that obeys it."""
_QUESTION = "Answer with one word: what colour is the sky on a clear day?"
_MESSAGE = '{"message": "Neighbours should help each other."}'
_SCHEMAS: dict[Role, dict[str, Any]] = {"extractor": OPINIONS_SCHEMA, "verifier": VERDICT_SCHEMA}
_TOLERANTLY = "replies are read tolerantly"
_GIB = 1 << 30
_LITTLE_SPACE_BYTES = 1 * _GIB
"""Bytes of free disk space below which the verdict is bad."""

_FIXES = {
    "unauthorised": "Check the key in {key}, and the account behind it.",
    "forbidden": "Check what the key in {key} may do, and the account behind it.",
    "no_such_model": "Check `model` in [models.{name}], and its address (it mostly ends in /v1).",
    "bad_request": "Check [models.{name}] and [sampling]: the endpoint refuses something that they ask for.",
    "rate_limited": "Wait, or lower `limits.requests_in_flight`.",
    "timeout": "See whether the model is still loading, then try again.",
    "connection": "Start the model server, or correct `base_urls` in [models.{name}].",
    "invalid_reply": "Check `base_urls` in [models.{name}]: an OpenAI-compatible one mostly ends in /v1.",
}
"""What to do next, by the kind of a ModelError."""
_OF_SMALL_MODELS: dict[Role, str] = {
    "extractor": "sentences are taken word for word",
    "verifier": "the embedder verifies",
}
"""What stands in for a call, by role, with the small prompt profile."""


class Verdict(Struct, frozen=True):
    """What was found of `subject`, a role or a part of this machine. `fix` is empty if nothing is wrong."""

    subject: str
    ok: bool
    words: str
    fix: str = ""


class _Call(Struct, frozen=True):
    """A call that roles share: their sampling, and the schema their replies must obey."""

    sampling: Sampling
    schema: dict[str, Any] | None


async def examine_models(settings: Settings) -> list[Verdict]:
    """One verdict for each role, in their order; roles whose calls would be alike share one."""
    used = models_in_use(settings)
    found: dict[Role, Verdict] = {}
    for name, roles in used.items():
        for embedder in sorted({role == "embedder" for role in roles}):
            mine: list[Role] = [role for role in roles if (role == "embedder") == embedder]
            found |= await _examine(settings, name, mine)
    if settings.refine.enabled:
        for role, instead in _OF_SMALL_MODELS.items():
            found.setdefault(role, Verdict(role, True, f"needs no call: {instead} (small profile)"))
    return [found[role] for role in ROLES if role in found]


async def _examine(settings: Settings, name: str, roles: Sequence[Role]) -> dict[Role, Verdict]:
    """Verdicts of the roles that one model has, either as a chat model or as an embedder."""
    model = settings.models[name]
    limits = replace(settings.limits, retries=0, deadline_s=min(_DEADLINE_S, settings.limits.deadline_s))
    embedder = "embedder" in roles
    what = embedded_name(model, embedder) if model.engine == "embedded" else model.model or model.engine
    try:
        if model.engine == "openai":
            await check_endpoints(_only(settings, name))
        async with served(replace(model, parallel=1), embedder) as ready:
            if embedder:
                return {"embedder": await _tried("embedder", tidy(what), name, model, _embed(ready, limits))}
            found: dict[Role, Verdict] = {}
            for call, alike in _calls(settings, model, roles):
                first = alike[0]
                verdict = await _tried(first, tidy(what), name, model, _answer(ready, limits, call))
                found[first] = verdict
                for role in alike[1:]:
                    found[role] = Verdict(role, verdict.ok, f"the same call as {first}")
                for role in alike:
                    if role in _SCHEMAS and call.schema is None and model.profile == "full" and verdict.ok:
                        found[role] = replace(found[role], words=f"{found[role].words}, {_TOLERANTLY}")
            return found
    except CultureParkError as error:
        failed = Verdict(roles[0], False, f"{error.where}: {error.what}", error.fix)
    except ModelError as error:
        failed = _failure(roles[0], name, model, error)
    return {r: failed if r == roles[0] else Verdict(r, False, f"the same model as {roles[0]}") for r in roles}


def _calls(settings: Settings, model: ModelSettings, roles: Sequence[Role]) -> list[tuple[_Call, list[Role]]]:
    calls: list[tuple[_Call, list[Role]]] = []
    for role in roles:
        schema = _SCHEMAS.get(role) if model.profile == "full" and model.structured else None
        sampling = sampling_with(profile_named(model.profile).sampling(role), settings, role)
        tokens = _SCHEMA_TOKENS if schema else _ANSWER_TOKENS
        call = _Call(replace(sampling, max_tokens=tokens), schema)
        alike = next((known for one, known in calls if one == call), None)
        if alike is None:
            calls.append((call, [role]))
        else:
            alike.append(role)
    return calls


async def _tried(
    role: Role, what: str, name: str, model: ModelSettings, call: Coroutine[Any, Any, str]
) -> Verdict:
    began = time.monotonic()
    try:
        words = await call
    except ModelError as error:
        return _failure(role, name, model, error)
    return Verdict(role, True, f"{what}, {words}, {time.monotonic() - began:.2f} s")


def _failure(role: Role, name: str, model: ModelSettings, error: ModelError) -> Verdict:
    fix = _FIXES.get(error.kind, "See the endpoint's own log.").format(name=name, key=model.api_key_env)
    reason = error.reason.lower()
    if error.kind == "bad_request":
        if "max_tokens" in reason or "max_completion_tokens" in reason:
            is_default = model.max_tokens_field == "max_tokens"
            other = "max_completion_tokens" if is_default else "max_tokens"
            fix = f"Set `models.{name}.max_tokens_field={other}`."
        elif "temperature" in reason:
            fix = f"Set `sampling.{role}.temperature` to one that it takes, mostly 1."
        elif "top_p" in reason:
            fix = f"Set `sampling.{role}.top_p` to one that it takes, or leave it out."
        elif "schema" in reason:
            fix = f"Set `models.{name}.structured=false`."
    return Verdict(role, False, f"{error.kind}: {error.reason}", fix)


async def _answer(model: ModelSettings, limits: LimitSettings, call: _Call) -> str:
    chat = open_chat(model, limits)
    # Where a schema is sent, the question does not ask for JSON: then JSON shows that the schema did it.
    question = _QUESTION if call.schema is None else _MESSAGE
    prompt = Prompt().add("user", question)
    try:
        reply = await chat.complete(prompt, call.sampling, affinity="doctor", schema=call.schema)
    except ModelError as error:
        if not _ran_out(error, call.sampling):
            raise
        return "answered with nothing at so low a limit, as models that think first do"
    finally:
        await chat.close()
    if call.schema is not None:
        obeys = _obeys(reply.text, call.schema, reply.finish_reason == "length")
        return "structured output works" if obeys else _TOLERANTLY
    return f'answered "{" ".join(tidy(reply.text).split())[:40]}"'


def _ran_out(error: ModelError, sampling: Sampling) -> bool:
    """Whether the reply is missing only because this call is so short, or stops at a line's end."""
    if error.kind == "empty_reply":
        return "'length'" in error.reason or bool(sampling.stop)
    return error.kind == "bad_request" and "limit was reached" in error.reason.lower()


def _obeys(text: str, schema: dict[str, Any], cut: bool) -> bool:
    """Whether a reply is what the schema asks for, or begins so if it was cut."""
    required: list[str] = schema["required"]
    if cut:
        return any(re.match(rf'\s*\{{\s*"{key}"\s*:', text) for key in required)
    try:
        value: Any = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return False
    return isinstance(value, dict) and set(cast(dict[str, Any], value)) == set(required)


async def _embed(model: ModelSettings, limits: LimitSettings) -> str:
    embedder = open_embedder(model, limits)
    try:
        vectors = (await embedder.embed(["a clear sky is blue"])).vectors
    finally:
        await embedder.close()
    return f"{vectors.shape[1]} dimensions"


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
