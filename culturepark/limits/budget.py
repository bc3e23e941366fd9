"""A budget of tokens or money, and when a run has to stop for it. Pure.

A run stops asking when what is spent, and what the calls under way are likely to take, would reach the
budget. So it ends close to the limit, and never beyond it by more than what was in flight.

Calls whose answer was lost may have been billed in full: each is taken for twice what the role's others took
on average, since those that get lost are the long ones; while a role has none, for twice what other roles'
took; before anything is known, for a guess. An endpoint that answers most calls without a count makes any
sum a guess: the run stops instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from culturepark.settings import CHAT_ROLES, Role, Settings
from culturepark.store.funnel import money_of
from culturepark.usage import Usage

_UNKNOWN_CALL = 2.0
"""What a call whose count did not come is taken to have cost, as a multiple of the average one."""
_GUESS = Usage(1, prompt_tokens=1000, completion_tokens=200)
"""The average call, before any has told what it took."""


class Budget:
    """The budget of a run. Without limits it is never reached."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.limited = bool(settings.budget.tokens or settings.budget.money)

    def reached(self, spent: Mapping[str, Usage], in_flight: int) -> str:
        """Why no further call may be made, in words, or nothing. `spent` is by role, of the whole run;
        `in_flight` counts the calls under way."""
        if not self.limited:
            return ""
        calls = sum(usage.calls for usage in spent.values())
        under_way = in_flight / calls if calls else 0.0
        return self._tokens(spent, under_way) or self._money(spent, under_way)

    def _tokens(self, spent: Mapping[str, Usage], under_way: float) -> str:
        limit = self._settings.budget.tokens
        if not limit:
            return ""
        if unknown := [role for role, usage in spent.items() if self._unknown(role, usage)]:
            return f"budget.tokens cannot be kept: the endpoint of {unknown[0]} tells no usage"
        filled = _filled(spent).values()
        tokens = sum(usage.prompt_tokens + usage.completion_tokens for usage in filled)
        if tokens * (1 + under_way) < limit:
            return ""
        return f"the budget of {limit:,} tokens is reached: {tokens:,} are spent, the rest is under way"

    def _money(self, spent: Mapping[str, Usage], under_way: float) -> str:
        limit = self._settings.budget.money
        if not limit:
            return ""
        money = 0.0
        for role, filled in _filled(spent).items():
            known = spent[role] if self._unknown(role, spent[role]) else filled
            of_role = money_of(role, known, self._settings)
            if of_role is None:
                return f"budget.money cannot be kept: what {role} costs is unknown"
            money += of_role
        if money * (1 + under_way) < limit:
            return ""
        return f"the budget of {limit:,.2f} is reached: {money:,.4f} is spent, the rest is under way"

    def _unknown(self, role: str, usage: Usage) -> bool:
        """Whether most of its answers told nothing. Embedded engines cost nothing and need not tell."""
        known: tuple[Role, ...] = (*CHAT_ROLES, "embedder")
        model = next((self._settings.model_of(one) for one in known if one == role), None)
        silent, told = usage.unreported - usage.lost, usage.calls - usage.unreported
        dark = silent > told or (silent > 0 and not usage.prompt_tokens + usage.completion_tokens)
        return dark and (model is None or model.engine == "openai")


def _filled(spent: Mapping[str, Usage]) -> dict[str, Usage]:
    """The same, with an estimate for calls that told nothing."""
    whole = sum(spent.values(), Usage())
    return {role: _with_estimate(usage, whole) for role, usage in spent.items()}


def _with_estimate(usage: Usage, whole: Usage) -> Usage:
    # Who never tells anything is an engine of this machine's; others have stopped the run.
    untold = usage.unreported if _told(usage) else usage.lost
    if not untold:
        return usage
    like = next((one for one in (usage, whole) if _told(one) and one.prompt_tokens), _GUESS)
    times = _UNKNOWN_CALL * untold / _told(like)
    return Usage(
        usage.calls,
        usage.prompt_tokens + round(like.prompt_tokens * times),
        usage.cached_tokens,
        usage.completion_tokens + round(like.completion_tokens * times),
    )


def _told(usage: Usage) -> int:
    return usage.calls - usage.unreported
