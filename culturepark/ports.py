"""What the domain needs of the world. Adapters live in `culturepark/models`, `culturepark/store`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import msgspec
from msgspec import Struct

from culturepark.text import without_tokens
from culturepark.usage import Usage

if TYPE_CHECKING:  # agents import this, have no vectors, and should start soon
    import numpy as np
    from numpy.typing import NDArray

Vectors: TypeAlias = "NDArray[np.float32]"
"""Embeddings, shape (texts, dimensions), float32, each row of length 1."""


class Sampling(Struct, frozen=True, omit_defaults=True):
    """How a reply is sampled; sent as it stands. `extra` holds what only some servers know.

    `top_logprobs` asks for that many of the likeliest first tokens, where the endpoint reports them.
    """

    temperature: float = 0.7
    max_tokens: int = 168
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int = 0
    extra: dict[str, Any] = {}


class Prompt:
    """A chat prompt that only grows: messages are encoded once, when they are added.

    The bytes of an earlier prompt are a prefix of the bytes of a later one, so a server's prefix
    cache stays warm and a long history costs nothing to send again but the sending.

    Roles alone say who speaks: words that a chat template would read as its own special tokens are broken up
    here, on the way of all text to all models (`text.without_tokens`).
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[bytes] = ()) -> None:
        self._parts = list(parts)

    def add(self, role: str, content: str) -> Prompt:
        """Append one message; returns self."""
        self._parts.append(msgspec.json.encode({"role": role, "content": without_tokens(content)}))
        return self

    def copy(self) -> Prompt:
        """A prompt that can grow by itself from here."""
        return Prompt(self._parts)

    def encoded(self) -> bytes:
        """The JSON array of messages, without its closing bracket."""
        return b"[" + b",".join(self._parts)

    def messages(self) -> list[dict[str, str]]:
        """The messages, decoded."""
        return [msgspec.json.decode(part) for part in self._parts]

    def __len__(self) -> int:
        return len(self._parts)


class Completion(Struct, frozen=True):
    """A model's reply. `finish_reason` is the endpoint's word: `stop`, `length`, ...

    `first_tokens` are the likeliest tokens, each with its log-probability, where the reply's first word
    begins; empty unless they were asked for and the endpoint reported them.
    """

    text: str
    usage: Usage
    finish_reason: str
    model: str
    endpoint: str
    latency_s: float
    first_tokens: tuple[tuple[str, float], ...] = ()


class ChatModel(Protocol):
    """Something that answers a chat prompt."""

    async def complete(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        affinity: str,
        schema: dict[str, Any] | None = None,
    ) -> Completion:
        """Answer `prompt`.

        `affinity` keeps calls of one dialogue on one replica. It may begin with a number and a dot: then
        dialogues go round the replicas by their numbers, nearly in turn. `schema` is a JSON schema the reply
        must obey, where the endpoint can hold it to that. Raises ModelError.
        """
        ...


class Embedding(Struct, frozen=True, eq=False):
    """An embedder's reply: one row of `vectors` for each text, in order, and the usage of all its calls.

    Tokens that the endpoint does not report are `unreported` in `usage`, never zero.
    """

    vectors: Vectors
    usage: Usage


class Embedder(Protocol):
    """Something that turns texts into vectors."""

    async def embed(self, texts: Sequence[str]) -> Embedding:
        """Embed `texts`. Raises ModelError, whose `usage` is that of all calls up to the failure."""
        ...
