"""Which replica a call goes to, and how it keeps to the shares of a coordinator."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from culturepark.limits.coordinator import Coordinator
from culturepark.messages import Share
from culturepark.models.endpoint import HttpEndpoint
from culturepark.models.replicas import Replicas
from culturepark.settings import LimitSettings, ModelSettings


def far(*hosts: str, **limits: Any) -> Replicas:
    model = ModelSettings(
        engine="openai", model="m", base_urls=tuple(f"http://{h}.invalid/v1" for h in hosts)
    )
    return HttpEndpoint(model, LimitSettings(**limits)).replicas


def chosen(replicas: Replicas, named: str, dialogues: int = 2000) -> list[str]:
    return [replicas.choose(named.format(i), 0, []).url for i in range(dialogues)]


def test_dialogues_go_round_the_replicas_by_their_numbers() -> None:
    urls = chosen(replicas := far("a", "b", "c"), "{}.dialogue")
    assert all(set(urls[i : i + 3]) == set(replicas.urls) for i in range(0, 1998, 3))


@pytest.mark.parametrize("kinds", [2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("hosts", ["ab", "abc", "abcd", "abcdefgh"])
def test_what_alternates_in_a_plan_is_spread_over_the_replicas(kinds: int, hosts: str) -> None:
    """As kinds of dialogues do, of which some have more calls than others."""
    urls = chosen(replicas := far(*hosts), "{}.dialogue", 400 * kinds)
    for kind in range(kinds):
        for few, off in ((24, 0.17), (100, 0.07), (400, 0.03)):
            shares = Counter(urls[kind : few * kinds : kinds])
            assert all(shares[url] / few == pytest.approx(1 / len(hosts), abs=off) for url in replicas.urls)


def test_dialogues_come_home_after_all_replicas_were_sick() -> None:
    before = chosen(replicas := far("a", "b", "c"), "{}.dialogue")
    replicas.obey([Share(url, "m", 10, weight=0.0) for url in replicas.urls])  # any will do
    assert set(chosen(replicas, "{}.dialogue")) == set(replicas.urls)
    replicas.obey([Share(url, "m", 10, weight=1.0) for url in replicas.urls])
    assert chosen(replicas, "{}.dialogue") == before


@pytest.mark.parametrize("named", ["dialogue-{}", "{0}.dialogue-{0}"])
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5])
async def test_a_weight_moves_only_the_dialogues_that_it_must(weight: float, named: str) -> None:
    replicas = far("a", "b", "c", "d")
    before = chosen(replicas, named)
    url = replicas.urls[1]
    replicas.obey([Share(url, "m", 10, weight=weight)])
    replicas.by_url[url].next_trial_s = float("inf")
    after = chosen(replicas, named)
    assert {a for a, b in zip(before, after, strict=True) if a != b} <= {url}
    assert Counter(after)[url] / 2000 == pytest.approx(weight / (3 + weight), abs=0.03)


async def test_an_endpoint_does_as_it_was_told() -> None:
    replicas, coordinator = far("a"), Coordinator(LimitSettings())
    replicas.obey(())
    gate = replicas.by_url[replicas.urls[0]].gate
    assert gate.limit == 2
    replicas.obey(coordinator.update("p", replicas.report(), 0.0))
    assert gate.limit == 16
    assert replicas.report()[0].limit == 16
    replicas.obey([Share(replicas.urls[0], "another model", 1), Share("http://elsewhere/v1", "m", 1)])
    assert gate.limit == 16
