"""From nothing to tuned models and what they are worth: generate, tune, evaluate, print.

    python scripts/experiment.py --config config/loop.toml --out runs/loop      what `make loop` does
    python scripts/experiment.py --config config/experiment.toml --out runs/experiment

Every step is a `culturepark` command that can be given by hand, and is shown before it runs. What was done
is not done again, so a run that was stopped goes on. Beside the run, a second one of the same plan asks the
model directly for opinions instead of holding dialogues (`--no-direct` leaves it out): the baseline that
dialogues have to beat, as data (quality) and as what models are tuned on. The results are in OUT/results.md
and, whole, in OUT/*/report.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from culturepark.evaluation.measure import compare_pairs
from culturepark.evaluation.report import FLOORS, read_measurements
from culturepark.store.rundir import load_run
from culturepark.training.adapters import adapters_of
from culturepark.training.datasets import read_dataset

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("opinions", "vsm", "moderation", "forgetting")
OWN, JOINT = "own", "joint"


class Experiment:
    """The steps, in a directory."""

    def __init__(
        self, config: Path, out: Path, tasks: Sequence[str], sets: list[str], items_each: int
    ) -> None:
        self._config, self._out, self._tasks, self._sets = config, out, tasks, sets
        self._items_each = items_each
        self._times = out / "times.json"

    def generate(self, name: str, *sets: str) -> Path:
        """A run of the plan."""
        run = self._out / name
        options = [word for one in (*self._sets, *sets) for word in ("--set", one)]
        self._step(f"generate {name}", "generate", str(self._config), "--out", str(run), *options)
        return run

    def tune(self, run: Path, adapters: Sequence[str]) -> None:
        """An adapter for each culture, or the joint one, or both."""
        cultures = load_run(run).plan.planned()
        only: list[str] = []
        if JOINT not in adapters:
            only = [word for one in cultures for word in ("--culture", one)]
        elif OWN not in adapters:
            only = ["--joint"]
        self._step(f"tune {run.name}", "finetune", str(run), *only)

    def evaluate(self, run: Path, adapters: Sequence[str], base: bool) -> None:
        """The adapters (OWN: each culture's own), task by task; beside them, if it is wanted, the base."""
        for task in self._tasks:
            out = self._out / f"{run.name}-{task}"
            if _models_in(out).issuperset(adapters):
                continue
            options = [word for one in adapters for word in ("--adapter", one)]
            options += [] if base else ["--no-base"]
            options += ["--task", task, "--out", str(out)]
            (out / "report.json").unlink(missing_ok=True)  # of other adapters; answers to them are kept
            if task == "vsm":
                options += ["--items-each", str(self._items_each)]
            self._step(f"evaluate {run.name} {task}", "evaluate", str(run), *options)

    def judge_data(self, run: Path, baseline: Path | None) -> None:
        """The quality of what was generated, counted; no model here is judge enough for the rest."""
        out = self._out / f"{run.name}-quality"
        if not (out / "report.json").exists():
            beside = ("--baseline", str(baseline)) if baseline else ()
            where = ("--task", "quality", "--judge", "none", *beside, "--out", str(out))
            self._step(f"quality of {run.name}", "evaluate", str(run), *where)

    def _step(self, name: str, *command: str) -> None:
        print(f"\n$ culturepark {shlex.join(command)}", flush=True)
        began = time.monotonic()
        running = subprocess.Popen([sys.executable, "-m", "culturepark", *command], cwd=ROOT)
        stopped = False
        try:
            running.wait()
        except KeyboardInterrupt:  # it has reached the command, too, which ends in its own time
            stopped = True
            running.wait()
        times = self.times()
        times[name] = times.get(name, 0.0) + round(time.monotonic() - began, 1)
        self._times.write_text(json.dumps(times, indent=1), "utf-8")
        if running.returncode or stopped:
            print(f"\n{name} ended with code {running.returncode}. Give the same command again to go on.")
            raise SystemExit(running.returncode or 130)

    def times(self) -> dict[str, float]:
        """Seconds of each step, over all sittings."""
        return json.loads(self._times.read_text("utf-8")) if self._times.exists() else {}

    def results(self) -> str:
        """All tables, as Markdown."""
        parts = [f"# Results of {self._config.name}", "", *self._tuning()]
        for report in sorted(self._out.glob("*/report.json")):
            parts += [f"## {report.parent.name}", "", *_tables(json.loads(report.read_text("utf-8"))), ""]
        parts += self._further()
        parts += ["## Time", "", "| step | minutes |", "|---|---:|"]
        parts += [f"| {name} | {seconds / 60:.1f} |" for name, seconds in self.times().items()]
        return "\n".join(parts) + "\n"

    def _tuning(self) -> list[str]:
        """What each adapter was tuned on, and its losses."""
        head = "| run | adapter | rows | epochs | held out | training loss | held-out loss |"
        lines = ["## Tuning", "", head, "|---|---|---:|---:|---:|---:|---:|"]
        for name in ("dialogues", "direct"):
            for adapter in adapters_of(self._out / name).values():
                dataset, outcome = read_dataset(adapter.dataset), adapter.outcome
                epochs = outcome.steps * adapter.recipe.batch / max(1, dataset.n_train)
                lines.append(
                    f"| {name} | {adapter.name} | {dataset.n_train} | {epochs:.2f} | {dataset.n_held_out} "
                    f"| {_fall(outcome.fall)} | {_fall(outcome.held_out_loss)} |"
                )
        return [*lines, ""]

    def _further(self) -> list[str]:
        """What no single command compares: joint and own adapters, and those tuned on direct generation with
        the base and with those tuned on dialogues. Corrected by task."""
        lines: list[str] = []
        for task in self._tasks:
            folders = {name: self._out / f"{name}-{task}" for name in ("dialogues", "direct")}
            measured = {name: read_measurements(of) for name, of in folders.items() if _models_in(of)}
            tuned, direct = measured.get("dialogues", {}), measured.get("direct", {})
            pairs = [((OWN, tuned[OWN]), (JOINT, tuned[JOINT]))] if tuned.keys() >= {OWN, JOINT} else []
            base = next((name for name in tuned if name not in (OWN, JOINT)), None)
            for adapter, found in direct.items():
                mine = (f"direct {adapter}", found)
                pairs += [(("base", tuned[base]), mine)] if base else []
                pairs += [(mine, (f"dialogues {adapter}", tuned[adapter]))] if adapter in tuned else []
            if compared := compare_pairs(pairs):
                lines += ["", f"### {task}", *_comparisons([msgspec.to_builtins(one) for one in compared])]
        return ["## Further comparisons", *lines, ""] if lines else []


def _models_in(out: Path) -> set[str]:
    """The models that an evaluation reported on; none, if it has not ended."""
    report = out / "report.json"
    return {one["model"] for one in json.loads(report.read_bytes())["figures"]} if report.exists() else set()


def _tables(report: dict[str, Any]) -> list[str]:
    lines = ["| model | figure | value | 95 % | constant | random | majority | others | n | unreadable |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    tuned = {OWN, JOINT}.intersection(one["model"] for one in report["figures"])
    for one in report["figures"]:
        if one["better"] == "neither":
            continue
        model = _short(one["model"]) if tuned else one["model"]
        floors = " | ".join(_number(one[f"floor_{name}"]) for name in FLOORS)
        lines.append(
            f"| {model} | {one['subset']} {one['metric']} ({one['better']}) | {_number(one['value'])} "
            f"| {_range(one)} | {floors} | {one['n']} | {one['invalid_rate']:.0%} |"
        )
    comparisons = report["comparisons"]
    if tuned:
        comparisons = [
            one | {"first": _short(one["first"]), "second": _short(one["second"])} for one in comparisons
        ]
    return lines + _comparisons(comparisons)


def _short(model: str) -> str:
    """A column's name for a model: the base's own is long."""
    return model if model in (OWN, JOINT) else "base"


def _comparisons(comparisons: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "| comparison | figure | difference | 95 % | p (Holm) | units |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for one in comparisons:
        found = one["difference"] or {}
        lines.append(
            f"| {one['second']} against {one['first']} | {one['subset']} {one['metric']} ({one['better']}) "
            f"| {_number(found.get('value'))} | {_range(found)} | {_number(one['p_holm'])} "
            f"| {one['n_units']} |"
        )
    return lines if comparisons else []


def _fall(losses: tuple[float, float] | None) -> str:
    return "-" if losses is None else f"{losses[0]:.3f} to {losses[1]:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _range(found: dict[str, Any]) -> str:
    low, high = found.get("low"), found.get("high")
    return "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is left to do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "config" / "experiment.toml")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--task", action="append", choices=TASKS, help="only this; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--no-direct", action="store_true", help="without the baseline of direct generation")
    parser.add_argument(
        "--no-joint", action="store_true", help="without the adapter of all cultures together"
    )
    parser.add_argument(
        "--direct-joint",
        action="store_true",
        help="tune the joint adapter alone on direct generation, and none a culture",
    )
    parser.add_argument(
        "--items-each", type=int, default=12, metavar="N", help="vsm: items each person is asked (12 of 24)"
    )
    given = parser.parse_args(arguments)
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.direct_joint and (given.no_joint or given.no_direct):
        parser.error("--direct-joint needs both the joint adapter and direct generation")
    tasks: Sequence[str] = given.task or TASKS
    experiment = Experiment(given.config.resolve(), out, tasks, given.set, given.items_each)
    runs = [experiment.generate("dialogues")]
    if not given.no_direct:
        runs.append(experiment.generate("direct", 'plan.kinds=["direct"]'))
    experiment.judge_data(runs[0], runs[1] if len(runs) > 1 else None)
    joint = not given.no_joint and len(load_run(runs[0]).plan.planned()) > 1  # of one culture it is its own
    both = (OWN, JOINT) if joint else (OWN,)
    for run in runs:  # the base is the same for both
        dialogues = run is runs[0]
        adapters = (JOINT,) if given.direct_joint and joint and not dialogues else both
        experiment.tune(run, adapters)
        experiment.evaluate(run, adapters, base=dialogues)
    results = experiment.results()
    (out / "results.md").write_text(results, "utf-8")
    print(f"\n{results}\nWritten to {out / 'results.md'}")


if __name__ == "__main__":
    main()
