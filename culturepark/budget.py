"""A budget of tokens or money, and when a run has to stop for it. Pure.

A run stops asking when what is spent, and what the calls under way are likely to take, would reach the
budget. So it ends close to the limit, and never beyond it by more than what was in flight.

Calls whose count did not come, since they timed out or their reply was lost, may have been billed in full:
each is taken for twice what the role's others took on average, since those that get lost are the long ones.
Where that would be a guess at most of what was spent, the run stops instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from culturepark.ports import Usage
from culturepark.settings import CHAT_ROLES, Role, Settings
from culturepark.store.funnel import money_of

_UNKNOWN_CALL = 2.0
"""What a call whose count did not come is taken to have cost, as a multiple of the average one."""


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
        filled = [_filled(usage) for usage in spent.values()]
        tokens = sum(usage.prompt_tokens + usage.completion_tokens for usage in filled)
        if tokens * (1 + under_way) < limit:
            return ""
        return f"the budget of {limit:,} tokens is reached: {tokens:,} are spent, the rest is under way"

    def _money(self, spent: Mapping[str, Usage], under_way: float) -> str:
        limit = self._settings.budget.money
        if not limit:
            return ""
        money = 0.0
        for role, usage in spent.items():
            known = usage if self._unknown(role, usage) else _filled(usage)
            of_role = money_of(role, known, self._settings)
            if of_role is None:
                return f"budget.money cannot be kept: what {role} costs is unknown"
            money += of_role
        if money * (1 + under_way) < limit:
            return ""
        return f"the budget of {limit:,.2f} is reached: {money:,.4f} is spent, the rest is under way"

    def _unknown(self, role: str, usage: Usage) -> bool:
        """Whether most of its calls told nothing. Embedded engines cost nothing and need not tell."""
        known: tuple[Role, ...] = (*CHAT_ROLES, "embedder")
        model = next((self._settings.model_of(one) for one in known if one == role), None)
        told = usage.calls - usage.unreported
        dark = usage.unreported > told or not usage.prompt_tokens + usage.completion_tokens
        return bool(usage.unreported) and dark and (model is None or model.engine == "openai")


def _filled(usage: Usage) -> Usage:
    """The same, with an estimate for calls that told nothing."""
    told = usage.calls - usage.unreported
    if not usage.unreported or told <= 0:
        return usage
    times = 1 + _UNKNOWN_CALL * usage.unreported / told
    return Usage(
        usage.calls,
        round(usage.prompt_tokens * times),
        usage.cached_tokens,
        round(usage.completion_tokens * times),
    )
