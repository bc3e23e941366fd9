"""The entry point of the command line: errors, exit codes, and the commands there are.

What a command does lies in a module of its own, and what that needs is imported when the command runs, so
that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from culturepark import __version__
from culturepark.cli.embedded import embedded_app
from culturepark.cli.evaluate import evaluate
from culturepark.cli.finetune import finetune
from culturepark.cli.generate import doctor, generate, plan_command
from culturepark.cli.runs import check, show, status
from culturepark.cli.seeds import seeds_app
from culturepark.errors import CultureParkError

EXIT_INTERNAL = 70
"""The exit code of a fault of our own."""
EXIT_KILLED = 130
"""The exit code after Ctrl-C outside a run, or a second one in it."""

_EPILOG = """\b
Exit codes:
  0    done; a run with failed dialogues too, and it says so
  1    `check` found something wrong
  2    usage, configuration or seeds
  3    a model endpoint
  4    the run directory
  5    stopped on request; run again to go on
  6    a training that failed
  70   a fault of our own
  130  stopped at once
"""

app = typer.Typer(
    name="culturepark",
    help="Culturally diverse fine-tuning data from dialogues between agents of different cultures.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(generate)
app.command("plan")(plan_command)
app.command()(doctor)
app.command()(show)
app.command()(status)
app.command()(check)
app.command()(finetune)
app.command()(evaluate)
app.add_typer(seeds_app, name="seeds")
app.add_typer(embedded_app, name="embedded")


def main() -> None:
    """The entry point of the command `culturepark`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code. Errors are printed, with a traceback only with --debug."""
    debug = "--debug" in arguments
    # Accepted anywhere, since it is added when a command has just failed.
    rest = [one for one in arguments if one != "--debug"]
    try:
        app(args=["--debug", *rest] if debug and rest else rest, prog_name="culturepark")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except KeyboardInterrupt:
        return EXIT_KILLED
    except CultureParkError as error:
        if debug:
            _print_traceback()
        from culturepark.cli.views.terminal import print_error

        print_error(error)
        return error.exit_code
    except Exception as error:
        if debug:
            _print_traceback()
        from culturepark.cli.views.terminal import print_internal

        print_internal(error)
        return EXIT_INTERNAL
    return 0


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"culturepark {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors; also accepted after the command.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command; `run` has read --debug already."""
