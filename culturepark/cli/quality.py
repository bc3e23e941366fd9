"""`culturepark evaluate RUN --task quality`: the run's data, its judge, and a baseline on the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from culturepark.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from culturepark.evaluation.measure import Measurement
    from culturepark.evaluation.report import Measured
    from culturepark.evaluation.run_data import RunData
    from culturepark.evaluation.targets import Target
    from culturepark.ports import Vectors
    from culturepark.settings import ModelSettings
    from culturepark.store.rundir import Run

NONE = "none"
"""The judge that is not asked."""


class Ask(Struct, frozen=True, kw_only=True):
    """What is wanted, of all cultures if none is named. `judge` is None for the run's own verifier model;
    `rows` are asked about at most; what it answers is kept in `out`."""

    run: str
    out: Path
    against: str | None = None
    baseline: Path | None = None
    cultures: tuple[str, ...] = ()
    judge: str | None = None
    judge_model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    rows: int = 200
    rng_seed: int = 0


async def measure_data(console: Console, ask: Ask) -> tuple[Measured, Measured, list[str]]:
    """Figures by run, those of the judge, and cautions.

    Raises ConfigError, RunDirError, EndpointError.
    """
    from culturepark.evaluation import quality
    from culturepark.evaluation.run_data import read
    from culturepark.evaluation.suite import names_apart

    roots = [_run_at("TARGET", ask.run)]
    roots += [_run_at("--against", ask.against)] if ask.against is not None else []
    beside = _run_at("--baseline", str(ask.baseline)) if ask.baseline is not None else None
    judge = _judge_of(roots[0], ask)
    runs = [_wanted(read(run), ask) for run in roots]
    baseline = _wanted(read(beside), ask) if beside is not None else None
    every = [*runs, *([baseline] if baseline else [])]
    names = [f"data of {name}" for name in names_apart([one.run.root.resolve().name for one in every])]
    notes = [note for name, one in zip(names, every, strict=True) for note in _left_out(name, one)]
    same = _same_embedder(runs[0], runs[-1])
    if len(runs) > 1:
        notes += _differences(names[0], runs[0], names[1], runs[1])
    originals = [await _originals(name, one, notes) for name, one in zip(names, every, strict=True)]
    measured: Measured = {
        name: quality.measurements(one, vectors, same_embedder=same)
        for name, one, vectors in zip(names, runs, originals, strict=False)
    }
    if baseline:
        notes += _differences(names[0], every[0], names[-1], baseline)
        first, second = _on_one_budget(every, originals, notes)
        measured[names[0]] = [*measured[names[0]], *first]
        measured[names[-1]] = second
    if judge is not None:
        found, of_judge = await _judged(console, judge, runs, ask, notes)
        for name, more in zip(names, found, strict=False):
            measured[name] = [*measured[name], *more]
        return measured, {f"judge {judge.name}": of_judge}, notes
    return measured, {}, notes


def _run_at(where: str, words: str) -> Run:
    from culturepark.store.rundir import load_run

    if not Path(words).is_dir():
        what = f"quality is of the data of a run, and {words} is no run's directory."
        raise ConfigError(where, what, "Name the directory that `culturepark generate --out` made.")
    return load_run(Path(words))


def _wanted(made: RunData, ask: Ask) -> RunData:
    """What is there of the cultures that are named. Raises ConfigError if that is nothing."""
    of = made.only(ask.cultures) if ask.cultures else made
    if not of.talks:
        what = "no dialogue" + (f" of {', '.join(ask.cultures)}" if ask.cultures else "")
        fix = "Cells come into shards when all their dialogues have ended: `culturepark status` tells."
        raise ConfigError(str(made.run.root), f"{what} is in its shards.", fix)
    return of


def _left_out(name: str, made: RunData) -> list[str]:
    if not made.owed:
        return []
    planned = made.owed + len(made.talks)
    return [
        f"{name}: {made.owed} of {planned} planned dialogues are not in its shards yet, and in no figure."
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


async def _originals(name: str, made: RunData, notes: list[str]) -> Vectors | None:
    """Vectors of the statements that the run talks about, by its own embedder; None, and a note why, where
    that one is not at hand."""
    from culturepark.models.local.serving import local_embedder

    run = made.run
    model = run.settings.models.get(run.settings.roles.embedder)
    widths = {len(one.vector) for one in made.opinions if one.vector is not None}
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
    from culturepark.models.local.engine import embedded_name

    return embedded_name(model, embedder=True) if model.engine == "embedded" else model.engine


# --- the baseline


def _on_one_budget(
    every: Sequence[RunData], originals: Sequence[Vectors | None], notes: list[str]
) -> tuple[list[Measurement], list[Measurement]]:
    from culturepark.evaluation.quality import budget_measurements, shared_budget, words_in

    first, second, budget = shared_budget(every[0], every[-1])
    without = f", without those of the {', '.join(sorted(first.silent))}" if first.silent else ""
    notes.append(f"Budget figures: the first dialogues of each plan, up to {budget:,} tokens{without}.")
    same = _same_embedder(first, second)
    fewest = min(words_in(made.kept) for made in (first, second))
    samples = min(len(made.kept) for made in (first, second))
    both = originals[0] is not None and originals[-1] is not None
    return (
        budget_measurements(first, fewest, samples, originals[0] if both else None, vectors=same),
        budget_measurements(second, fewest, samples, originals[-1] if both else None, vectors=same),
    )


# --- the judge


def _judge_of(run: Run, ask: Ask) -> Target | None:
    """Who is asked; None for nobody. Raises ConfigError if there is none that could judge."""
    from culturepark.evaluation.targets import EMBEDDED, Target, target_of
    from culturepark.models.local.engine import embedded_name, require_engine

    if ask.judge_model and ask.judge in (None, NONE):
        what = "it is the model of a judge, and --judge names none."
        raise ConfigError("--judge-model", what, "Add `--judge URL`, or leave it out.")
    if ask.judge == NONE:
        return None
    if ask.judge is not None:
        if ask.judge != EMBEDDED and "://" not in ask.judge:
            what = f"{ask.judge!r} is no address, not `{EMBEDDED}` and not `{NONE}`."
            raise ConfigError("--judge", what, "Name an endpoint such as http://host:8000/v1.")
        return target_of(ask.judge, ask.judge_model, ask.api_key_env)
    if not run.settings.refine.enabled:
        what = "the run refines nothing, so it has no verifier to judge."
        raise ConfigError("--judge", what, f"Name a judge, or count only: `--judge {NONE}`.")
    model = run.settings.model_of("verifier")
    if model.engine == "scripted":
        what = "the run's verifier is scripted: it reads nothing, so it cannot judge."
        raise ConfigError("--judge", what, f"Name a judge, or count only: `--judge {NONE}`.")
    if model.engine == EMBEDDED:
        require_engine(model, embedder=False)
        return Target(embedded_name(model, False), model, run.settings.limits)
    return Target(model.model, model, run.settings.limits)


async def _judged(
    console: Console, judge: Target, runs: Sequence[RunData], ask: Ask, notes: list[str]
) -> tuple[list[list[Measurement]], list[Measurement]]:
    """What the judge says of each run, and what it reaches itself."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from culturepark.cli.views.terminal import line_of
    from culturepark.evaluation import judge_calibration as judges
    from culturepark.evaluation import judged_quality as judging
    from culturepark.evaluation.answer_cache import AnswerCache
    from culturepark.evaluation.asking import Asker
    from culturepark.evaluation.targets import target_models

    name = f"judge {judge.name}"
    samples = [judging.sample_of(made, ask.rows, ask.rng_seed) for made in runs]
    total = sum(len(of) for of in judges.cases().values()) + sum(one.questions for one in samples)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with target_models([judge]) as [model]:
        with (
            closing(AnswerCache(ask.out, name, judge, ask.rng_seed)) as kept,
            Progress(*columns, console=console, transient=True) as progress,
        ):
            bar = progress.add_task(line_of(name).plain, total=total)
            asker = Asker(
                model, name=name, rng_seed=ask.rng_seed, told=lambda: progress.advance(bar), kept=kept
            )
            itself = await judges.measurements(asker)
            found = [
                await judging.evaluate(asker, made, one) for made, one in zip(runs, samples, strict=True)
            ]
    notes += judges.cautions(name, itself)
    own = [made for made in runs if made.run.file.models.get("verifier") == judge.name]
    if own:
        notes.append("The judge is the run's own verifier: verifier_kappa is of a model with itself.")
    return found, itself
