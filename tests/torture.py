"""Kills at random moments, and what is left of the run afterwards.

    python -m tests.torture --kills 500 --seed 1

One run against a real HTTP endpoint whose model is scripted, so what it says follows from the prompt.
While it goes on, processes are killed with SIGKILL at seeded random moments: agents, refiners, the
collector, the moderator, and now and then the driver, after which the same command is given again.
Then the endpoint becomes quick, the run ends, and this must hold:

- every planned dialogue is there exactly once, every sample exactly once, `culturepark check` finds nothing;
- dialogues, samples and rejected opinions equal those of an undisturbed run, to the word;
- a call was paid for again only if it was in flight within half a second of a kill, and as often as it was.

A kill is a moment, for agents and refiners. A moderator's lasts until its successor has started: until then
workers go on with what the old one asked for. A driver's lasts until its last agent and refiner have. Either
begins with the collector's death if the collector was down at the time: what came back since had to wait
for it. The collector's own death repeats nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from msgspec import Struct

from tests.endpoint import ScriptedEndpoint
from tests.ray.conftest import Generate, alive, children_named, rows, summary, wait_for
from tests.ray.test_generate import assert_whole, content

TARGETS = {
    "ray::CulturalAgent": 8,
    "ray::RefinerActor": 5,
    "ray::Collector": 5,
    "ray::Moderator": 4,
    "driver": 2,
}
"""What is killed, and how often in relation to the others."""

_JUST_NOW_S = 0.5
"""How long before a kill a reply may have come back and not be on disk yet, and how long after it the
endpoint may see a call that was made before, or a worker hear of a new moderator: the machine may be busy."""

CALLERS = ("ray::CulturalAgent", "ray::RefinerActor")
_PAUSE_S = (0.0, 2.0)
_IN_FLIGHT = 32
_SLOW_S = 0.8


class Kill(Struct):
    """A process was killed: of which kind, and from when to when, by the clock of the wall."""

    target: str
    at_s: float
    over_s: float


class Tortured(Struct):
    """What came of it: `lost` and `doubled` are dialogues, samples and rejected opinions, against an
    undisturbed run; `repeated` are calls paid for more often than there, `allowed` those open at kills."""

    kills: Counter[str]
    dialogues: int
    samples: int
    lost: int
    doubled: int
    calls: int
    repeated: int
    allowed: int
    took_s: float


def torture(folder: Path, kills: int, seed: int, say: Any = print) -> Tortured:
    """Torture one run; raises AssertionError if anything is lost, doubled or changed."""
    dice = random.Random(seed)
    began = time.monotonic()
    plan = (
        # Enough that the run never ends before the last kill: some four dialogues end in a second.
        f"plan.dialogues_per_question={1 + kills // 5}",
        "plan.questions=[]",
        'plan.cultures=["arabic", "korean"]',
        "plan.utterances=6",
        f"limits.dialogues_in_flight={_IN_FLIGHT}",
        "limits.requests_in_flight=512",
        "limits.adaptive=false",
        "actors.refiners=2",
        "store.shard_dialogues=40",
    )
    killed: list[Kill] = []
    with ScriptedEndpoint().serving() as endpoint:
        command = (*plan, *models_at(endpoint))
        code, printed = Generate(folder / "calm", *command).wait(600)
        assert code == 0, printed
        assert_whole(folder / "calm")
        once = endpoint.begin_again()
        ended = summary(folder / "calm")["total"]["finished"]
        say(f"undisturbed: {ended} dialogues, {once.total()} calls, {time.monotonic() - began:.0f} s")

        endpoint.latency_s = _SLOW_S
        out = folder / "run"
        run = Generate(out, *command)
        while len(killed) < kills:
            target = dice.choices(list(TARGETS), list(TARGETS.values()))[0]
            before = endpoint.served
            wait_for(lambda of=before, on=run: endpoint.served > of or on.process.poll() is not None, "calls")
            time.sleep(dice.uniform(*_PAUSE_S))
            assert run.process.poll() is None, run.wait()[1]
            pids = [run.process.pid] if target == "driver" else _victims(run.process.pid, target)
            killed.append(Kill(target, time.time(), 0.0))
            if target == "driver":
                theirs = [pid for name in CALLERS for pid in children_named(run.process.pid, name)]
                run.kill()
                run = Generate(out, *command)
                wait_for(lambda of=theirs: not any(map(alive, of)), "the end of its callers")
            else:
                os.kill(dice.choice(sorted(pids)), signal.SIGKILL)
            killed[-1].over_s = time.time()
            if len(killed) % 25 == 0:
                say(f"{len(killed)} kills after {time.monotonic() - began:.0f} s")
        # No kill is to last into the quick end, where hundreds of calls are made in a second.
        last = max((kill.at_s for kill in killed if kill.target == "ray::Moderator"), default=0.0)
        log = out / "logs" / "moderator.jsonl"
        wait_for(lambda: _next_event(log, "started", last) < math.inf, "the last moderator")
        time.sleep(2 * _JUST_NOW_S)
        endpoint.latency_s = 0.0
        code, printed = run.wait(900)
        assert code == 0, printed
    assert_whole(out)
    for kind in ("dialogues", "samples", "rejected"):
        assert content(out, kind) == content(folder / "calm", kind), f"{kind} differ from an undisturbed run"
    check = subprocess.run(
        [sys.executable, "-m", "culturepark", "check", str(out)], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr
    repeated = endpoint.paid - once
    allowed = may_be_repeated(endpoint, killed, out / "logs")
    lost, doubled = _lost_and_doubled(folder / "calm", out)
    total = summary(out)["total"]
    found = Tortured(
        kills=Counter(kill.target for kill in killed),
        dialogues=total["finished"] + total["failed"],
        samples=total["kept"],
        lost=lost,
        doubled=doubled,
        calls=endpoint.paid.total(),
        repeated=repeated.total(),
        allowed=allowed.total(),
        took_s=time.monotonic() - began,
    )
    assert not once - endpoint.paid, "calls that an undisturbed run makes are missing"
    assert not repeated - allowed, (found, _told(repeated - allowed, endpoint, killed))
    assert (found.lost, found.doubled) == (0, 0), found
    return found


def may_be_repeated(endpoint: ScriptedEndpoint, killed: Sequence[Kill], logs: Path) -> Counter[bytes]:
    """The calls that may have been paid for again, each as often as it was open at one of these kills."""
    allowed: Counter[bytes] = Counter()
    down = [(k.at_s, _next_event(logs / "collector.jsonl", "opened", k.at_s)) for k in killed if _stores(k)]
    for kill in killed:
        if kill.target == "ray::Collector":
            continue
        start_s = min([kill.at_s, *(at for at, up in down if at <= kill.at_s <= up + _JUST_NOW_S)])
        over_s = kill.over_s
        if kill.target == "ray::Moderator":
            over_s = _next_event(logs / "moderator.jsonl", "started", kill.at_s)
        allowed += endpoint.open_between(start_s - _JUST_NOW_S, over_s + _JUST_NOW_S)
    return allowed


def _stores(kill: Kill) -> bool:
    return kill.target in ("ray::Collector", "driver")


def _next_event(log: Path, name: str, after_s: float) -> float:
    """When a line with this event was next written to an actor's log."""
    for line in log.read_text("utf-8").splitlines():
        entry = json.loads(line)
        at_s = datetime.fromisoformat(entry["timestamp"]).timestamp()
        if entry["event"] == name and at_s > after_s:
            return at_s
    return math.inf


