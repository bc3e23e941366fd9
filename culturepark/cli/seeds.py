"""The commands `seeds import` and `seeds list`: survey questions with people's answers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from culturepark.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from culturepark.seeds import Seed

seeds_app = typer.Typer(
    help="Survey questions with people's answers.", no_args_is_help=True, rich_markup_mode=None
)


class SurveyFormat(StrEnum):
    """Files that questions can be read from."""

    wvs = "wvs"
    globalopinionqa = "globalopinionqa"
    jsonl = "jsonl"


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
    from culturepark.cli.views.terminal import stdout_console
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
    console = stdout_console()
    show_import(console, result, str(out))
    _print_use(console, out, result.seeds)


def _print_use(console: Console, file: Path, seeds: Sequence[Seed]) -> None:
    """A command that works as it is pasted, wherever that is, or why there can be none."""
    import json

    from culturepark.cultures import load_cultures
    from culturepark.settings_load import load_settings

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
    from culturepark.cli.views.terminal import stdout_console
    from culturepark.seeds import builtin_seeds, load_seeds, read_seeds
    from culturepark.settings_load import load_settings

    if source is None:
        show_seeds(stdout_console(), builtin_seeds(), "the built-in seeds")
    elif source.suffix == ".toml":
        show_seeds(stdout_console(), load_seeds(load_settings(source).plan.seeds), str(source))
    else:
        show_seeds(stdout_console(), read_seeds(source), str(source))
