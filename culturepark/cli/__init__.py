"""The command line; `culturepark.cli.main` is its entry point.

This package imports nothing when it is imported, so that `--help` answers at once.
"""

from __future__ import annotations


def main() -> None:
    """Run `culturepark.cli.main.main`.

    The console script of an environment installed before `cli` was a package imports this name.
    """
    from culturepark.cli.main import main

    main()
