"""A run that has its models tuned by itself: once each, whatever dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from culturepark.training.leakage import read_report
from culturepark.training.records import Records
from tests.ray.conftest import SCRIPTED, alive, children_named, wait_for

TRAINER = """
import json, pathlib, sys, time
log, gate, dataset, output, name = sys.argv[1:]
with open(log, "a") as told:
    told.write(name + "\\n")
rows = pathlib.Path(dataset, "train.jsonl").read_text().splitlines()
while not pathlib.Path(gate).exists():
    time.sleep(0.05)
pathlib.Path(output, "rows").write_text(str(len(rows)))
"""
PLAN = (
    *SCRIPTED,
    'plan.cultures=["arabic", "korean"]',
    'plan.questions=["wvs7-q28", "wvs7-q36", "wvs7-q38"]',
    "plan.dialogues_per_question=4",
    "plan.utterances=6",
    "training.launch=true",
    'training.backend="command"',
)


class Tuning:
    """A trainer of the user's that notes its launches and waits for a gate to open."""

    def __init__(self, folder: Path) -> None:
        self.log, self.gate, script = folder / "launches", folder / "gate", folder / "trainer.py"
        script.write_text(TRAINER)
        self.log.touch()
        command = [
            sys.executable,
            str(script),
            str(self.log),
            str(self.gate),
            "{dataset}",
            "{output}",
            "{name}",
        ]
        self.settings = (*PLAN, f"training.command={json.dumps(command)}")

    @property
    def launches(self) -> Counter[str]:
        return Counter(self.log.read_text().split())

    @property
    def running(self) -> bool:
        """Whether a process of the trainer lives."""
        mine = str(self.log).encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mine in (entry / "cmdline").read_bytes().split(b"\0"):
                    return True
        return False


@pytest.fixture
def tuning(tmp_path: Path) -> Tuning:
    return Tuning(tmp_path)


def assert_all_once(tuning: Tuning, out: Path) -> None:
    assert tuning.launches == {"arabic": 1, "korean": 1, "joint": 1}
    events = Counter((record.job.name, record.event) for record in Records(out).all())
    assert all(events[name, "finished"] == 1 for name in tuning.launches)
    assert not any(event == "failed" for _, event in events)


def test_each_culture_and_all_together_are_tuned_once(tmp_path: Path, generate: Any, tuning: Tuning) -> None:
    out = tmp_path / "run"
    run = generate(out, *tuning.settings)
    wait_for(lambda: tuning.launches, "a launch")
    tuning.gate.touch()
    code, printed = run.wait()
    assert code == 0, printed
    assert_all_once(tuning, out)
    leaks = [read_report(out / record.job.dataset) for record in Records(out).all()]
    assert all(one and one.items["held-out questions"] == 1 for one in leaks)
    code, printed = generate(out, *tuning.settings).wait()
    assert code == 0, printed
    assert_all_once(tuning, out)


@pytest.mark.parametrize("victim", ["driver", "Trainer", "Collector"])
def test_what_dies_meanwhile_launches_nothing_twice(
    tmp_path: Path, generate: Any, tuning: Tuning, victim: str
) -> None:
    out = tmp_path / "run"
    run = generate(out, *tuning.settings)
    wait_for(lambda: tuning.launches, "a launch")
    if victim == "driver":
        trainers = children_named(run.process.pid, "ray::Trainer")
        run.kill()
        wait_for(lambda: not any(map(alive, trainers)), "the actor's end")
        run = generate(out, *tuning.settings)
    else:
        for pid in children_named(run.process.pid, f"ray::{victim}"):
            os.kill(pid, signal.SIGKILL)
    tuning.gate.touch()
    code, printed = run.wait()
    assert code == 0, printed
    assert_all_once(tuning, out)


@pytest.mark.parametrize("how", ["once, its actor having died", "twice"])
def test_ctrl_c_leaves_no_training_behind(tmp_path: Path, generate: Any, tuning: Tuning, how: str) -> None:
    if how == "twice":  # a training that will not be stopped keeps the first one waiting
        stubborn = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        (tmp_path / "trainer.py").write_text(stubborn + TRAINER)
    out = tmp_path / "run"
    run = generate(out, *tuning.settings)
    wait_for(lambda: tuning.launches, "a launch")
    assert tuning.running
    if how == "twice":
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    else:
        for pid in children_named(run.process.pid, "ray::Trainer"):
            os.kill(pid, signal.SIGKILL)
    run.process.send_signal(signal.SIGINT)
    code, printed = run.wait()
    assert code == (130 if how == "twice" else 5), printed
    wait_for(lambda: not tuning.running, "the training's end")
    time.sleep(2)  # nor is the next one launched when this one is seen to have ended
    assert not tuning.running
    assert how != "twice" or tuning.launches.total() == 1


def test_a_training_that_fails_is_told_and_the_data_is_there(
    tmp_path: Path, generate: Any, tuning: Tuning
) -> None:
    (tmp_path / "trainer.py").write_text("raise SystemExit(3)")
    out = tmp_path / "run"
    code, printed = generate(out, *tuning.settings).wait()
    assert code not in (0, 70), printed
    assert "training of arabic" in printed
    assert "exit code 3" in printed
    assert (out / "summary.json").exists()
