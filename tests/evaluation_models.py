"""Models under test that say what they are told to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from culturepark.models.errors import ModelError
from culturepark.ports import Completion, Prompt, Sampling
from culturepark.usage import Usage

_LINE = re.compile(r"^(\d{1,2})\. (.+)$")

Shares = Callable[[str, list[str]], Sequence[float]]
"""From a prompt's words and its options as shown, the probability of each."""


class OptionsModel:
    """Answers a question with options by a rule: with log-probabilities, or as one reply a draw, each
    option as often as its share says (systematically, so that figures are exact)."""

    def __init__(self, shares: Shares, *, logprobs: bool = True, words: str = "{mark}. {option}") -> None:
        self._shares, self._logprobs, self._words = shares, logprobs, words
        self._owed: dict[tuple[str, str], list[float]] = {}
        self.asked: list[str] = []

    async def complete(
        self, prompt: Prompt, sampling: Sampling, *, affinity: str, schema: dict[str, Any] | None = None
    ) -> Completion:
        text = "\n".join(message["content"] for message in prompt.messages())
        self.asked.append(text)
        lines = [found for line in text.splitlines() if (found := _LINE.match(line))]
        marks, options = [line[1] for line in lines], [line[2] for line in lines]
        shares = list(self._shares(text, options))
        first: tuple[tuple[str, float], ...] = ()
        if self._logprobs and sampling.top_logprobs:
            first = tuple((m, math.log(s)) for m, s in zip(marks, shares, strict=True) if s > 0)
        # What an option is owed grows with each draw; the one that is owed most is said next.
        owed = self._owed.setdefault((affinity, "|".join(sorted(options))), [0.0] * len(options))
        by_name = sorted(range(len(options)), key=lambda i: options[i])
        for rank, place in enumerate(by_name):
            owed[rank] += shares[place]
        most = max(range(len(owed)), key=lambda rank: owed[rank])
        owed[most] -= 1
        place = by_name[most]
        said = self._words.format(mark=marks[place], option=options[place])
        if not said:
            raise ModelError("empty_reply", "nothing was said")
        return Completion(said, Usage(calls=1), "stop", "fake", "here", 0.0, first)

    async def close(self) -> None:
        """Nothing is open."""


def always(wanted: Callable[[str], bool]) -> Shares:
    """All on the one option that is wanted."""
    return lambda text, options: [float(wanted(option)) for option in options]


def evenly(text: str, options: list[str]) -> list[float]:
    """The same for each option."""
    return [1 / len(options)] * len(options)


def at_place(place: int) -> Shares:
    """All on the option that is shown at this place, whatever it is."""
    return lambda text, options: [float(at == place) for at in range(len(options))]
