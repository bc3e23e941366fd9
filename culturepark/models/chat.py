"""Chat over any OpenAI-compatible endpoint, the remote ones and the one on this machine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeGuard

import msgspec
from msgspec import Struct

from culturepark.models.endpoint import UNKNOWN_USAGE, HttpEndpoint, OnRetry, Reply
from culturepark.models.errors import ModelError
from culturepark.ports import Completion, Prompt, Sampling
from culturepark.settings import LimitSettings, ModelSettings
from culturepark.usage import UNREPORTED, Usage


class _Details(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _PlainUsage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Message(Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(Struct):
    message: _Message
    finish_reason: str | None = None
    logprobs: msgspec.Raw = msgspec.Raw(b"null")  # decoded only if they were asked for


class _Reply(Struct):
    choices: list[_Choice]
    usage: _Usage | None = None
    model: str | None = None


class _Token(Struct):
    token: str
    logprob: float


class _Place(_Token):
    top_logprobs: list[_Token] = []


class _Logprobs(Struct):
    content: list[_Place] | None = None


class _OddReply(Struct):
    """A reply with odd token counts: it is used all the same, and the counts are not decoded, since a few
    megabytes of them could become a hundred."""

    choices: list[_Choice]
    usage: msgspec.Raw = msgspec.Raw(b"null")
    model: str | None = None


_decoder = msgspec.json.Decoder(_Reply)
_odd_decoder = msgspec.json.Decoder(_OddReply)
_plain_usage = msgspec.json.Decoder(_PlainUsage)
_logprobs = msgspec.json.Decoder(_Logprobs | None)
_USELESS = 2
"""After this many useless replies, one more ends the call: each is billed."""
_TOKEN_CHARS = 32
"""The most characters of a token: no tokenizer has as many on average."""
_LEAST_CHARS = 4096
"""A text may always have this many characters, whatever `max_tokens` says."""
_TAILS = 64
"""This many sets of parameters are cached in their encoded form."""


class HttpChatModel:
    """One model at one endpoint. Implements ports.ChatModel."""

    def __init__(
        self,
        model: ModelSettings,
        limits: LimitSettings,
        endpoint: HttpEndpoint | None = None,
        on_retry: OnRetry | None = None,
    ) -> None:
        self._http = endpoint or HttpEndpoint(model, limits, on_retry=on_retry)
        self._model = model.served_name
        self._embedded = model.engine == "embedded"
        self._max_tokens_field = model.max_tokens_field
        self._structured = model.structured
        self._limits = limits
        # Every reply repeats the same few words, and every request one of a few sets of parameters.
        self._word = lru_cache(maxsize=64)(self._http.safe)
        self._tails: dict[tuple[int, int], tuple[Sampling, dict[str, Any] | None, bytes]] = {}

    async def complete(
        self, prompt: Prompt, sampling: Sampling, *, affinity: str, schema: dict[str, Any] | None = None
    ) -> Completion:
        """Answer `prompt`; see ports.ChatModel."""
        asked = schema if self._structured else None
        try:
            return await self._complete(prompt, sampling, affinity, asked)
        except ModelError as error:
            if asked is None or not _refuses_format(error):
                raise
            # An endpoint without structured output says so once; later requests do not ask for it.
            self._structured = False
            return await self._complete(prompt, sampling, affinity, None, error)

    async def _complete(
        self,
        prompt: Prompt,
        sampling: Sampling,
        affinity: str,
        schema: dict[str, Any] | None,
        after: ModelError | None = None,
    ) -> Completion:
        body = b"".join((b'{"messages":', prompt.encoded(), b"],", self._tail(sampling, schema)))
        spent = after.usage if after else Usage()
        # That the format was refused is no failed attempt.
        tried = after.attempts - 1 if after else 0
        useless = 0
        while True:
            try:
                reply = await self._http.post(
                    "/chat/completions", body, affinity=affinity, skip=useless, tried=tried
                )
            except ModelError as error:
                error.usage += spent
                raise
            tried = reply.retries + 1
            if reply.lost.calls:
                spent += reply.lost
            try:
                return self._read(reply, spent, sampling)
            except ModelError as error:
                error.attempts = tried
                if not error.passing or useless >= _USELESS or tried > self._limits.retries:
                    raise
                spent = error.usage
                useless += 1

    def _tail(self, sampling: Sampling, schema: dict[str, Any] | None) -> bytes:
        """The rest of the body, behind the messages."""
        key = (id(sampling), id(schema))
        known = self._tails.get(key)
        if known is None or known[0] is not sampling or known[1] is not schema:
            if len(self._tails) >= _TAILS:
                self._tails.clear()
            known = self._tails[key] = (sampling, schema, self._parameters(sampling, schema)[1:])
        return known[2]

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
        if sampling.top_logprobs:
            fields |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
        if schema is not None:
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            }
        if self._embedded:
            fields["cache_prompt"] = True
        return msgspec.json.encode(fields | sampling.extra)

    def _read(self, came: Reply, spent: Usage, sampling: Sampling) -> Completion:
        try:
            reply = _decoded(came.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            what = f"the reply is not a chat completion: {self._http.safe(str(error))}"
            raise ModelError("invalid_reply", what, usage=spent + UNKNOWN_USAGE) from None
        usage = _usage(reply.usage)
        self._http.replicas.spent(came.url, usage.prompt_tokens, usage.completion_tokens)
        usage = spent + usage
        if not reply.choices:
            raise ModelError("invalid_reply", "the reply has no choices", usage=usage)
        choice = reply.choices[0]
        reason = self._word(choice.finish_reason or "")
        if reason == "content_filter" or (choice.message.refusal and not choice.message.content):
            what = self._http.safe(choice.message.refusal or "content filter")
            raise ModelError("refused", what, usage=usage)
        text = choice.message.content or ""
        if len(text) > _LEAST_CHARS and len(text) > sampling.max_tokens * _TOKEN_CHARS:
            # A server that ignores max_tokens could make a dialogue too large to store.
            what = f"the reply has {len(text)} characters, and {sampling.max_tokens} tokens were asked for"
            raise ModelError("too_large", what, usage=usage)
        text = self._http.keyless(text)
        first = _first_tokens(choice.logprobs) if sampling.top_logprobs else ()
        if not text.strip() and not first:
            raise ModelError("empty_reply", f"the reply is empty (finish_reason {reason!r})", usage=usage)
        model = self._word(reply.model or "") or self._model
        return Completion(text, usage, reason, model, came.url, came.latency_s, first)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()


def _decoded(raw: bytes) -> _Reply:
    try:
        return _decoder.decode(raw)
    except msgspec.ValidationError:
        odd = _odd_decoder.decode(raw)
    try:
        plain = _plain_usage.decode(odd.usage)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Reply(odd.choices, None, odd.model)
    return _Reply(odd.choices, _Usage(plain.prompt_tokens, plain.completion_tokens), odd.model)


def _first_tokens(raw: msgspec.Raw) -> tuple[tuple[str, float], ...]:
    """The alternatives, with their log-probabilities, of a reply's first token that is not white space."""
    try:
        found = _logprobs.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()  # some servers have a shape of their own
    for place in (found and found.content) or ():
        if place.token.strip():
            return tuple((one.token, one.logprob) for one in place.top_logprobs)
    return ()


def _usage(usage: _Usage | None) -> Usage:
    if usage is None or not (_is_count(usage.prompt_tokens) and _is_count(usage.completion_tokens)):
        return UNREPORTED
    prompt = usage.prompt_tokens
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if details else None
    return Usage(
        calls=1,
        prompt_tokens=prompt,
        cached_tokens=min(cached, prompt) if _is_count(cached) else 0,
        completion_tokens=usage.completion_tokens,
    )


def _is_count(tokens: int | None) -> TypeGuard[int]:
    return tokens is not None and 0 <= tokens < 1 << 40


def _refuses_format(error: ModelError) -> bool:
    return error.kind == "bad_request" and "format" in error.reason.lower()
