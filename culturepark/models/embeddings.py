"""Embeddings over any OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from culturepark.models.errors import ModelError
from culturepark.models.http import HttpEndpoint
from culturepark.ports import Vectors
from culturepark.settings import LimitSettings, ModelSettings

_BATCH = 64
"""Texts of one request."""


class _Row(Struct):
    embedding: list[float]
    index: int


class _Reply(Struct):
    data: list[_Row]


_decoder = msgspec.json.Decoder(_Reply)


class HttpEmbedder:
    """One embedding model at one endpoint. Implements ports.Embedder."""

    def __init__(
        self, model: ModelSettings, limits: LimitSettings, endpoint: HttpEndpoint | None = None
    ) -> None:
        self._http = endpoint or HttpEndpoint(model, limits)
        self._model = model.model or "embedded"
        self._dimensions = model.dimensions

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """One row of length 1 a text, in order. Raises ModelError."""
        parts = [await self._batch(texts[at : at + _BATCH]) for at in range(0, len(texts), _BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)

    async def _batch(self, texts: Sequence[str]) -> Vectors:
        fields: dict[str, Any] = {"model": self._model, "input": list(texts), "encoding_format": "float"}
        if self._dimensions:
            fields["dimensions"] = self._dimensions
        reply = await self._http.post("/embeddings", msgspec.json.encode(fields))
        try:
            rows = sorted(_decoder.decode(reply.body).data, key=lambda row: row.index)
            vectors = np.array([row.embedding for row in rows], dtype=np.float32)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            raise ModelError("invalid_reply", f"the reply is not a list of embeddings: {error}") from None
        if vectors.ndim != 2 or len(vectors) != len(texts):
            what = f"{len(texts)} texts gave embeddings of shape {vectors.shape}"
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
