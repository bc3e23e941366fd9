"""Run directories, made whole or in part without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from culturepark.dialogue.conductor import Progress
from culturepark.messages import Outcome, encode
from culturepark.monitor.figures import Snapshot
from culturepark.plan import Plan
from culturepark.settings import Settings
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.publish import publish
from culturepark.store.rundir import Run
from tests import builders

TWO_CULTURES = {"cultures": ["arabic", "korean"], "questions": list(builders.THREE)}


def settings(**rooms: Any) -> Settings:
    """Two cultures, three questions, four dialogues on each; a commit for every cell or two."""
    plan = TWO_CULTURES | rooms.pop("plan", {})
    return builders.settings(plan=plan, store={"shard_dialogues": 8}, **rooms)


def config(folder: Path, endpoint: str = "") -> Path:
    """The same settings as a file; `endpoint` makes its chat model a remote one."""
    chat = (
        f'engine = "openai"\nmodel = "good-model"\nbase_urls = ["{endpoint}"]'
        if endpoint
        else 'engine = "scripted"\nprofile = "full"'
    )
    path = folder / "config.toml"
    path.write_text(
        f"""
[models.chat]
{chat}
[models.vectors]
engine = "scripted"
[roles]
speaker = "chat"
embedder = "vectors"
[plan]
cultures = ["arabic", "korean"]
questions = ["wvs7-q27", "wvs7-q28", "wvs7-q29"]
[store]
shard_dialogues = 8
""",
        "utf-8",
    )
    return path


def write(run: Run, outcomes: Sequence[Outcome]) -> Ledger:
    """Take outcomes into a run, then seal and publish what can be."""
    with RunLock.acquire(run.root) as lock:
        ledger = Ledger(run, lock)
        for outcome in outcomes:
            ledger.append(encode(outcome))
            ledger.sync()
        ledger.close()
        publish(run, ledger.funnels)
    return ledger


def outcomes(plan: Plan) -> list[Outcome]:
    """How the dialogues of a plan ended."""
    return builders.outcomes(plan)


def made(root: Path, ended: int | None = None, **rooms: Any) -> Run:
    """A run whose first `ended` dialogues have ended; None: all of them."""
    run = builders.run_in(root, settings(**rooms))
    write(run, outcomes(run.plan)[:ended])
    return run


def snapshot(run: Run, ledger: Ledger, elapsed_s: float = 61.0) -> Snapshot:
    """A look at a run as the runtime gives it."""
    ended = sum(funnel["finished"] + funnel["failed"] for funnel in ledger.funnels.values())
    failed = sum(funnel["failed"] for funnel in ledger.funnels.values())
    progress = Progress(len(run.plan), ended, len(run.plan) - ended, 0, 40, failed, "", "")
    return Snapshot(
        progress=progress,
        funnels={culture: dict(funnel) for culture, funnel in ledger.funnels.items()},
        set_aside=(),
        replayed=0,
        elapsed_s=elapsed_s,
    )
