"""A budget stops a run close to its limit, and the run goes on when the limit is raised."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.rundir import load_run
from tests.endpoint import ScriptedEndpoint
from tests.ray.conftest import summary
from tests.ray.test_generate import assert_whole
from tests.torture import models_at

A_CALL = 20
"""Tokens of each chat call of the scripted endpoint."""


def test_a_budget_is_kept_and_survives_a_resume(
    tmp_path: Path, generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    out = tmp_path / "run"
    in_flight = 10
    with ScriptedEndpoint(latency_s=0.2).serving() as endpoint:
        plan = (
            *models_at(endpoint),
            'plan.cultures=["arabic"]',
            'plan.questions=["wvs7-q28", "wvs7-q29"]',
            "plan.dialogues_per_question=8",
            "plan.utterances=4",
            f"limits.dialogues_in_flight={in_flight}",
        )
        limit = 60 * A_CALL
        code, printed = generate(out, *plan, f"budget.tokens={limit}").wait()
        assert code == 5, printed
        assert "budget" in printed
        spent = endpoint.tokens
        # A refinement asks about several opinions at once, so more calls than dialogues may be under way.
        assert 0.5 * limit <= spent <= limit + 4 * in_flight * A_CALL
        code, printed = generate(out, *plan, "budget.tokens=0").wait()
        assert code == 0, printed
    assert_whole(out)
    usage = summary(out)["usage"]
    told = sum(of["prompt_tokens"] + of["completion_tokens"] for of in usage.values())
    assert told == endpoint.tokens  # nothing was asked twice, nothing counted twice


class Biller(ScriptedEndpoint):
    """Bills each third chat call like the others, and then stalls or says nothing."""

    def __init__(self, third: str) -> None:
        super().__init__(latency_s=0.2)
        self.third = third
        self.chats = 0

    async def _reply(self, body: Any) -> dict[str, Any]:
        reply = await super()._reply(body)
        if "messages" in body:
            self.chats += 1
            if self.chats % 3 == 0 and self.third == "stalls":
                await asyncio.sleep(4)  # twice the deadline
            elif self.chats % 3 == 0 and self.third == "is empty":
                reply["choices"][0]["message"]["content"] = ""
        return reply


@pytest.mark.parametrize("third", ["stalls", "is empty"])
def test_a_budget_counts_what_was_billed_for_nothing(
    tmp_path: Path, generate: Any, monkeypatch: pytest.MonkeyPatch, third: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    out = tmp_path / "run"
    in_flight = 10
    biller = Biller(third)
    with biller.serving() as endpoint:
        plan = (
            *models_at(endpoint),
            'plan.cultures=["arabic"]',
            'plan.questions=["wvs7-q28", "wvs7-q29"]',
            "plan.dialogues_per_question=8",
            "plan.utterances=4",
            f"limits.dialogues_in_flight={in_flight}",
            "limits.deadline_s=2",
            "limits.backoff_s=0.05",
        )
        limit = 80 * A_CALL
        code, printed = generate(out, *plan, f"budget.tokens={limit}").wait()
        assert code == 5, printed
        assert "budget" in printed
        spent = endpoint.tokens
        assert 0.3 * limit <= spent <= limit + 4 * in_flight * A_CALL
        assert counted(out) == spent
        biller.third = ""
        code, printed = generate(out, *plan, "budget.tokens=0").wait()
        assert code == 0, printed
    assert_whole(out)
    usage = summary(out)["usage"].values()
    told = sum(of["prompt_tokens"] + of["completion_tokens"] for of in usage)
    assert told + A_CALL * sum(of["unreported"] for of in usage) == endpoint.tokens


def counted(out: Path) -> int:
    """Tokens of all calls that are on disk; a call whose usage is unknown counts as one like the others."""
    with RunLock.acquire(out) as lock:
        spent = Ledger(load_run(out), lock).spent().values()
    return sum(of.prompt_tokens + of.completion_tokens + A_CALL * of.unreported for of in spent)
