"""Small worlds for tests: settings, plans, runs, models that say what they are told to."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from culturepark.cultures import Culture, load_cultures
from culturepark.messages import Opinion, Outcome, Turn
from culturepark.models.errors import ModelError
from culturepark.models.scripted import ScriptedEmbedder
from culturepark.plan import Brief, Plan
from culturepark.ports import Completion, Embedding, Prompt, Sampling, Vectors
from culturepark.seeds import Seed, builtin_seeds
from culturepark.settings import Settings
from culturepark.settings_load import decode_settings
from culturepark.store.rundir import Run, open_run
from culturepark.usage import Usage

THREE = ("wvs7-q27", "wvs7-q28", "wvs7-q29")
"""Questions that were asked everywhere."""


@cache
def cultures() -> dict[str, Culture]:
    """The shipped cultures."""
    return load_cultures()


def settings(profile: str = "full", **rooms: Any) -> Settings:
    """Settings on scripted models; `rooms` as they would stand in a file."""
    raw: dict[str, Any] = {
        "models": {"chat": {"engine": "scripted", "profile": profile}, "vectors": {"engine": "scripted"}},
        "roles": {"speaker": "chat", "embedder": "vectors"},
    }
    return decode_settings(raw | rooms, "test")


def plan(of: Settings | None = None, seeds: Sequence[Seed] | None = None, **rooms: Any) -> Plan:
    """A plan on the built-in seeds and the shipped cultures."""
    return Plan(of or settings(**rooms), seeds or builtin_seeds(), cultures())


def small_plan(**plan_room: Any) -> Plan:
    """A plan of one culture and one question, unless told otherwise."""
    room = {"cultures": ["arabic"], "questions": ["wvs7-q28"], "dialogues_per_question": 4}
    return plan(plan=room | plan_room)


def run_in(root: Path, of: Settings) -> Run:
    """A run directory."""
    return open_run(root, of, plan(of))


class FakeChat:
    """Says what `answer` makes of (prompt, schema): a text, a ModelError to raise, or a Completion."""

    def __init__(self, answer: Callable[[Prompt, dict[str, Any] | None], Any]) -> None:
        self._answer = answer
        self.prompts: list[Prompt] = []
        self.schemas: list[dict[str, Any] | None] = []
        self.affinities: list[str] = []
        self.samplings: list[Sampling] = []

    async def complete(
        self, prompt: Prompt, sampling: Sampling, *, affinity: str, schema: dict[str, Any] | None = None
    ) -> Completion:
        self.prompts.append(prompt.copy())
        self.schemas.append(schema)
        self.affinities.append(affinity)
        self.samplings.append(sampling)
        said = self._answer(prompt, schema)
        if isinstance(said, ModelError):
            raise said
        if isinstance(said, Completion):
            return said
        return Completion(
            said, Usage(calls=1, prompt_tokens=10, completion_tokens=5), "stop", "fake", "here", 0.1
        )


class CountingEmbedder(ScriptedEmbedder):
    """Remembers what it was asked to embed."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    async def embed(self, texts: Sequence[str]) -> Embedding:
        self.batches.append(list(texts))
        return await super().embed(texts)


def vector(text: str, dimensions: int = 16) -> Vectors:
    """A unit vector that follows from the first word of `text`, with a little of the rest."""
    first, _, rest = text.partition(" ")
    rows = [
        np.random.default_rng(int(hashlib.sha256(part.encode()).hexdigest()[:12], 16)).normal(size=dimensions)
        for part in (first, rest)
    ]
    mixed = rows[0] + 0.35 * rows[1]
    return (mixed / np.linalg.norm(mixed)).astype(np.float32)


def outcome(brief: Brief, rng: random.Random) -> Outcome:
    """How one dialogue might have ended: most finished, with opinions of every fate."""
    turns = tuple(
        Turn(i + 1, i % len(brief.speakers), f"Turn {i + 1} of {brief.id}.", "fake", "here", "stop", 0.5)
        for i in range(brief.utterances)
    )
    usage = {"speaker": Usage(calls=len(turns), prompt_tokens=100, completion_tokens=20)}
    if rng.random() < 0.15:
        return Outcome(brief.number, turns[:1], (), usage, "timeout", "too slow", (), 1.0, 2.0)
    opinions: list[Opinion] = []
    for i in range(rng.randrange(4)):
        speaker = rng.choice(brief.delegates)
        text = (
            f"{rng.choice('elders guests work promises children help'.split())} come {rng.randrange(3)} first"
        )
        rejected = rng.choice(("", "", "", "too_short", "contradicts"))
        opinions.append(
            Opinion(
                id=f"{brief.id}-t{speaker + 1}-o{i}",
                turn=speaker + 1,
                speaker=speaker,
                start=0,
                end=4,
                extracted=text,
                text=text,
                first_verdict="entails",
                verdict="contradicts" if rejected == "contradicts" else rng.choice(("entails", "novel")),
                rejected=rejected,
                vector=b"" if rejected else vector(text).tobytes(),
            )
        )
    usage["extractor"] = Usage(calls=1, prompt_tokens=7, completion_tokens=3)
    return Outcome(brief.number, turns, tuple(opinions), usage, started_s=1.0, ended_s=2.0)


def outcomes(of: Plan, seed: int = 0) -> list[Outcome]:
    """One outcome a dialogue of the plan, in plan order; equal seeds give equal outcomes."""
    return [outcome(of.brief(n), random.Random(1000 * seed + n)) for n in range(len(of))]
