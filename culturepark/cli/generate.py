"""The commands `generate`, `plan` and `doctor`: before a run, and the run itself."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from culturepark.cli.arguments import Config, Sets, Shard
from culturepark.errors import EndpointError

if TYPE_CHECKING:
    from rich.console import Console

    from culturepark.plan import Plan
    from culturepark.settings import Settings
    from culturepark.store.view import View


def generate(
    config: Config = None,
    *,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where the run is kept. The same DIR again resumes it."),
    ],
    sets: Sets = None,
    shard: Shard = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "--no-show", help="Leave out the dialogue and samples shown at the end."),
    ] = False,
) -> None:
    """Hold the dialogues and make samples of them; the same DIR again resumes.

    Ctrl-C once lets dialogues in flight end and seals what is done; twice stops at once.
    """
    from culturepark import launch
    from culturepark.cli.views.live import Display
    from culturepark.cli.views.run import show_closing, show_complete, show_failures, show_start
    from culturepark.cli.views.terminal import stdout_console
    from culturepark.preflight.checks import check_all
    from culturepark.store.rundir import open_run
    from culturepark.store.view import View
    from culturepark.words import clock, count, plural

    console = stdout_console()
    settings, plan = _load_plan(config, sets, shard)
    _print_hints(console, config, settings)
    if (out / "run.json").exists():
        run = open_run(out, settings, plan)
        before = View(out)
        if before.complete and not _trainings_due(settings, before):
            show_complete(console, before)
            if quiet:
                console.print(f"See: culturepark show {shlex.quote(str(out))}", markup=False)
            else:
                show_closing(console, before)
            return
        done, turns_before = before.ended, before.total["turns"]
        check_all(settings, out)
    else:
        check_all(settings, out)
        run = open_run(out, settings, plan)
        done = turns_before = 0
    show_start(console, run, done)

    with Display(console, run, turns_before) as display:
        last = launch.generate(run, display.show)

    view = View(out)
    words = f"{plural(view.ended - done, 'dialogue')} in {clock(last.elapsed_s)}"
    console.print(f"\nDone: {words}; {count(view.total['kept'])} samples kept.", style="bold green")
    if quiet:
        show_failures(console, view)
        console.print(f"See: culturepark show {shlex.quote(str(out))}", markup=False)
    else:
        show_closing(console, view)


def _trainings_due(settings: Settings, view: View) -> list[str]:
    """Names of the trainings that a run launches by itself and that have not ended."""
    from culturepark.training.jobs import pending_trainings, trainable_names

    if not settings.training.launch:
        return []
    return pending_trainings(view.root, trainable_names(view.funnels, view.plan.planned()))


def _load_plan(config: Path | None, sets: list[str] | None, shard: str | None) -> tuple[Settings, Plan]:
    """Settings and plan as the command line has them. Raises ConfigError, SeedError."""
    from culturepark.cultures import load_cultures
    from culturepark.plan import Plan
    from culturepark.seeds import load_seeds
    from culturepark.settings_load import load_settings

    overrides = [*(sets or ()), *([f'plan.shard="{shard}"'] if shard is not None else [])]
    settings = load_settings(config, overrides)
    cultures = load_cultures(extra=[Path(folder) for folder in settings.plan.culture_files])
    return settings, Plan(settings, load_seeds(settings.plan.seeds), cultures)


def _print_hints(console: Console, config: Path | None, settings: Settings) -> None:
    """Say what a newcomer might expect otherwise: that a key is set and not used, that a model's name is no
    more than a label."""
    from culturepark.cli.views.terminal import safe_line
    from culturepark.models.local.catalog import misspelt

    for name, model in settings.models.items():
        if question := misspelt(model):
            words = f"models.{name}.model is only a label here, and the packaged model is served. {question}"
            console.print(safe_line(words, "yellow"), soft_wrap=True)
    if config is None and os.environ.get("OPENAI_API_KEY"):
        console.print(
            "OPENAI_API_KEY is set and not used by the quickstart: "
            "`config/remote.toml --set models.chat.model=NAME` uses it.",
            style="dim",
            markup=False,
        )


# --- before a run


def plan_command(config: Config = None, sets: Sets = None, shard: Shard = None) -> None:
    """Show what would run and what it would cost; calls nothing."""
    from culturepark.cli.views.plan import show_plan
    from culturepark.cli.views.terminal import stdout_console
    from culturepark.preflight.estimate import estimate

    console = stdout_console()
    settings, plan = _load_plan(config, sets, shard)
    _print_hints(console, config, settings)
    show_plan(console, settings, plan, estimate(settings, plan))


def doctor(config: Config = None, sets: Sets = None) -> None:
    """Try each model role with one small real call."""
    import asyncio

    from culturepark.cli.views.terminal import print_verdict, stdout_console
    from culturepark.preflight.doctor import examine_machine, examine_models
    from culturepark.settings_load import load_settings

    settings = load_settings(config, sets or ())
    console = stdout_console()
    verdicts = examine_machine(Path.cwd())
    for verdict in verdicts:
        print_verdict(console, verdict.subject, verdict.ok, verdict.words, verdict.fix)
    models = asyncio.run(examine_models(settings))
    for verdict in models:
        print_verdict(console, verdict.subject, verdict.ok, verdict.words, verdict.fix)
    if not all(verdict.ok for verdict in (*verdicts, *models)):
        raise typer.Exit(EndpointError.exit_code)
