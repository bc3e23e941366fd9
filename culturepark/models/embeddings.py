"""Embeddings over any OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from culturepark.models.errors import ModelError
from culturepark.models.http import HttpEndpoint, OnRetry
from culturepark.ports import Usage, Vectors
from culturepark.settings import LimitSettings, ModelSettings

_BATCH = 64
"""Texts of one request."""


class _Row(Struct):
    embedding: list[float]
    index: int


class _Usage(Struct):
    prompt_tokens: Any = None


class _Reply(Struct):
    data: list[_Row]
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Reply)


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
        self._model = model.model or "embedded"
        self._dimensions = model.dimensions
        self._limits = limits
        self._width = 0

    async def embed(self, texts: Sequence[str], told: list[Usage] | None = None) -> Vectors:
        """One row of length 1 a text, in order; see ports.Embedder. Raises ModelError."""
        told = [] if told is None else told
        parts = [await self._batch(texts[at : at + _BATCH], told) for at in range(0, len(texts), _BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)

    async def _batch(self, texts: Sequence[str], told: list[Usage]) -> Vectors:
        fields: dict[str, Any] = {"model": self._model, "input": list(texts), "encoding_format": "float"}
        if self._dimensions:
            fields["dimensions"] = self._dimensions
        body = msgspec.json.encode(fields)
        attempt = 0
        while True:
            reply = await self._http.post("/embeddings", body, skip=attempt)
            try:
                return self._read(reply.body, reply.url, len(texts), told)
            except ModelError:
                if attempt >= min(2, self._limits.retries):
                    raise
                attempt += 1

    def _read(self, raw: bytes, url: str, count: int, told: list[Usage]) -> Vectors:
        try:
            reply = _decoder.decode(raw)
            if reply.usage and type(tokens := reply.usage.prompt_tokens) is int and 0 <= tokens < 1 << 40:
                self._http.spent(url, tokens, 0)
                told.append(Usage(calls=1, prompt_tokens=tokens))
            else:
                told.append(Usage(calls=1, unreported=1))
            rows = sorted(reply.data, key=lambda row: row.index)
            vectors = np.array([row.embedding for row in rows], dtype=np.float32)
        except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
            what = f"the reply is not a list of embeddings: {self._http.safe(str(error))}"
            raise ModelError("invalid_reply", what) from None
        if vectors.ndim != 2 or [row.index for row in rows] != list(range(count)) or not vectors.shape[1]:
            what = f"{count} texts gave embeddings of shape {vectors.shape}"
            raise ModelError("invalid_reply", what)
        width = vectors.shape[1]
        self._width = self._width or width
        if width != self._width:
            # Replicas that serve different models would give vectors that cannot be compared.
            what = f"embeddings have {width} dimensions, and had {self._width} before"
            raise ModelError("invalid_reply", what)
        return unit(vectors)

    async def close(self) -> None:
        """Close the session."""
        await self._http.close()


def unit(vectors: Vectors) -> Vectors:
    """Rows scaled to length 1; rows of zeros stay zeros. Raises ModelError on numbers that are none."""
    if not np.isfinite(vectors).all():
        raise ModelError("invalid_reply", "an embedding holds numbers that are not finite")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
