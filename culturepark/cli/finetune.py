"""The command `culturepark finetune`: from a run directory to adapters, or to tuned models of a service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from culturepark.cli.arguments import RunDir
from culturepark.errors import ConfigError, CultureParkError, Interrupted, TrainingError

if TYPE_CHECKING:
    from rich.console import Console

    from culturepark.settings import Settings
    from culturepark.store.rundir import Run
    from culturepark.training.ports import Backend, Job, Outcome
    from culturepark.training.records import Records


class BackendName(StrEnum):
    """What trains (training.backend)."""

    local = "local"
    ray_train = "ray-train"
    openai = "openai"
    command = "command"


def finetune(
    directory: RunDir,
    *,
    culture: Annotated[
        list[str] | None, typer.Option("--culture", metavar="NAME", help="Only this one. May be repeated.")
    ] = None,
    joint: Annotated[bool, typer.Option("--joint", help="One model on all cultures together.")] = False,
    backend: Annotated[
        BackendName | None, typer.Option("--backend", help="Who trains; else training.backend of the run.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, as training.rank=8."),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", metavar="FILE", help="Look for an evaluation set's texts in the training rows, too."
        ),
    ] = None,
    labelled: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE|TASK.toml", help="The same of a labelled set, named as for `evaluate`."
        ),
    ] = None,
    datasets_only: Annotated[
        bool, typer.Option("--datasets-only", help="Seal the datasets and check them; train nothing.")
    ] = False,
    cancel: Annotated[
        bool,
        typer.Option(
            "--cancel", help="Train nothing: stop what was begun and goes on, as jobs at a service do."
        ),
    ] = False,
) -> None:
    """Tune a model for each culture and a joint one, or those named; the same again goes on, repeats nothing.

    Ctrl-C stops a training on this machine, which goes on from its last checkpoint next time; a job at a
    service goes on there, until it is stopped with --cancel.
    """
    from culturepark.cli.views.terminal import stdout_console
    from culturepark.cli.views.training import show_adapters
    from culturepark.settings_load import with_overrides
    from culturepark.store.rundir import load_run
    from culturepark.training.jobs import training_names
    from culturepark.training.records import training_lock

    console = stdout_console()
    run = load_run(directory)
    named = [f'training.backend="{backend.value}"'] if backend else []
    settings = with_overrides(run.settings, [*named, *(sets or ())])
    names = training_names(run, culture, joint)
    if cancel:
        if datasets_only or against or labelled:
            what = "--cancel seals and searches nothing."
            raise ConfigError("--cancel", what, "Leave --datasets-only, --against and --labelled out.")
        _cancel(console, run, settings, names, backend.value if backend else "")
        return
    exams = _exams(against or (), labelled or ())
    with training_lock(run.root):
        datasets, failed = _sealed(console, run, settings, names)
        _check_leakage(console, run, datasets, exams)
        if not datasets_only:
            failed += _trained(console, run, settings, datasets)
    if not datasets_only:
        show_adapters(console, run.root)
    if failed:
        raise typer.Exit(failed[0].exit_code)


def _sealed(
    console: Console, run: Run, settings: Settings, names: Sequence[str]
) -> tuple[dict[str, Path], list[CultureParkError]]:
    """The folders of the datasets, by name, and why some could not be made. Raises if there is none."""
    from culturepark.cli.views.terminal import print_error, safe_line
    from culturepark.training.datasets import seal
    from culturepark.words import count

    datasets: dict[str, Path] = {}
    failed: list[CultureParkError] = []
    for name in names:
        try:
            folder, facts = seal(run, name, settings.training)
        except TrainingError as error:  # the others can be trained all the same
            failed.append(error)
            continue
        datasets[name] = folder
        rows = f"{count(facts.n_train)} training rows, {count(facts.n_held_out)} on held-out questions"
        console.print(safe_line(f"{name}: {rows} -> {folder}"), soft_wrap=True)
    if not datasets:
        raise failed[0]
    for error in failed:
        print_error(error)
    return datasets, failed


def _trained(
    console: Console, run: Run, settings: Settings, datasets: Mapping[str, Path]
) -> list[CultureParkError]:
    """Train on each dataset in turn; returns what went wrong, which is printed as it happens."""
    from culturepark.cli.views.terminal import print_error
    from culturepark.training.backends import open_backend
    from culturepark.training.base import base_of
    from culturepark.training.jobs import create_job
    from culturepark.training.records import Records

    base = base_of(settings)
    through = open_backend(settings)
    records = Records(run.root)
    failed: list[CultureParkError] = []
    for name in datasets:
        job = create_job(run, name, settings, base)
        try:
            outcome = _follow(console, records, through, job, settings.training.poll_s)
        except TrainingError as error:  # about this dataset alone
            failed.append(error)
            print_error(error)
            continue
        if outcome.state != "finished":
            failed.append(outcome.error(job))
            print_error(failed[-1])
    return failed


def _cancel(console: Console, run: Run, settings: Settings, names: Sequence[str], backend: str) -> None:
    """Stop what is on record as begun, and say how each ended."""
    from culturepark.cli.views.terminal import print_error, safe_line
    from culturepark.training.jobs import cancel_all
    from culturepark.training.records import training_lock

    codes: list[int] = []
    with training_lock(run.root):
        for job, ended in cancel_all(run, settings, names, backend):
            if isinstance(ended, CultureParkError):
                print_error(ended)
                codes.append(ended.exit_code)
            else:
                words = "had finished before" if ended.state == "finished" else ended.state
                console.print(safe_line(f"{job.name}: {words} ({job.backend})"))
                codes.append(0)
    if not codes:
        console.print("No training of these is under way.")
    if code := max(codes, default=0):
        raise typer.Exit(code)


def _exams(against: Sequence[Path], labelled: Sequence[str]) -> dict[str, list[str]]:
    """The texts of evaluation sets that the user names, by set. Raises ConfigError."""
    from culturepark.evaluation.exam_texts import labelled_texts
    from culturepark.evaluation.labelled import read_labelled
    from culturepark.evaluation.labelled_tasks import find_labelled
    from culturepark.training.leakage import read_set

    found = [(path.name, read_set(path)) for path in against]
    found += [labelled_texts(read_labelled(*find_labelled(words))) for words in labelled]
    exams: dict[str, list[str]] = {}
    for name, texts in found:
        if name in exams:
            what = f"two sets are called {name}, and what is found is told by name."
            raise ConfigError("--against, --labelled", what, "Rename one, or look for one after the other.")
        exams[name] = texts
    return exams


def _check_leakage(
    console: Console, run: Run, datasets: Mapping[str, Path], exams: dict[str, list[str]]
) -> None:
    """Look for evaluation texts in the training rows of each dataset; keep and show matches."""
    import asyncio

    from culturepark.cli.views.terminal import safe_line
    from culturepark.cli.views.training import show_leakage
    from culturepark.evaluation.exam_texts import exam_texts
    from culturepark.models.errors import ModelError
    from culturepark.models.local.serving import local_embedder
    from culturepark.training.datasets import read_dataset
    from culturepark.training.leakage import CachedEmbedder, check_dataset

    async def look() -> None:
        async with local_embedder(run.settings) as embedder:
            vectors = CachedEmbedder(embedder) if embedder is not None else None
            for name, folder in datasets.items():
                sets = exam_texts(run, read_dataset(folder).held_out) | exams
                try:
                    report = await check_dataset(folder, sets, vectors)
                except ModelError as error:
                    words = f"{name}: looked for by words alone, as the embedder failed: {error.reason}"
                    console.print(safe_line(words, "yellow"), soft_wrap=True)
                    report = await check_dataset(folder, sets, None)
                show_leakage(console, name, report)

    with console.status("looking for evaluation texts in the training rows"):
        asyncio.run(look())


def _follow(console: Console, records: Records, backend: Backend, job: Job, poll_s: float) -> Outcome:
    from culturepark.cli.views.terminal import safe_line
    from culturepark.cli.views.training import outcome_words
    from culturepark.training.jobs import run_training

    with console.status(f"{job.name}: ...") as spinner:

        def say(what: str, job: Job, job_id: str) -> None:
            if what == "running":
                spinner.update(safe_line(f"{job.name}: {_progress_of(job) or 'running'}"))
            elif what in ("finished before", "found", "resumed", "launched"):
                console.print(safe_line(f"{job.name}: {what} ({job.backend}, {job_id})", "dim"))

        try:
            outcome = run_training(records, backend, job, poll_s=poll_s, on_event=say)
        except KeyboardInterrupt:
            what, fix = "it was stopped.", "Run the same command again to go on."
            if job.backend == "openai":
                what = "it goes on at the service."
                fix = "Run the same command again to watch it, or with --cancel to stop it."
            raise Interrupted(f"training of {job.name}", what, fix) from None
    if outcome.state == "finished":
        console.print(safe_line(f"{job.name}: {outcome_words(outcome)}", "green"))
    return outcome


def _progress_of(job: Job) -> str:
    """The last line that a training on this machine wrote about itself."""
    import json

    try:
        last = (Path(job.output) / "progress.jsonl").read_text("ascii").splitlines()[-1]
        return "step {step} of {of}, loss {loss}".format(**json.loads(last))
    except (OSError, ValueError, LookupError):
        return ""
