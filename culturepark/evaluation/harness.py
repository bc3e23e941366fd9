"""Benchmarks of lm-evaluation-harness (extra `harness`), in a process of its own against an endpoint.

It downloads its data sets from a hub, so nothing here runs unless the user names a benchmark.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from culturepark.errors import ConfigError
from culturepark.evaluation.forgetting import TASK
from culturepark.evaluation.measure import Better, Measurement
from culturepark.models.replicas import base_urls_of
from culturepark.models.secrets import api_key_of
from culturepark.settings import ModelSettings
from culturepark.store.files import disk_errors, make_dirs
from culturepark.training.subprocess_backend import exit_words, last_lines

PACKAGE = "lm_eval"
LOG = "harness.log"
_CONCURRENCY = 8
"""The harness's requests in flight, unless the model's settings say how many it decodes at once."""
_TOLERANCE = 1e-6
"""A metric that differs from the mean of its questions by more than this is not such a mean."""


class _Results(Struct):
    """The fields of the harness's results that are used. Metrics are keyed `metric,filter`."""

    results: dict[str, dict[str, Any]]
    group_subtasks: dict[str, list[str]] = {}
    higher_is_better: dict[str, dict[str, bool | None]] = {}


def require_harness() -> None:
    """Check before any request whether the harness is installed. Raises ConfigError."""
    if importlib.util.find_spec(PACKAGE) is None:
        what = "lm-evaluation-harness is not installed."
        raise ConfigError("--harness", what, "Run `pip install 'culturepark[harness]'`.")


def refuse_adapters(adapters: Mapping[str, object]) -> None:
    """Refuse adapters of the embedded engine: they have no model name. Raises ConfigError."""
    if adapters:
        what = "an adapter on the embedded engine has no model name that the harness could ask for."
        fix = "Serve it with vLLM (docs/training.md) and evaluate that address with `--model NAME`."
        raise ConfigError("--harness", what, fix)


async def evaluate(model: ModelSettings, tasks: Sequence[str], folder: Path) -> list[Measurement]:
    """Run benchmarks on a served model; what the harness writes stays in `folder`.

    Raises ConfigError, with the harness's last words, if it fails; RunDirError about the disk.
    """
    require_harness()
    command, environment = command_of(model, tasks, folder), environment_of(model, os.environ)
    make_dirs(folder)
    log = folder / LOG
    with disk_errors(log), log.open("wb") as output:
        # It inherits our terminal's signals: Ctrl-C ends both.
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.terminate()
            await process.wait()
            raise
    if code:
        last = "".join(last_lines(log, 1))[:300] or "it printed nothing."
        what = f"lm_eval ended {exit_words(code)}: {last}"
        raise ConfigError("--harness", what, f"Its whole output is in {log}.")
    return read_results(folder)


def command_of(model: ModelSettings, tasks: Sequence[str], folder: Path) -> list[str]:
    """The command line; the key goes by the environment. Raises ConfigError if the address is none."""
    arguments = {
        "model": model.served_name,
        "base_url": f"{base_urls_of(model)[0]}/chat/completions",
        "num_concurrent": model.parallel or _CONCURRENCY,
        "max_retries": 3,
        "tokenized_requests": False,
    }
    how = ("--model", "local-chat-completions", "--model_args", json.dumps(arguments))
    where = ("--apply_chat_template", "--output_path", str(folder), "--log_samples")
    return [sys.executable, "-m", PACKAGE, "run", *how, "--tasks", *tasks, *where]


def environment_of(model: ModelSettings, environment: Mapping[str, str]) -> dict[str, str]:
    """The harness reads its key from OPENAI_API_KEY, whatever variable or file the model's is in; a model on
    this machine needs none. Raises ConfigError if the key cannot be read."""
    key = api_key_of(model) if model.engine == "openai" else ""
    return {**environment, "OPENAI_API_KEY": key}


def read_results(folder: Path) -> list[Measurement]:
    """The newest results below a folder: one figure a benchmark, metric and filter. Raises ConfigError."""
    fix = f"See {folder / LOG}: another version of the harness may write other files."
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        raise ConfigError("--harness", f"lm_eval left no results in {folder}.", fix)
    try:
        results = msgspec.json.decode(files[-1].read_bytes(), type=_Results)
        samples = _samples(files[-1])
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise ConfigError(str(files[-1]), f"it cannot be read: {error}.", fix) from None
    below = {task for tasks in results.group_subtasks.values() for task in tasks}
    named = [task for task in {**results.group_subtasks, **results.results} if task not in below]
    found = [one for task in dict.fromkeys(named) for one in _measured(task, results, samples)]
    if not found:
        what = "lm_eval gave no figure that is a mean over questions."
        raise ConfigError("--harness", what, f"Its results are in {files[-1]}.")
    return found


Samples = dict[str, list[dict[str, Any]]]


def _samples(results: Path) -> Samples:
    """Every answered question by benchmark, of the files that were written with these results."""
    stamp = results.stem.removeprefix("results_")
    found: Samples = {}
    for path in sorted(results.parent.glob(f"samples_*_{stamp}.jsonl")):
        task = path.stem.removeprefix("samples_").removesuffix(f"_{stamp}")
        lines = path.read_text("utf-8").splitlines()
        found[task] = [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    return found


def _measured(task: str, results: _Results, samples: Samples) -> list[Measurement]:
    """The figures of one benchmark. Of a group, all its questions together."""
    found: list[Measurement] = []
    for key, value in results.results.get(task, {}).items():
        metric, comma, by = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        leaves = _leaves(task, results.group_subtasks)
        scores = [pair for leaf in leaves for pair in _scores(leaf, metric, by, samples)]
        mean = sum(score for _, score in scores) / len(scores) if scores else None
        if mean is None or abs(mean - value) > _TOLERANCE:
            continue  # not a mean over questions, so no interval can be drawn over them
        found.append(
            Measurement(
                task=TASK,
                subset=task,
                metric=metric if by == "none" else f"{metric} ({by})",
                better=_better(leaves[0], metric, results),
                unit="question",
                units=tuple(unit for unit, _ in scores),
                values=tuple((score,) for _, score in scores),
                n=len(scores),
                draws=len(scores),
                invalid_rate=0.0,
                notes=(_note(task, metric, by, results),),
            )
        )
    return found


def _leaves(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    below = groups.get(task, ())
    return [leaf for one in below for leaf in _leaves(one, groups)] if below else [task]


def _scores(task: str, metric: str, by: str, samples: Samples) -> list[tuple[str, float]]:
    return [
        (f"{task}/{one['doc_id']}", float(one[metric]))
        for one in samples.get(task, ())
        if one.get("filter") == by and isinstance(one.get(metric), float | int)
    ]


def _better(task: str, metric: str, results: _Results) -> Better:
    higher = results.higher_is_better.get(task, {}).get(metric)
    return "neither" if higher is None else "higher" if higher else "lower"


def _note(task: str, metric: str, by: str, results: _Results) -> str:
    error = results.results[task].get(f"{metric}_stderr,{by}")
    spread = f"a standard error of {error:.3g}" if isinstance(error, float) else "no standard error"
    return f"{task} {metric}: lm-evaluation-harness gives {spread}, and no share of unreadable replies."
