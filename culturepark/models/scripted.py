"""A fake model and a fake embedder for tests and benchmarks: no network, no weights.

Replies follow from the prompt alone (deterministic), so two runs say the same whatever the number of
processes or the order of calls. It never pretends to be a model: its name is `scripted` wherever
provenance is kept. Its rules are given as the model's name, `key=value` pairs separated by spaces:

    latency_ms=20     each call takes that long
    fail_every=100    one prompt in 100 fails, always the same ones
    fail_kind=server  with this kind of failure
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any, cast, get_args

import msgspec
import numpy as np

from culturepark.errors import ConfigError
from culturepark.messages import FailureKind
from culturepark.models.embeddings import unit
from culturepark.models.errors import ModelError
from culturepark.ports import Completion, Embedding, Prompt, Sampling
from culturepark.usage import UNREPORTED, Usage

_WHO = "My mother|My father|My village|Our neighbour|My teacher|My family|Our town|My grandfather".split("|")
_DOES = "always said that|showed me that|believes that|taught us that|would never doubt that".split("|")
_WHAT = (
    "elders are to be heard first|guests are fed before the family|work comes ahead of rest|"
    "a promise binds the whole house|children speak when they are ready|help is given without being asked|"
    "a festival brings people together again|a quiet life is a good life|learning opens every door|"
    "prayer gives the day its shape|bread is never thrown away|one shares what one has"
).split("|")
_WHY = "since it keeps peace|as it was in old times|because life is short|for it holds us together".split("|")


class ScriptedChat:
    """Answers any of the project's prompts. Implements ports.ChatModel."""

    def __init__(self, rules: str = "") -> None:
        known = dict(part.split("=", 1) for part in rules.split() if "=" in part)
        self._fail_kind: FailureKind = cast(FailureKind, known.get("fail_kind", "server"))
        try:
            self._latency_s = float(known.get("latency_ms", 0)) / 1000
            self._fail_every = int(known.get("fail_every", 0))
            if self._fail_kind not in get_args(FailureKind):
                raise ValueError(f"{self._fail_kind!r} is no kind of failure")
        except ValueError as error:
            fix = "For example `latency_ms=20 fail_every=100 fail_kind=server`."
            raise ConfigError("scripted model", f"its rules cannot be read: {error}.", fix) from None

    async def complete(
        self, prompt: Prompt, sampling: Sampling, *, affinity: str, schema: dict[str, Any] | None = None
    ) -> Completion:
        """Answer by rule; see ports.ChatModel."""
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        raw = prompt.encoded()
        dice = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")
        if self._fail_every and dice % self._fail_every == 0:
            raise ModelError(self._fail_kind, "scripted to fail", usage=UNREPORTED)
        text = self._answer(prompt, schema, dice)
        usage = Usage(calls=1, prompt_tokens=len(raw) // 4, completion_tokens=len(text) // 4)
        return Completion(text, usage, "stop", "scripted", "scripted", self._latency_s)

    def _answer(self, prompt: Prompt, schema: dict[str, Any] | None, dice: int) -> str:
        properties = (schema or {}).get("properties", {})
        if "opinions" in properties:
            message: str = msgspec.json.decode(prompt.messages()[-1]["content"])["message"]
            said = [sentence.strip() + "." for sentence in message.split(".") if sentence.strip()]
            return msgspec.json.encode({"opinions": [{"opinion": s, "quote": s} for s in said]}).decode()
        if "verdict" in properties:
            verdict = ("entails", "entails", "novel", "contradicts")[dice % 4]
            return msgspec.json.encode({"reason": "scripted", "verdict": verdict}).decode()
        return " ".join(_sentence(dice >> (16 * i)) for i in range(1 + dice % 2))

    async def close(self) -> None:
        """Nothing is open: do nothing."""


class ScriptedEmbedder:
    """Vectors of hashed words: texts that share words are near. Implements ports.Embedder."""

    dimensions = 64

    async def embed(self, texts: Sequence[str]) -> Embedding:
        """One row for each text; see ports.Embedder."""
        rows = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                digest = hashlib.sha256(word.encode()).digest()
                row[digest[0] % self.dimensions] += 1 if digest[1] % 2 else -1
        return Embedding(unit(rows), UNREPORTED)

    async def close(self) -> None:
        """Nothing is open: do nothing."""


def _sentence(dice: int) -> str:
    pick = [_WHO[dice % 8], _DOES[dice // 8 % 5], _WHAT[dice // 40 % 12], _WHY[dice // 480 % 4]]
    return " ".join(pick) + "."
