"""The steps of `scripts/experiment.py`: which commands are given, what is not done twice, what the page says.

The commands are played here: they leave the files that the real ones leave. `make loop` runs them for real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from culturepark.evaluation.measure import Measurement, compare_pairs, pairs_with_first
from culturepark.evaluation.report import check_free, report_of, write_report
from scripts import experiment
from tests import runs

FIGURES = {"BASE": 0.2, "own": 0.5, "joint": 0.9}


def measurement(model: str) -> Measurement:
    """Ten answers of a model, the same for each but for their level."""
    values = tuple((FIGURES[model] + n / 100,) for n in range(10))
    return Measurement(
        task="opinions",
        subset="all",
        metric="js",
        better="lower",
        unit="question",
        units=tuple("abcdefghij"),
        values=values,
        n=10,
        draws=10,
        invalid_rate=0.25,
    )


class Commands:
    """What was given to `culturepark`, and its effects. `fails` names a command that ends with code 6,
    `stops` one during which Ctrl-C is pressed."""

    def __init__(self, cultures: list[str]) -> None:
        self.given: list[list[str]] = []
        self.fails = self.stops = ""
        self._cultures = cultures
        self.returncode = 0

    def __call__(self, command: list[str], **_: Any) -> Commands:
        """Take the place of subprocess.Popen."""
        words = command[command.index("culturepark") + 1 :]
        self.given.append(words)
        self.returncode = 6 if words[0] == self.fails else 0
        self._pressed = words[0] == self.stops
        if not self.returncode and not self._pressed:
            self._do(words)
        return self

    def wait(self) -> int:
        """End; the first time with the Ctrl-C, if there is one."""
        pressed, self._pressed = self._pressed, False
        if pressed:
            raise KeyboardInterrupt
        return self.returncode

    def _do(self, words: list[str]) -> None:
        match words[0]:
            case "generate":
                out = Path(words[words.index("--out") + 1])
                if not out.exists():
                    runs.made(out, plan={"cultures": self._cultures})
            case "evaluate":
                models = [words[at + 1] for at, word in enumerate(words) if word == "--adapter"]
                models = models if "--no-base" in words else ["BASE", *models]
                measured = {model: [measurement(model)] for model in models}
                check_free(Path(words[words.index("--out") + 1]), force=False)
                report = report_of(measured, compare_pairs(pairs_with_first(measured)))
                write_report(Path(words[words.index("--out") + 1]), report, measured)
            case _:
                pass

    def named(self, command: str) -> list[str]:
        """Those of this name, in words, without where things lie."""
        return [
            " ".join(word for word in words[1:] if not word.startswith("/"))
            for words in self.given
            if words[0] == command
        ]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Two cultures."""
    played = Commands(["arabic", "korean"])
    monkeypatch.setattr(experiment.subprocess, "Popen", played)
    return played


def run(out: Path, *more: str) -> str:
    """The page of results."""
    config = str(Path(experiment.ROOT, "config", "loop.toml"))
    experiment.main(["--config", config, "--out", str(out), "--task", "opinions", *more])
    return (out / "results.md").read_text("utf-8")


def test_all_is_asked_for_once(commands: Commands, tmp_path: Path) -> None:
    page = run(tmp_path, "--set", "plan.utterances=4")
    assert commands.named("generate") == [
        "--out --set plan.utterances=4",
        '--out --set plan.utterances=4 --set plan.kinds=["direct"]',
    ]
    assert commands.named("finetune") == ["", ""]
    assert commands.named("evaluate") == [
        "--task quality --judge none --baseline --out",
        "--adapter own --adapter joint --task opinions --out",
        "--adapter own --adapter joint --no-base --task opinions --out",
    ]
    assert "| own | all js (lower) | 0.545 | " in page
    given = len(commands.given)
    assert run(tmp_path).split("## Time")[0] == page.split("## Time")[0]
    again = commands.given[given:]
    assert [words[0] for words in again] == ["generate", "generate", "finetune", "finetune"]  # which resume


def test_what_no_command_compares_is_compared(commands: Commands, tmp_path: Path) -> None:
    page = run(tmp_path, "--direct-joint").split("## Further comparisons")[1]
    rows = [row.split(" | ") for row in page.splitlines() if " against " in row]
    assert [(row[0].strip("| "), row[2]) for row in rows] == [
        ("joint against own", "0.400"),
        ("direct joint against base", "0.700"),
        ("dialogues joint against direct joint", "0.000"),
    ]


def test_what_is_asked_for_later_is_measured_later(commands: Commands, tmp_path: Path) -> None:
    run(tmp_path, "--direct-joint")
    assert commands.named("finetune") == ["", "--joint"]
    assert commands.named("evaluate")[-1] == "--adapter joint --no-base --task opinions --out"
    del commands.given[:]
    page = run(tmp_path)
    assert commands.named("finetune") == ["", ""]
    assert commands.named("evaluate") == ["--adapter own --adapter joint --no-base --task opinions --out"]
    assert "direct own against base" in page
    assert "direct joint against base" in page
    del commands.given[:]
    assert "direct own against base" in run(tmp_path, "--direct-joint")
    assert commands.named("evaluate") == []  # all of it is there


def test_without_baseline_and_joint(commands: Commands, tmp_path: Path) -> None:
    page = run(tmp_path, "--no-direct", "--no-joint")
    assert commands.named("finetune") == ["--culture arabic --culture korean"]
    assert commands.named("evaluate")[1:] == ["--adapter own --task opinions --out"]
    assert "Further" not in page
    with pytest.raises(SystemExit):
        run(tmp_path, "--no-joint", "--direct-joint")


def test_one_culture_has_no_joint_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone = Commands(["korean"])
    monkeypatch.setattr(experiment.subprocess, "Popen", alone)
    run(tmp_path, "--direct-joint")
    assert alone.named("finetune") == ["--culture korean"] * 2
    assert alone.named("evaluate")[1:] == [
        "--adapter own --task opinions --out",
        "--adapter own --no-base --task opinions --out",
    ]


@pytest.mark.parametrize(("how", "code"), [("fails", 6), ("stops", 130)])
def test_a_step_that_does_not_end_well_ends_it_and_is_gone_on_from(
    commands: Commands, tmp_path: Path, capsys: Any, how: str, code: int
) -> None:
    setattr(commands, how, "evaluate")
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--no-direct")
    assert ended.value.code == code
    assert "Give the same command again" in capsys.readouterr().out
    assert not (tmp_path / "results.md").exists()
    setattr(commands, how, "")
    assert "evaluate dialogues opinions" in run(tmp_path, "--no-direct").split("## Time")[1]
