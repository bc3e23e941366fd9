"""What a prompt profile offers, and which one a model gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from msgspec import Struct

from culturepark.cultures import Culture
from culturepark.plan import Brief
from culturepark.ports import Prompt, Sampling
from culturepark.settings import Settings


class Cue(Struct, frozen=True):
    """What a speaker reads before a turn, and the first words of its answer, if they are given."""

    text: str
    prefill: str = ""


class Profile(Protocol):
    """Prompts for one size of model. All of them are pure functions of their arguments."""

    name: Literal["full", "small"]
    judges: bool
    """Whether the model extracts and verifies by itself. If not, sentences are kept word for
    word and the embedder verifies."""

    def sampling(self, role: str) -> Sampling:
        """The default sampling of a role: speaker, direct, extractor, verifier, rewriter."""
        ...

    def system(self, brief: Brief, speaker: int, cultures: Mapping[str, Culture]) -> str:
        """Who the speaker is, for the whole dialogue."""
        ...

    def cue(self, brief: Brief, turn: int, heard: str, cultures: Mapping[str, Culture]) -> Cue:
        """What the speaker of this turn reads, having heard the other's words."""
        ...

    def clean(self, reply: str, cue: Cue, name: str, cut: bool) -> str:
        """A reply as it goes into the transcript. `cut`: it ran into its limit."""
        ...

    def extraction(self, brief: Brief, speaker: int, text: str) -> tuple[Prompt, dict[str, Any] | None]:
        """Ask for the opinions in one turn; with the JSON schema of the answer."""
        ...

    def verification(self, brief: Brief, speaker: int, opinion: str) -> tuple[Prompt, dict[str, Any] | None]:
        """Ask how an opinion stands to the speaker's stance; with the JSON schema of the answer."""
        ...

    def rewriting(self, brief: Brief, speaker: int, opinion: str) -> tuple[Prompt, Cue]:
        """Ask for the opinion rewritten so that it fits the stance."""
        ...


def sampling_with(default: Sampling, settings: Settings, role: str) -> Sampling:
    """A profile's sampling with what the settings say of this role."""
    own = settings.sampling.get(role)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if own is None:
        return default
    return Sampling(
        temperature=default.temperature if own.temperature is None else own.temperature,
        max_tokens=default.max_tokens if own.max_tokens is None else own.max_tokens,
        top_p=default.top_p if own.top_p is None else own.top_p,
        stop=default.stop,
        seed=default.seed,
        extra=default.extra,
    )


def script_step(turn: int, utterances: int, length: int) -> int:
    """Which step of a script of `length` a turn follows: the first at first, the last at last, and
    round the middle between them."""
    own, owns = (turn - 1) // 2, max(1, (utterances + turn % 2) // 2)
    if own == 0:
        return 0
    if own >= owns - 1:
        return length - 1
    return 1 + (own - 1) % (length - 2)
