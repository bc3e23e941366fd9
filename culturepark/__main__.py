"""`python -m culturepark` is `culturepark`."""

from __future__ import annotations

from culturepark.cli.main import main

main()
