"""Where the configuration that ships with the project lies."""

from __future__ import annotations

from pathlib import Path

from culturepark.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def config_dir() -> Path:
    """The folder of shipped configuration files.

    A wheel carries it inside the package, a checkout at its top level. Raises ConfigError when
    neither is there.
    """
    for folder in (_PACKAGE / "config", _PACKAGE.parent / "config"):
        if folder.is_dir():
            return folder
    raise ConfigError(
        str(_PACKAGE / "config"),
        "the configuration that ships with culturepark is missing.",
        "Install culturepark again, or run it from a complete checkout.",
    )
