"""Arguments and options that several commands share. Nothing heavy is imported: `--help` loads this."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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

JUDGED_ROWS = 200
"""How many opinions and turns a judge is asked about if --rows is left out."""
PEOPLE = 50
"""How many people of each culture answer the values survey if --people is left out."""


class Task(StrEnum):
    """What can be evaluated."""

    opinions = "opinions"
    vsm = "vsm"
    moderation = "moderation"
    forgetting = "forgetting"
    quality = "quality"


class By(StrEnum):
    """How an answer is read: from the probabilities of its options, or from replies drawn by sampling."""

    logprobs = "logprobs"
    sampling = "sampling"
