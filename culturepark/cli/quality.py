"""`culturepark evaluate RUN --task quality`: the run's data, its judge, and a baseline on the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console

from culturepark.cli.arguments import JUDGED_ROWS
from culturepark.cli.evaluate_options import NO_JUDGE, EvaluateOptions
from culturepark.cli.views.evaluation import progress_bar
from culturepark.errors import ConfigError
from culturepark.evaluation import judge_calibration, judged_quality, quality
from culturepark.evaluation.answer_cache import AnswerCache
from culturepark.evaluation.asking import Asker
from culturepark.evaluation.measure import Measurement
from culturepark.evaluation.report import Measured
from culturepark.evaluation.run_data import RunData, read_run_data
from culturepark.evaluation.suite import unique_names
from culturepark.evaluation.targets import EMBEDDED, Target, target_models, target_of
from culturepark.models.local.engine import embedded_name, require_engine
from culturepark.models.local.serving import local_embedder
from culturepark.ports import Vectors
from culturepark.settings import ModelSettings
from culturepark.store.rundir import Run, load_run


async def measure_data(
    console: Console, options: EvaluateOptions, cultures: Sequence[str]
) -> tuple[Measured, Measured, list[str]]:
    """Figures by run, those of the judge, and cautions; of all cultures if none is named.

    Raises ConfigError, RunDirError, EndpointError.
    """
    roots = [_run_at("TARGET", options.target)]
    roots += [_run_at("--against", options.against)] if options.against is not None else []
    baseline_run = _run_at("--baseline", str(options.baseline)) if options.baseline is not None else None
    judge = _judge_of(roots[0], options)
    runs = [_only(read_run_data(run), cultures) for run in roots]
    baseline = _only(read_run_data(baseline_run), cultures) if baseline_run is not None else None
    every = [*runs, *([baseline] if baseline else [])]
    names = [f"data of {name}" for name in unique_names([one.run.root.resolve().name for one in every])]
    notes = [note for name, one in zip(names, every, strict=True) for note in _left_out(name, one)]
    same = _same_embedder(runs[0], runs[-1])
    if len(runs) > 1:
        notes += _differences(names[0], runs[0], names[1], runs[1])
    originals = [await _statement_vectors(name, one, notes) for name, one in zip(names, every, strict=True)]
    measured: Measured = {
        name: quality.measurements(one, vectors, same_embedder=same)
        for name, one, vectors in zip(names, runs, originals, strict=False)
    }
    if baseline:
        notes += _differences(names[0], every[0], names[-1], baseline)
        first, second = _budget_figures(every, originals, notes)
        measured[names[0]] = [*measured[names[0]], *first]
        measured[names[-1]] = second
    if judge is not None:
        found, of_judge = await _judged(console, judge, runs, options, notes)
        for name, more in zip(names, found, strict=False):
            measured[name] = [*measured[name], *more]
        return measured, {f"judge {judge.name}": of_judge}, notes
    return measured, {}, notes


def _run_at(where: str, words: str) -> Run:
    """The run in the directory `words`, which the argument `where` named. Raises ConfigError, RunDirError."""
    if not Path(words).is_dir():
        what = f"quality is of the data of a run, and {words} is no run's directory."
        raise ConfigError(where, what, "Name the directory that `culturepark generate --out` made.")
    return load_run(Path(words))


def _only(run_data: RunData, cultures: Sequence[str]) -> RunData:
    """What is there of the cultures that are named. Raises ConfigError if that is nothing."""
    of = run_data.only(cultures) if cultures else run_data
    if not of.dialogues:
        what = "no dialogue" + (f" of {', '.join(cultures)}" if cultures else "")
        fix = "Cells come into shards when all their dialogues have ended: `culturepark status` tells."
        raise ConfigError(str(run_data.run.root), f"{what} is in its shards.", fix)
    return of


def _left_out(name: str, run_data: RunData) -> list[str]:
    """A note on the dialogues that are not in shards yet, if there are any."""
    if not run_data.owed:
        return []
    planned = run_data.owed + len(run_data.dialogues)
    return [
        f"{name}: {run_data.owed} of {planned} planned dialogues are not in its shards yet, and in no figure."
    ]


def _same_embedder(first: RunData, second: RunData) -> bool:
    return first.run.file.models.get("embedder") == second.run.file.models.get("embedder")


def _differences(name: str, first: RunData, other: str, second: RunData) -> list[str]:
    """What makes two runs differ, whatever they are worth."""
    notes: list[str] = []
    if not _same_embedder(first, second):
        notes.append(f"{name} and {other} have different embedders: no figure of vectors is compared.")
    if {seed.id for seed in first.run.plan.seeds} != {seed.id for seed in second.run.plan.seeds}:
        notes.append(f"{name} and {other} talk about different questions: that alone makes them differ.")
    if set(first.cultures) != set(second.cultures):
        notes.append(f"{name} and {other} are of different cultures: that alone makes them differ.")
    return notes


# --- vectors


async def _statement_vectors(name: str, run_data: RunData, notes: list[str]) -> Vectors | None:
    """Vectors of the statements that the run talks about, by its own embedder; None, and a note why, where
    that one is not at hand."""
    run = run_data.run
    model = run.settings.models.get(run.settings.roles.embedder)
    widths = {len(one.vector) for one in run_data.opinions if one.vector is not None}
    if model is None or not widths:
        return None
    async with local_embedder(run.settings) as embedder:
        if embedder is None:
            notes.append(f"{name}: no diversity_gain, its embedder is not on this machine.")
            return None
        vectors = (await embedder.embed([seed.statement for seed in run.plan.seeds])).vectors
    if run.file.models.get("embedder") != _name_of(model) or widths != {vectors.shape[1]}:
        notes.append(f"{name}: no diversity_gain, its embedder was another version than the one here.")
        return None
    return vectors


def _name_of(model: ModelSettings) -> str:
    return embedded_name(model, embedder=True) if model.engine == "embedded" else model.engine


# --- the baseline


def _budget_figures(
    every: Sequence[RunData], originals: Sequence[Vectors | None], notes: list[str]
) -> tuple[list[Measurement], list[Measurement]]:
    """Figures of the first run and of the baseline, each cut to the same budget of tokens."""
    first, second, budget = quality.shared_budget(every[0], every[-1])
    without = f", without those of the {', '.join(sorted(first.unmetered))}" if first.unmetered else ""
    notes.append(f"Budget figures: the first dialogues of each plan, up to {budget:,} tokens{without}.")
    same = _same_embedder(first, second)
    fewest = min(quality.words_in(run_data.kept) for run_data in (first, second))
    samples = min(len(run_data.kept) for run_data in (first, second))
    both = originals[0] is not None and originals[-1] is not None
    return (
        quality.budget_measurements(first, fewest, samples, originals[0] if both else None, vectors=same),
        quality.budget_measurements(second, fewest, samples, originals[-1] if both else None, vectors=same),
    )


# --- the judge


def _judge_of(run: Run, options: EvaluateOptions) -> Target | None:
    """The model that judges; None if no judge is asked. Raises ConfigError if none could judge."""
    if options.judge == NO_JUDGE:
        return None
    if options.judge is not None:
        return target_of(options.judge, options.judge_model, options.api_key_env)
    if not run.settings.refine.enabled:
        what = "the run refines nothing, so it has no verifier to judge."
        raise ConfigError("--judge", what, f"Name a judge, or count only: `--judge {NO_JUDGE}`.")
    model = run.settings.model_of("verifier")
    if model.engine == "scripted":
        what = "the run's verifier is scripted: it reads nothing, so it cannot judge."
        raise ConfigError("--judge", what, f"Name a judge, or count only: `--judge {NO_JUDGE}`.")
    if model.engine == EMBEDDED:
        require_engine(model, embedder=False)
        return Target(embedded_name(model, False), model, run.settings.limits)
    return Target(model.model, model, run.settings.limits)


async def _judged(
    console: Console, judge: Target, runs: Sequence[RunData], options: EvaluateOptions, notes: list[str]
) -> tuple[list[list[Measurement]], list[Measurement]]:
    """What the judge says of each run, and what it reaches itself."""
    name, rng_seed = f"judge {judge.name}", options.rng_seed
    samples = [
        judged_quality.draw_sample(run_data, options.rows or JUDGED_ROWS, rng_seed) for run_data in runs
    ]
    total = sum(len(of) for of in judge_calibration.cases().values()) + sum(one.questions for one in samples)
    async with target_models([judge]) as [model]:
        with (
            closing(AnswerCache(options.out, name, judge, rng_seed)) as cache,
            progress_bar(console, name, total) as advance,
        ):
            asker = Asker(model, name=name, rng_seed=rng_seed, on_answer=advance, cache=cache)
            itself = await judge_calibration.measurements(asker)
            found = [
                await judged_quality.evaluate(asker, run_data, one)
                for run_data, one in zip(runs, samples, strict=True)
            ]
    notes += judge_calibration.cautions(name, itself)
    own = [run_data for run_data in runs if run_data.run.file.models.get("verifier") == judge.name]
    if own:
        notes.append("The judge is the run's own verifier: verifier_kappa is of a model with itself.")
    return found, itself
