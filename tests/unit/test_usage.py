"""Usage and its sums by role, prices and what follows from both."""

from __future__ import annotations

import pytest

from culturepark.pricing import Prices, cost
from culturepark.settings import ModelSettings, RoleSettings, Settings
from culturepark.usage import UNREPORTED, Usage, add, reports_usage, sum_by_role, total

LOST = Usage(calls=1, unreported=1, lost=1)
ONE = Usage(1, 10, 4, 5)


def test_sums_by_role_keep_the_order_of_roles_and_change_nothing() -> None:
    first, second = {"verifier": ONE}, {"speaker": ONE, "verifier": UNREPORTED}
    assert list(add(first, second).items()) == [("verifier", ONE + UNREPORTED), ("speaker", ONE)]
    assert (first, second) == ({"verifier": ONE}, {"speaker": ONE, "verifier": UNREPORTED})
    assert total(add(first, second)) == Usage(3, 20, 8, 10, 1)
    assert sum_by_role(()) == {}
    assert total({}) == Usage()


@pytest.mark.parametrize(
    ("usage", "tells"),
    [
        (Usage(), True),
        (ONE, True),
        (ONE + UNREPORTED, True),
        (ONE + UNREPORTED + UNREPORTED, False),
        (ONE + LOST + LOST + LOST, True),  # which says nothing of the endpoint
        (LOST, True),
        (LOST + UNREPORTED, False),
        (Usage(calls=1) + UNREPORTED, False),  # a count of zero is none
    ],
)
def test_an_endpoint_reports_usage_unless_most_replies_come_without(usage: Usage, tells: bool) -> None:
    assert reports_usage(usage) == tells


def test_a_cost_is_known_with_all_prices_and_tokens_or_not_at_all() -> None:
    prices = Prices(prompt=1.0, cached=0.5, completion=2.0)
    usage = Usage(1, 1_000_000, 400_000, 100_000)
    assert cost(usage, prices) == pytest.approx(0.6 + 0.2 + 0.2)
    assert cost(usage, Prices(prompt=1.0, completion=2.0)) == pytest.approx(1.2)
    assert cost(usage + UNREPORTED, prices) is None
    for unknown in (Prices(), Prices(prompt=1.0), Prices(completion=1.0)):
        assert not unknown.known
        assert cost(usage, unknown) is None
        assert cost(Usage(), unknown) == 0.0
    assert Prices(local=True).known
    assert cost(usage + UNREPORTED, Prices(local=True)) == 0.0


def test_an_embedder_needs_no_price_of_completions() -> None:
    chat = ModelSettings(engine="openai", price_prompt=1.0)
    settings = Settings(models={"chat": chat}, roles=RoleSettings(speaker="chat", embedder="chat"))
    assert settings.prices_of("embedder") == Prices(1.0, None, 0.0)
    assert not settings.prices_of("rewriter").known
    assert settings.prices_of("nobody") == Prices()
    assert Settings().prices_of("embedder") == Prices()
    scripted = settings.models | {"chat": ModelSettings(engine="scripted")}
    assert Settings(models=scripted, roles=settings.roles).prices_of("speaker").local
