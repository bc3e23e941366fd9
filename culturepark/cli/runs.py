"""The commands `show`, `status` and `check`: they read a run and change nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from culturepark.cli.arguments import RunDir
from culturepark.errors import ConfigError

EXIT_PROBLEMS = 1
"""The exit code of `check` when it found something wrong."""


def show(
    directory: RunDir,
    dialogue: Annotated[
        str | None,
        typer.Option(
            "--dialogue", metavar="ID", help="Show one dialogue whole; the start of its id will do."
        ),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample", metavar="ID", help="Show one sample, or an opinion not kept, and its provenance."
        ),
    ] = None,
) -> None:
    """Read a run: its summary, one dialogue, or one sample."""
    from culturepark.cli.views.dialogue import show_dialogue, show_opinions, show_sample
    from culturepark.cli.views.run import show_summary
    from culturepark.cli.views.terminal import stdout_console
    from culturepark.store.view import View

    if dialogue is not None and sample is not None:
        raise ConfigError("--sample", "it cannot go with --dialogue.", "Ask for one of them.")
    console, view = stdout_console(), View(directory)
    if sample is not None:
        show_sample(console, view, view.opinion(sample))
    elif dialogue is not None:
        row = view.dialogue(dialogue)
        show_dialogue(console, view, row)
        if view.run.settings.refine.enabled:
            show_opinions(console, view.opinions_of(row))
    else:
        show_summary(console, view)


def status(
    directory: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every 2 s, until the run ends.")] = False,
) -> None:
    """Tell where a run stands, while it goes on or afterwards."""
    import time

    from culturepark.cli.views.status import status_view
    from culturepark.cli.views.terminal import stdout_console
    from culturepark.cli.views.training import show_trainings
    from culturepark.monitor.status import WRITE_EVERY_S, as_json_text, status_report
    from culturepark.store.rundir import load_run

    console = stdout_console()
    refine = load_run(directory).settings.refine.enabled
    while True:
        report = status_report(directory, time.time())
        if as_json:
            typer.echo(as_json_text(report))
        else:
            if watch and console.is_terminal:
                console.clear()
            console.print(status_view(directory, report, refine))
            show_trainings(console, directory)
        if not watch or report.state != "running":
            return
        time.sleep(WRITE_EVERY_S)


def check(directory: RunDir) -> None:
    """Verify a run: every file, every count."""
    from culturepark.cli.views.terminal import key_values, safe_line, safe_text, stdout_console
    from culturepark.store.audit import check_run
    from culturepark.store.lock import being_written
    from culturepark.words import plural

    console = stdout_console()
    if being_written(directory):
        console.print(
            "A run is going on here: what is written at this moment may look unfinished.", style="yellow"
        )
    report = check_run(directory)
    if report.checked:
        console.print(key_values(report.checked))
        console.print()
    if report.problems:
        console.print(f"{plural(len(report.problems), 'problem')}:", style="bold red")
        for problem in report.problems:
            console.print(safe_line(f"- {problem}"), soft_wrap=True)
        raise typer.Exit(EXIT_PROBLEMS)
    state = "complete" if report.complete else "not complete yet"
    console.print(safe_text(f"All is as it should be. The run is {state}.", "bold green"))
