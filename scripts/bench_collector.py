"""The collector's part of the benchmark: the real ledger on a real disk, without Ray or models."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from culturepark.cultures import load_cultures
from culturepark.dialogue.conductor import Conductor
from culturepark.dialogue.slots import COLLECTOR, REFINERS
from culturepark.messages import (
    Ask,
    Opinion,
    Outcome,
    OutcomeStored,
    Spoke,
    Turn,
    TurnStored,
    encode,
    speaker_usage,
)
from culturepark.plan import Plan
from culturepark.seeds import load_seeds
from culturepark.settings_load import load_settings
from culturepark.store.files import RealFiles
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.rundir import Run, open_run
from culturepark.usage import Usage

_TEXT = "My mother always said that elders are to be heard first, since it keeps the peace at home. " * 4
_OPINIONS_A_TURN = 3
_DIMENSIONS = 384
_SYNC_EVERY = 8


def _run(root: Path, rounds: int, refine: bool) -> Run:
    settings = load_settings(
        None,
        [
            'models.chat.engine="scripted"',
            'models.chat.profile="full"',
            'models.embedder.engine="scripted"',
            "plan.questions=[]",
            f"plan.dialogues_per_question={rounds}",
            "plan.utterances=14",
            f"refine.enabled={str(refine).lower()}",
            "limits.dialogues_in_flight=200",
        ],
    )
    return open_run(root, settings, Plan(settings, load_seeds(settings.plan.seeds), load_cultures()))


def _turn(number: int) -> Turn:
    return Turn(number, (number - 1) % 2, _TEXT, "mock", "http://mock/v1", "stop", 1.0, Usage(1, 900, 0, 90))


def _outcome(plan: Plan, number: int, dice: np.random.Generator) -> bytes:
    brief = plan.brief(number)
    turns = tuple(map(_turn, range(1, 15)))
    opinions = tuple(
        Opinion(
            id=f"{brief.id}-t{turn.number}-o{place}",
            turn=turn.number,
            speaker=turn.speaker,
            start=0,
            end=80,
            extracted=_TEXT[:80],
            text=f"{number} {turn.number} {place} {_TEXT[:80]}",
            first_verdict="entails",
            verdict="entails",
            verdict_reason="by rule",
            vector=dice.standard_normal(_DIMENSIONS, np.float32).tobytes(),
        )
        for turn in turns
        if turn.speaker in brief.delegates
        for place in range(_OPINIONS_A_TURN)
    )
    return encode(Outcome(number, turns, opinions, {"speaker": speaker_usage(turns)}))


def collector_rate(rounds: int) -> float:
    """Samples a second, from encoded outcomes to sealed shards, an fsync every few dialogues."""
    with tempfile.TemporaryDirectory(prefix="culturepark-bench-") as folder:
        run = _run(Path(folder, "run"), rounds, refine=True)
        dice = np.random.default_rng(1)
        encoded = [_outcome(run.plan, number, dice) for number in range(len(run.plan))]
        with RunLock.acquire(run.root) as lock:
            ledger = Ledger(run, lock)
            began = time.monotonic()
            for i, raw in enumerate(encoded):
                ledger.append(raw)
                if i % _SYNC_EVERY == 0:
                    ledger.sync()
            ledger.close()
            took_s = time.monotonic() - began
        return sum(funnel["extracted"] for funnel in ledger.funnels.values()) / took_s


class _SlowFiles(RealFiles):
    """A disk whose every fsync takes a while."""

    def __init__(self, fsync_s: float) -> None:
        self._fsync_s = fsync_s

    def fsync(self, fd: int) -> None:
        time.sleep(self._fsync_s)
        super().fsync(fd)


def slow_disk(fsync_s: float = 0.1, for_s: float = 8.0) -> dict[str, Any]:
    """What piles up when speakers answer at once and the disk is slow: a real conductor and ledger, and
    between them as much buffer as anyone may fill."""
    with tempfile.TemporaryDirectory(prefix="culturepark-bench-") as folder:
        run = _run(Path(folder, "run"), 5, refine=False)
        with RunLock.acquire(run.root) as lock:
            return asyncio.run(_feed(run, Ledger(run, lock, _SlowFiles(fsync_s)), for_s))


async def _feed(run: Run, ledger: Ledger, for_s: float) -> dict[str, Any]:
    replicas = dict.fromkeys([*run.plan.agent_cultures(), REFINERS], 1)
    conductor = Conductor(run.plan, run.settings, ledger.done(), 1, replicas)
    ledger.begin(1)
    waiting: list[Spoke | Outcome] = []
    todo = conductor.fill(0.0)
    most_waiting = most_in_flight = turns = 0
    end = time.monotonic() + for_s
    while time.monotonic() < end and not conductor.progress().idle:
        while todo:
            post = todo.pop()
            if post.address == COLLECTOR:
                assert isinstance(post.message, Spoke | Outcome)
                waiting.append(post.message)
            elif isinstance(post.message, Ask):
                todo += conductor.on(Spoke(post.message.number, 1, _turn(post.message.turn)), 0.0)
        most_waiting = max(most_waiting, len(waiting))
        most_in_flight = max(most_in_flight, conductor.progress().in_flight)
        batch, waiting = waiting, []
        for message in batch:
            ledger.append(encode(message))
        await asyncio.to_thread(ledger.sync)
        for message in batch:
            if isinstance(message, Spoke):
                turns += 1
                todo += conductor.on(TurnStored(message.number, 1, message.turn.number), 0.0)
            else:
                todo += conductor.on(OutcomeStored(message.number), 0.0)
    return {"turns_per_s": turns / for_s, "most_waiting": most_waiting, "most_in_flight": most_in_flight}
