"""Embeddings over any OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from culturepark.models.batches import batches
from culturepark.models.endpoint import HttpEndpoint, OnRetry
from culturepark.models.errors import ModelError
from culturepark.ports import Embedding, Vectors
from culturepark.settings import LimitSettings, ModelSettings
from culturepark.usage import UNREPORTED, Usage

_BATCH, _BATCH_CHARACTERS = 64, 1 << 16
"""The most texts of a request, and its most characters unless it is one text: some endpoints refuse more."""
_USELESS = 2
"""After this many useless replies, one more ends the call: each is billed."""
_ENORMOUS = 1e6
"""No number of an embedding is larger, unless it was decoded with the wrong width."""
_ROW_BYTES = 1 << 20
"""An embedding has at most this many bytes of JSON: decoded, digits need up to sixteen times the memory."""


Encoding = Literal["base64", "float"]


class _Row(Struct):
    embedding: msgspec.Raw
    index: int


class _Usage(Struct):
    prompt_tokens: msgspec.Raw = msgspec.Raw(b"null")


class _Reply(Struct):
    data: list[_Row]
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Reply)
_numbers = msgspec.json.Decoder(list[float])
_base64 = msgspec.json.Decoder(bytes)
_tokens = msgspec.json.Decoder(int)


class HttpEmbedder:
    """One embedding model at one endpoint. Implements ports.Embedder."""

    def __init__(
        self,
        model: ModelSettings,
        limits: LimitSettings,
        endpoint: HttpEndpoint | None = None,
        on_retry: OnRetry | None = None,
    ) -> None:
        self._http = endpoint or HttpEndpoint(model, limits, on_retry=on_retry)
        self._model = model.served_name
        self._dimensions = model.dimensions
        self._limits = limits
        self._width = 0
        self._encoding: Encoding = "base64"
        self._proven = False
        """Whether an answer in base64 was read."""

    async def embed(self, texts: Sequence[str]) -> Embedding:
        """One row of length 1 a text, in order; see ports.Embedder. Raises ModelError."""
        parts: list[Vectors] = []
        spent = Usage()
        for some in batches(texts, _BATCH_CHARACTERS, _BATCH):
            try:
                part = await self._batch(some)
            except ModelError as error:
                error.usage += spent
                raise
            parts.append(part.vectors)
            spent += part.usage
        return Embedding(np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32), spent)

    async def _batch(self, texts: Sequence[str]) -> Embedding:
        """Ask for base64, since numbers in JSON are far slower to decode, until it turns out that this
        endpoint does not support it: some refuse it, some send useless replies."""
        encoding, rejected = self._encoding, False
        useless = tried = 0
        spent = Usage()
        while True:
            body = self._body(texts, encoding)
            try:
                reply = await self._http.post("/embeddings", body, skip=useless, tried=tried)
            except ModelError as error:
                spent = error.usage = spent + error.usage
                rejected = _rejects_encoding(error)
                if encoding == "float" or error.kind != "bad_request" or (self._proven and not rejected):
                    raise
                encoding = "float"
                tried = error.attempts - 1  # that the encoding was refused is no failed attempt
                continue
            tried = reply.retries + 1
            spent += reply.lost
            try:
                read = self._read(reply.body, reply.url, len(texts))
            except ModelError as error:
                spent = error.usage = spent + error.usage
                error.attempts = tried
                if useless >= _USELESS or tried > self._limits.retries:
                    raise
                useless += 1
                if not self._proven:
                    encoding = "float"
                continue
            if encoding == "float" and (rejected or not self._proven):
                self._encoding = encoding
            return Embedding(read.vectors, spent + read.usage)

    def _body(self, texts: Sequence[str], encoding: Encoding) -> bytes:
        fields: dict[str, Any] = {
            "model": self._model,
            "input": list(texts),
            "encoding_format": encoding,
        }
        if self._dimensions:
            fields["dimensions"] = self._dimensions
        return msgspec.json.encode(fields)

    def _read(self, raw: bytes, url: str, count: int) -> Embedding:
        """The `count` embeddings in a reply. Raises ModelError with the reply's usage."""
        usage = UNREPORTED
        try:
            reply = _decoder.decode(raw)
            tokens = _count(reply.usage.prompt_tokens) if reply.usage else None
            if tokens is not None:
                self._http.replicas.spent(url, tokens, 0)
                usage = Usage(calls=1, prompt_tokens=tokens)
            return Embedding(self._vectors(reply.data, count), usage)
        except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
            what = f"the reply is not a list of embeddings: {self._http.safe(str(error))}"
            raise ModelError("invalid_reply", what, usage=usage) from None
        except ModelError as error:
            error.usage = usage
            raise

    def _vectors(self, data: Sequence[_Row], count: int) -> Vectors:
        rows = sorted(data, key=lambda row: row.index)
        if [row.index for row in rows] != list(range(count)):
            raise ValueError(f"{count} texts gave {len(rows)} rows")
        vectors = np.array([_vector(row.embedding) for row in rows])
        if not self._proven and _in_base64(rows[0].embedding) and _of_double_size(vectors):
            raise ValueError("these are numbers of 64 bits in base64")
        if vectors.ndim != 2 or not vectors.shape[1]:
            what = f"{count} texts gave embeddings of shape {vectors.shape}"
            raise ModelError("invalid_reply", what)
        vectors = unit(vectors)
        self._proven = self._proven or _in_base64(rows[0].embedding)
        width = vectors.shape[1]
        self._width = self._width or width
        if width != self._width:
            # Replicas that serve different models would give vectors that cannot be compared.
            what = f"embeddings have {width} dimensions, and had {self._width} before"
            raise ModelError("invalid_reply", what)
        return vectors

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()


def _vector(raw: msgspec.Raw) -> Vectors:
    if len(raw) > _ROW_BYTES:
        raise ValueError("an embedding is too long")
    if _in_base64(raw):
        return np.frombuffer(_base64.decode(raw), dtype="<f4")
    with np.errstate(over="ignore"):  # `unit` refuses what is infinite
        return np.array(_numbers.decode(raw), dtype=np.float32)


def _rejects_encoding(error: ModelError) -> bool:
    """Whether a refusal says that it is because of base64."""
    words = error.reason.lower()
    return error.kind == "bad_request" and ("base64" in words or "encoding_format" in words)


def _in_base64(raw: msgspec.Raw) -> bool:
    return bytes(memoryview(raw)[:1]) == b'"'


def _of_double_size(vectors: Vectors) -> bool:
    """Whether these are halves of 64-bit numbers, which some servers once sent. Of numbers that had 16 or 32
    bits before, the lower halves are zeros and the upper ones hardly ever are, or some are enormous."""
    lower, upper = vectors[:, ::2], vectors[:, 1::2]
    halves = not lower.any() and int(np.count_nonzero(upper)) > 0.9 * upper.size
    return halves or float(np.abs(vectors).max()) > _ENORMOUS


def _count(raw: msgspec.Raw) -> int | None:
    """A number of tokens; None if it cannot be one, since some servers write it oddly."""
    try:
        tokens = _tokens.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return tokens if 0 <= tokens < 1 << 40 else None


def unit(vectors: Vectors) -> Vectors:
    """Rows scaled to length 1 (L2 normalization); rows of zeros stay zeros. Raises ModelError on numbers that
    are not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise ModelError("invalid_reply", "an embedding holds numbers that are not finite, or too large")
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
