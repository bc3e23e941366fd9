"""A budget stops a run close to its limit, and the run goes on when the limit is raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
