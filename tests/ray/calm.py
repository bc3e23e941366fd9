"""An undisturbed run, and how others are compared with it."""

from __future__ import annotations

import json
import math
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tests.endpoint import Call, ScriptedEndpoint
from tests.ray.conftest import Generate, wait_for
from tests.ray.test_generate import assert_whole, content
from tests.torture import models_at

REFINERS = 3
IN_FLIGHT = 8
PLAN = (
    'plan.questions=["wvs7-q28", "wvs7-q36"]',
    'plan.cultures=["arabic", "korean", "turkish"]',
    "plan.dialogues_per_question=24",
    "plan.utterances=4",
    f"limits.dialogues_in_flight={IN_FLIGHT}",
    "limits.adaptive=false",
    f"actors.refiners={REFINERS}",
)
SLOW_S = 0.4
JUST_NOW_S = 0.5
"""How long a reply may have been back and not be on disk yet."""


class Calm(NamedTuple):
    """An undisturbed run on one machine, what it asked for, and the endpoint that served it."""

    endpoint: ScriptedEndpoint
    out: Path
    paid: Counter[bytes]
    plan: tuple[str, ...]

    @classmethod
    def made(cls, out: Path, endpoint: ScriptedEndpoint, *changed: str) -> Calm:
        """Make that run; `changed` are settings that differ from the usual ones."""
        plan = (*PLAN, *changed)
        code, printed = Generate(out, *plan, *models_at(endpoint)).wait()
        assert code == 0, printed
        return cls(endpoint, out, endpoint.begin_again(), plan)

    def start(self, generate: Any, out: Path, latency_s: float = SLOW_S) -> Generate:
        """Start the same elsewhere, slowly."""
        self.endpoint.begin_again()
        self.endpoint.latency_s = latency_s
        return generate(out, *self.plan, *models_at(self.endpoint))

    def go_on(self, run: Generate, calls: int) -> None:
        """Wait until a run has made this many calls more; it must not be over then."""
        before = self.endpoint.served
        wait_for(lambda: self.endpoint.served > before + calls or run.process.poll() is not None, "calls")
        assert run.process.poll() is None, run.wait()[1]

    def end(self, run: Generate) -> None:
        """Let a run end, quickly."""
        self.endpoint.latency_s = 0.0
        code, printed = run.wait(120)
        assert code == 0, printed

    def resume(self, generate: Any, out: Path) -> None:
        """Give the same command again."""
        self.endpoint.latency_s = 0.0
        self.end(generate(out, *self.plan, *models_at(self.endpoint)))

    def open_between(self, start_s: float, end_s: float) -> Counter[bytes]:
        """The calls that were in flight at some moment of this time, by the clock of the wall, or had come
        back so shortly before that they may not have been on disk."""
        return self.endpoint.open_between(start_s - JUST_NOW_S, end_s + JUST_NOW_S)

    def assert_in_flight_at_once(self, out: Path, end_s: float) -> None:
        """Those that were paid for again and for the first time until then were, in each dialogue, in flight
        at one moment: when the process that had made them stopped. Processes stop one after the other, are
        there for seconds after they have stopped, and another may be asked in their place meanwhile."""
        again = self.endpoint.paid - self.paid
        hit: dict[str, list[Call]] = {}
        for call in self.endpoint.calls:  # in the order in which they began
            if call.dialogue and call.key in again and call.began_s <= end_s:  # embeddings name none
                hit.setdefault(call.dialogue, []).append(call)
        most = 1 + _times_asked_again(out / "logs" / "moderator.jsonl", end_s)
        for calls in hit.values():
            assert _moments(calls) <= most, calls

    def assert_same(self, out: Path, repeated: int | Counter[bytes]) -> None:
        """That run lost nothing, doubled nothing, changed nothing, and paid again for no more calls than so
        many, or for none but these."""
        assert_whole(out)
        for kind in ("dialogues", "samples", "rejected"):
            assert content(out, kind) == content(self.out, kind)
        assert not self.paid - self.endpoint.paid
        again = self.endpoint.paid - self.paid
        if isinstance(repeated, Counter):
            assert not again - repeated, f"{(again - repeated).total()} of {again.total()} are others"
        else:
            assert again.total() <= repeated, f"{again.total()} calls paid for again, and {repeated} may be"


def _times_asked_again(log: Path, until_s: float) -> int:
    """How often others were asked for what a lost actor had been."""
    lost = [json.loads(line) for line in log.read_text("utf-8").splitlines() if '"actor_lost"' in line]
    before = [one for one in lost if datetime.fromisoformat(one["timestamp"]).timestamp() <= until_s]
    return sum(one["asked_again"] > 0 for one in before)


def _moments(calls: list[Call]) -> int:
    """How many moments are needed for each of these calls to have been in flight at one of them."""
    found, until_s = 0, -math.inf
    for call in calls:
        if call.began_s > until_s + JUST_NOW_S:
            found, until_s = found + 1, call.ended_s
        until_s = min(until_s, call.ended_s)
    return found
