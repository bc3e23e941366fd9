"""A budget of tokens or money, and when a run has to stop for it. Pure.

A run stops before what is spent, and what the calls in flight are likely to cost, would reach the budget.
So it ends close to the limit, and never beyond it by more than what was in flight.

A call whose reply was lost may have been billed in full. It counts as twice the average of the role's other
calls, since long ones are the likeliest to get lost; while the role has none, as twice that of all roles';
before anything is known, as twice a guess. An endpoint that reports the usage of few of its replies makes
any sum a guess: the run stops instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from culturepark.pricing import cost
from culturepark.settings import Settings
from culturepark.usage import Usage, UsageByRole, reports_usage, total

_UNREPORTED_CALL = 2.0
"""The estimate for a call without known usage is this multiple of an average call."""
_GUESS = Usage(1, prompt_tokens=1000, completion_tokens=200)
"""The guess at an average call before the usage of any is known."""


class Budget:
    """The budget of a run. Without limits it is never reached."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.limited = bool(settings.budget.tokens or settings.budget.money)

    def reached(self, spent: Mapping[str, Usage], in_flight: int) -> str:
        """Why no further call may be made, in words, or nothing. `spent` is by role, of the whole run;
        `in_flight` counts calls."""
        if not self.limited:
            return ""
        calls = total(spent).calls
        under_way = in_flight / calls if calls else 0.0
        return self._tokens(spent, under_way) or self._money(spent, under_way)

    def _tokens(self, spent: Mapping[str, Usage], under_way: float) -> str:
        limit = self._settings.budget.tokens
        if not limit:
            return ""
        if unknown := [role for role, usage in spent.items() if self._unknown(role, usage)]:
            return f"budget.tokens cannot be kept: the endpoint of {unknown[0]} reports no usage"
        tokens = total(_estimated(spent)).tokens
        if tokens * (1 + under_way) < limit:
            return ""
        return f"the budget of {limit:,} tokens is reached: {tokens:,} are spent, the rest is under way"

    def _money(self, spent: Mapping[str, Usage], under_way: float) -> str:
        limit = self._settings.budget.money
        if not limit:
            return ""
        money = 0.0
        for role, estimated in _estimated(spent).items():
            usage = spent[role] if self._unknown(role, spent[role]) else estimated
            of_role = cost(usage, self._settings.prices_of(role))
            if of_role is None:
                return f"budget.money cannot be kept: what {role} costs is unknown"
            money += of_role
        if money * (1 + under_way) < limit:
            return ""
        return f"the budget of {limit:,.2f} is reached: {money:,.4f} is spent, the rest is under way"

    def _unknown(self, role: str, usage: Usage) -> bool:
        """Whether a role's usage cannot be summed. Local models cost nothing and need not report it."""
        return not reports_usage(usage) and not self._settings.prices_of(role).local


def _estimated(spent: Mapping[str, Usage]) -> UsageByRole:
    """The same, with an estimate for calls without known usage."""
    whole = total(spent)
    return {role: _with_estimate(usage, whole) for role, usage in spent.items()}


def _with_estimate(usage: Usage, whole: Usage) -> Usage:
    # An endpoint that reports nothing at all is a local model's; others have stopped the run.
    unknown = usage.unreported if usage.reported else usage.lost
    if not unknown:
        return usage
    like = next((one for one in (usage, whole) if one.reported and one.prompt_tokens), _GUESS)
    times = _UNREPORTED_CALL * unknown / like.reported
    return Usage(
        usage.calls,
        usage.prompt_tokens + round(like.prompt_tokens * times),
        usage.cached_tokens,
        usage.completion_tokens + round(like.completion_tokens * times),
    )
