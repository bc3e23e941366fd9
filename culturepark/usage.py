"""What model calls took: counts of calls and tokens, and how they are summed."""

from __future__ import annotations

from msgspec import Struct


class Usage(Struct, frozen=True):
    """What model calls took: counts of calls and tokens, summed with `+`.

    `unreported` counts calls whose tokens nobody told: they are unknown, not zero. Of these, `lost` are
    the calls whose answer did not come or could not be read; the others' endpoint keeps silent.
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


UNREPORTED = Usage(calls=1, unreported=1)
"""One call whose endpoint told no tokens."""