def _lost_and_doubled(calm: Path, out: Path) -> tuple[int, int]:
    """Rows of the undisturbed run that the other lacks, and those that it has more often."""
    lost = doubled = 0
    for kind in ("dialogues", "samples", "rejected"):
        expected, found = (Counter(row["id"] for row in rows(of, kind)) for of in (calm, out))
        lost, doubled = lost + (expected - found).total(), doubled + (found - expected).total()
    return lost, doubled


def _told(calls: Counter[bytes], endpoint: ScriptedEndpoint, killed: Sequence[Kill]) -> str:
    """When calls were made that should not have been, beside the kills before them."""
    lines: list[str] = []
    for call in endpoint.calls:
        if call.key in calls:
            before = [f"{k.target} {call.began_s - k.at_s:.2f} s" for k in killed if k.at_s < call.began_s]
            lines.append(f"{call.key.hex()} {call.ended_s - call.began_s:.2f} s long, after {before[-3:]}")
    return "\n".join(sorted(lines)[:40])


def _victims(driver: int, target: str) -> list[int]:
    """The processes of a class of actors, once there is one."""
    wait_for(lambda: children_named(driver, target), target)
    return children_named(driver, target)


def models_at(endpoint: ScriptedEndpoint) -> list[str]:
    """Settings that call this endpoint."""
    return [
        line
        for name in ("chat", "embedder")
        for line in (
            f'models.{name}.engine="openai"',
            f'models.{name}.model="mock"',
            f'models.{name}.base_urls=["{endpoint.url}"]',
        )
    ] + ['models.chat.profile="full"']


def main() -> None:
    """Torture, and print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the same seed kills alike")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    os.environ.setdefault("OPENAI_API_KEY", "none")
    with tempfile.TemporaryDirectory(prefix="culturepark-torture-") as folder:
        found = torture(Path(folder), given.kills, given.seed, say=lambda line: print(line, flush=True))
    kills = ", ".join(f"{n} {name.removeprefix('ray::')}" for name, n in found.kills.most_common())
    print(f"{found.kills.total()} kills ({kills}) in {found.took_s:.0f} s")
    print(f"{found.dialogues} dialogues and {found.samples} samples, each exactly once, as undisturbed")
    print(f"{found.calls} calls; {found.repeated} paid for again, each of them one of the {found.allowed}")
    print(f"that were in flight within {_JUST_NOW_S} s of a kill")
    print(json.dumps({"lost": found.lost, "doubled": found.doubled, "repeated_calls": found.repeated}))


if __name__ == "__main__":
    main()
