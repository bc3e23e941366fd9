"""Memory does not grow with the number of planned dialogues."""

from __future__ import annotations

import tracemalloc

from culturepark.cultures import load_cultures
from culturepark.dialogue.conductor import Conductor
from culturepark.dialogue.slots import REFINERS
from culturepark.plan import Plan
from culturepark.seeds import builtin_seeds
from culturepark.settings_load import decode_settings
from scripts.bench_collector import slow_disk


def peak_of(dialogues_per_question: int) -> tuple[int, int]:
    """Dialogues planned, and the most bytes held while some of them are started."""
    settings = decode_settings(
        {
            "models": {"chat": {"engine": "scripted"}, "e": {"engine": "scripted"}},
            "roles": {"speaker": "chat", "embedder": "e"},
            "plan": {"dialogues_per_question": dialogues_per_question},
        },
        "test",
    )
    seeds, cultures = builtin_seeds(), load_cultures()
    done = bytes(1 << 20)
    tracemalloc.start()
    plan = Plan(settings, seeds, cultures)
    replicas = dict.fromkeys([*plan.agent_cultures(), REFINERS], 1)
    Conductor(plan, settings, done, 1, replicas).fill(0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return len(plan), peak


def test_a_plan_takes_no_memory_for_dialogues_that_have_not_begun() -> None:
    few, small = peak_of(10)
    many, large = peak_of(10_000)
    assert many == 1000 * few
    assert large < small + 100_000  # the bits that say which are done were made before


def test_on_a_slow_disk_no_more_waits_than_dialogues_are_in_flight() -> None:
    """Speakers that answer at once, a conductor, a ledger whose fsyncs take their time."""
    seen = slow_disk(fsync_s=0.05, for_s=1.5)
    assert seen["turns_per_s"] > 0
    assert 0 < seen["most_waiting"] <= seen["most_in_flight"] <= 200
