"""Chat over any OpenAI-compatible endpoint, the remote ones and the one on this machine."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from culturepark.models.errors import ModelError
from culturepark.models.http import HttpEndpoint
from culturepark.ports import Completion, Prompt, Sampling, Usage
from culturepark.settings import LimitSettings, ModelSettings


class _Details(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Message(Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(Struct):
    message: _Message
    finish_reason: str | None = None


class _Reply(Struct):
    choices: list[_Choice]
    usage: _Usage | None = None
    model: str | None = None


_decoder = msgspec.json.Decoder(_Reply)


class HttpChatModel:
    """One model at one endpoint. Implements ports.ChatModel."""

    def __init__(
        self, model: ModelSettings, limits: LimitSettings, endpoint: HttpEndpoint | None = None
    ) -> None:
        self._http = endpoint or HttpEndpoint(model, limits)
        self._model = model.model or "embedded"
        self._embedded = model.engine == "embedded"
        self._max_tokens_field = model.max_tokens_field
        self._structured = model.structured
        self._limits = limits

    async def complete(
        self, prompt: Prompt, sampling: Sampling, *, affinity: str, schema: dict[str, Any] | None = None
    ) -> Completion:
        """Answer `prompt`; see ports.ChatModel."""
        try:
            return await self._complete(prompt, sampling, affinity, schema if self._structured else None)
        except ModelError as error:
            if schema is None or not self._structured or not _refuses_format(error):
                raise
            # An endpoint without structured output says so once; from then on we do not ask.
            self._structured = False
            return await self._complete(prompt, sampling, affinity, None)

    async def _complete(
        self, prompt: Prompt, sampling: Sampling, affinity: str, schema: dict[str, Any] | None
    ) -> Completion:
        body = b"".join((b'{"messages":', prompt.encoded(), b"],", self._parameters(sampling, schema)[1:]))
        spent = Usage()
        attempt = 0
        while True:
            reply = await self._http.post("/chat/completions", body, affinity=affinity)
            try:
                return self._read(reply.body, reply.url, reply.latency_s, spent)
            except ModelError as error:
                if not error.passing or attempt >= min(2, self._limits.retries):
                    raise
                spent = error.usage
                attempt += 1

    def _parameters(self, sampling: Sampling, schema: dict[str, Any] | None) -> bytes:
        fields: dict[str, Any] = {
            "model": self._model,
            "temperature": sampling.temperature,
            self._max_tokens_field: sampling.max_tokens,
        }
        if sampling.top_p is not None:
            fields["top_p"] = sampling.top_p
        if sampling.stop:
            fields["stop"] = sampling.stop
        if sampling.seed is not None:
            fields["seed"] = sampling.seed
        if schema is not None:
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            }
        if self._embedded:
            fields["cache_prompt"] = True
        return msgspec.json.encode(fields | sampling.extra)

    def _read(self, raw: bytes, url: str, latency_s: float, spent: Usage) -> Completion:
        try:
            reply = _decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            usage = spent + Usage(calls=1, unreported=1)
            raise ModelError(
                "invalid_reply", f"the reply is not a chat completion: {error}", usage=usage
            ) from None
        usage = spent + _usage(reply.usage)
        if not reply.choices:
            raise ModelError("invalid_reply", "the reply has no choices", usage=usage)
        choice = reply.choices[0]
        reason = choice.finish_reason or ""
        if reason == "content_filter" or (choice.message.refusal and not choice.message.content):
            raise ModelError("refused", (choice.message.refusal or "content filter")[:240], usage=usage)
        text = choice.message.content or ""
        if not text.strip():
            raise ModelError("empty_reply", f"the reply is empty (finish_reason {reason!r})", usage=usage)
        return Completion(text, usage, reason, reply.model or self._model, url, latency_s)

    async def close(self) -> None:
        """Close the session."""
        await self._http.close()


def _usage(usage: _Usage | None) -> Usage:
    if usage is None:
        return Usage(calls=1, unreported=1)
    details = usage.prompt_tokens_details
    return Usage(
        calls=1,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        completion_tokens=usage.completion_tokens,
    )


def _refuses_format(error: ModelError) -> bool:
    return error.kind == "bad_request" and "format" in error.reason.lower()
