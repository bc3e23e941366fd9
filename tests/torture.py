"""Kills at random moments, and what is left of the run afterwards.

    python -m tests.torture --kills 500 --seed 1

One run against a real HTTP endpoint whose model is scripted, so what it says follows from the prompt.
While it goes on, processes are killed with SIGKILL at seeded random moments: agents, refiners, the
collector, the moderator, and now and then the driver, after which the same command is given again.
Then the endpoint becomes quick, the run ends, and this must hold:

- every planned dialogue is there exactly once, every sample exactly once, `culturepark check` finds nothing;
- dialogues, samples and rejected opinions equal those of an undisturbed run, to the word;
- no more calls were paid for twice than were in flight, or had come back a moment before, at the kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from msgspec import Struct

from tests.endpoint import ScriptedEndpoint
from tests.ray.conftest import Generate, children_named, summary, wait_for
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
"""How long before a kill a reply may have come back and not be on disk yet: the machine may be busy."""
_PAUSE_S = (0.0, 2.0)
_IN_FLIGHT = 32
_SLOW_S = 0.8


class Tortured(Struct):
    """What came of it. `repeated` are calls paid for more than once; `allowed` those open at the kills."""

    kills: Counter[str]
    dialogues: int
    samples: int
    calls: int
    repeated: int
    in_flight: int
    just_back: int
    took_s: float

    @property
    def allowed(self) -> int:
        """Calls that may have been repeated."""
        return self.in_flight + self.just_back


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
    killed: Counter[str] = Counter()
    in_flight = just_back = 0
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
        while killed.total() < kills:
            target = dice.choices(list(TARGETS), list(TARGETS.values()))[0]
            before = endpoint.served
            wait_for(lambda of=before, on=run: endpoint.served > of or on.process.poll() is not None, "calls")
            time.sleep(dice.uniform(*_PAUSE_S))
            assert run.process.poll() is None, run.wait()[1]
            pids = [run.process.pid] if target == "driver" else _victims(run.process.pid, target)
            open_now, back = endpoint.open_calls(_JUST_NOW_S)
            in_flight, just_back = in_flight + open_now, just_back + back
            killed[target] += 1
            if target == "driver":
                run.kill()
                run = Generate(out, *command)
            else:
                os.kill(dice.choice(sorted(pids)), signal.SIGKILL)
            if killed.total() % 25 == 0:
                say(f"{killed.total()} kills after {time.monotonic() - began:.0f} s")
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
    total = summary(out)["total"]
    found = Tortured(
        kills=killed,
        dialogues=total["finished"] + total["failed"],
        samples=total["kept"],
        calls=endpoint.paid.total(),
        repeated=repeated.total(),
        in_flight=in_flight,
        just_back=just_back,
        took_s=time.monotonic() - began,
    )
    assert not once - endpoint.paid, "calls that an undisturbed run makes are missing"
    assert found.repeated <= found.allowed, found
    return found


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
    print(
        f"{found.calls} calls; {found.repeated} paid for again; at the kills {found.in_flight} were in"
        f" flight and {found.just_back} had come back within {_JUST_NOW_S} s"
    )
    print(json.dumps({"lost": 0, "doubled": 0, "repeated_calls": found.repeated}))


if __name__ == "__main__":
    main()
