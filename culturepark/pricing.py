"""Prices of tokens, and the cost of usage by them. What is unknown is None and never zero."""

from __future__ import annotations

from msgspec import Struct

from culturepark.usage import Usage

_PER = 1e6
"""Prices are money for this many tokens."""


class Prices(Struct, frozen=True):
    """Money for a million tokens of each kind, in any one currency; None if it is unknown.

    `cached` is the price of prompt tokens that the server reads from its prefix cache; None: as `prompt`.
    A `local` model runs on this machine and costs nothing, whatever else is known.
    """

    prompt: float | None = None
    cached: float | None = None
    completion: float | None = None
    local: bool = False

    @property
    def known(self) -> bool:
        """Whether the cost of tokens follows from these prices."""
        return self.local or (self.prompt is not None and self.completion is not None)

    def of_tokens(self, prompt: float, completion: float, cached: float = 0.0) -> float | None:
        """The cost of so many tokens, `cached` of those in the prompt; None if the prices are unknown."""
        if self.local:
            return 0.0
        if self.prompt is None or self.completion is None:
            return None
        price_cached = self.prompt if self.cached is None else self.cached
        money = (prompt - cached) * self.prompt + cached * price_cached
        return (money + completion * self.completion) / _PER


def cost(usage: Usage, prices: Prices) -> float | None:
    """The cost of calls; None if their prices are unknown, or the tokens of any of them are."""
    if usage == Usage():
        return 0.0
    if usage.unreported and not prices.local:
        return None
    return prices.of_tokens(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
