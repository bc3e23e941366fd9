"""Usage: counts of model calls and of their tokens, and their sums by role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from msgspec import Struct


class Usage(Struct, frozen=True):
    """Counts of model calls and of their tokens, summed with `+`.

    `prompt_tokens` includes `cached_tokens`, those that the server read from its prefix cache. `unreported`
    counts calls whose tokens are unknown, which is not zero. Of these, `lost` are the calls whose reply did
    not come or could not be read; the others' endpoint reported no usage with its reply.
    """

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    lost: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.unreported + other.unreported,
            self.lost + other.lost,
        )

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens that were reported."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def reported(self) -> int:
        """Calls whose tokens are known."""
        return self.calls - self.unreported


UNREPORTED = Usage(calls=1, unreported=1)
"""The usage of one call whose endpoint reported no tokens."""

UsageByRole: TypeAlias = dict[str, Usage]
"""Usage by the role of the model that was called."""


def sum_by_role(parts: Iterable[tuple[str, Usage]]) -> UsageByRole:
    """The sum of these (role, usage) pairs; roles in the order in which they come first."""
    sums: UsageByRole = {}
    for role, usage in parts:
        sums[role] = sums[role] + usage if role in sums else usage
    return sums


def add(first: Mapping[str, Usage], second: Mapping[str, Usage]) -> UsageByRole:
    """The sum of two usages by role; neither is changed."""
    sums = dict(first)
    for role, usage in second.items():  # runs for every call of a refinement
        sums[role] = sums[role] + usage if role in sums else usage
    return sums


def total(by_role: Mapping[str, Usage]) -> Usage:
    """The usage of all roles together."""
    return sum(by_role.values(), Usage())


def reports_usage(usage: Usage) -> bool:
    """Whether an endpoint reports usage, judged by the sum over calls of one role.

    It does unless most of the replies that came reported nothing, or those that did reported no token.
    From a minority of calls nothing follows for the others: a budget cannot be kept by such a sum, and a
    cost that is known of few calls is no lower bound worth showing. A lost call says nothing of the endpoint
    and does not count, so a role whose every call was lost is not condemned: a resume has to go on.
    """
    silent = usage.unreported - usage.lost
    return silent <= usage.reported and (silent <= 0 or usage.tokens > 0)
