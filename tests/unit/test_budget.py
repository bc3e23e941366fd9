"""When a budget is reached, and what it refuses to guess."""

from __future__ import annotations

import pytest

from culturepark.errors import ConfigError
from culturepark.limits.budget import Budget
from culturepark.settings import Settings
from culturepark.settings_load import load_settings
from culturepark.usage import Usage

REMOTE = [
    'models.chat.engine="openai"',
    'models.chat.model="m"',
    'models.chat.profile="full"',
    'models.embedder.engine="openai"',
    'models.embedder.model="e"',
]
PRICES = [
    "models.chat.price_prompt=1.0",
    "models.chat.price_completion=2.0",
    "models.embedder.price_prompt=0.1",
]


def given(*overrides: str) -> Settings:
    return load_settings(None, [*REMOTE, *overrides])


def test_without_limits_it_is_never_reached() -> None:
    budget = Budget(given())
    assert not budget.limited
    assert budget.reached({"speaker": Usage(10, 10**12)}, 5) == ""


def test_what_is_under_way_counts_as_what_a_call_took_so_far() -> None:
    budget = Budget(given("budget.tokens=1000"))
    spent = {"speaker": Usage(calls=8, prompt_tokens=600, completion_tokens=200)}
    assert budget.reached(spent, 1) == ""
    assert "1,000 tokens" in budget.reached(spent, 2)
    assert budget.reached({}, 100) == ""  # nothing is known yet


def test_money_is_counted_with_the_prices_of_each_role() -> None:
    budget = Budget(given(*PRICES, "budget.money=2.5"))
    spent = {"speaker": Usage(1000, 1_000_000, 0, 500_000), "embedder": Usage(10, 1_000_000)}
    assert budget.reached(spent, 0) == ""
    assert "2.50" in budget.reached(spent, 250)


def test_what_is_unknown_is_never_taken_for_zero() -> None:
    unknown = {"speaker": Usage(calls=3, unreported=1)}
    assert "reports no usage" in Budget(given("budget.tokens=1000")).reached(unknown, 0)
    mostly = {"speaker": Usage(calls=5, prompt_tokens=20, unreported=3)}
    assert "reports no usage" in Budget(given("budget.tokens=1000")).reached(mostly, 0)
    assert "unknown" in Budget(given(*PRICES, "budget.money=1.0")).reached(mostly, 0)
    assert "unknown" in Budget(given(*PRICES, "budget.money=1.0")).reached(unknown, 0)
    embedded = Budget(load_settings(None, ["budget.tokens=1000"]))
    assert embedded.reached({"embedder": Usage(calls=3, unreported=3)}, 0) == ""


def test_a_few_calls_whose_count_was_lost_are_taken_for_twice_the_average() -> None:
    spent = {"speaker": Usage(calls=10, prompt_tokens=600, completion_tokens=200, unreported=2)}
    assert Budget(given("budget.tokens=1201")).reached(spent, 0) == ""
    assert "1,200 are spent" in Budget(given("budget.tokens=1200")).reached(spent, 0)
    money = {"speaker": Usage(calls=10, prompt_tokens=1_000_000, completion_tokens=500_000, unreported=2)}
    assert Budget(given(*PRICES, "budget.money=3.01")).reached(money, 0) == ""
    assert "3.00" in Budget(given(*PRICES, "budget.money=3.0")).reached(money, 0)


def test_a_lost_call_is_no_reason_to_stop() -> None:
    """A cold server's first calls time out; a role's only call may. A resume has to go on, too."""
    lost = Usage(calls=4, unreported=4, lost=4)
    tokens, money = Budget(given("budget.tokens=10000")), Budget(given(*PRICES, "budget.money=100.0"))
    for spent in ({"speaker": lost}, {"speaker": Usage(1000, 1000, 0, 1000), "verifier": lost}):
        assert tokens.reached(spent, 0) == ""
        assert money.reached(spent, 0) == ""
    # Eight guesses of 1,200 tokens; with others to go by, as many as those took, twice over.
    assert "9,600 are spent" in Budget(given("budget.tokens=9600")).reached({"speaker": lost}, 0)
    known = {"speaker": Usage(996, 2000, 0, 992), "verifier": lost}
    assert "3,016 are spent" in Budget(given("budget.tokens=3016")).reached(known, 0)
    silent = {"speaker": lost + Usage(calls=1, unreported=1)}
    assert "reports no usage" in tokens.reached(silent, 0)


def test_a_budget_of_money_needs_prices() -> None:
    with pytest.raises(ConfigError, match="has no prices"):
        given("budget.money=1.0")
