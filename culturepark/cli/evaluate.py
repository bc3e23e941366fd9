"""The command `culturepark evaluate`: its arguments and options. What it does is in `evaluation`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from culturepark.cli.arguments import JUDGED_ROWS, PEOPLE, By, Task


def evaluate(
    target: Annotated[
        str,
        typer.Argument(metavar="DIR|URL|embedded", help="A run's model, an endpoint's, or this machine's."),
    ],
    *,
    model: Annotated[str, typer.Option(metavar="NAME", help="The endpoint's model.")] = "",
    against: Annotated[
        str | None, typer.Option(metavar="DIR|URL|embedded", help="A second model, compared with the first.")
    ] = None,
    against_model: Annotated[str, typer.Option(metavar="NAME", help="The second endpoint's model.")] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An adapter of the run, compared with its base: a culture's, `joint`, or `own`, which asks "
            "each culture of its own; may be repeated.",
        ),
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Only the adapters, without the model that they were tuned on.")
    ] = False,
    api_key_env: Annotated[
        str, typer.Option(metavar="VARIABLE", help="The environment variable with the endpoint's key.")
    ] = "OPENAI_API_KEY",
    task: Annotated[
        list[Task] | None,
        typer.Option(
            help="Only this task; may be repeated. `quality`, and `moderation` without --labelled, are "
            "evaluated only if they are named."
        ),
    ] = None,
    culture: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this culture; may be repeated.")
    ] = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option(metavar="builtin|FILE", help="opinions: where questions come from; may be repeated."),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="opinions: only this one; may be repeated.")
    ] = None,
    tuned_on: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="opinions: a run that an endpoint's model was tuned on, whose questions are left out; "
            "may be repeated.",
        ),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="opinions: times each question is asked.")
    ] = None,
    people: Annotated[
        int | None, typer.Option(help=f"vsm: people of each culture, at least and by default {PEOPLE}.")
    ] = None,
    items_each: Annotated[
        int | None,
        typer.Option(help="vsm: items that each person is asked, 12 for half of them; all unless told."),
    ] = None,
    vsm_items: Annotated[
        Path | None, typer.Option("--vsm-items", metavar="FILE.csv", help="vsm: the official questionnaire.")
    ] = None,
    labelled: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE|TASK.toml",
            help="moderation: a labelled set, by a task that ships and your file, or by a task file of "
            "yours; may be repeated. Else a small set that comes with the project.",
        ),
    ] = None,
    by: Annotated[
        By | None, typer.Option(help="How answers are taken; found out unless it is given.")
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="forgetting: a task of lm-evaluation-harness, which downloads it; may be repeated.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL|embedded|none", help="quality: who judges; the run's verifier unless it is given."
        ),
    ] = None,
    judge_model: Annotated[str, typer.Option(metavar="NAME", help="quality: the judge's model.")] = "",
    rows: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="moderation: at most so many texts of a set, drawn with the seed; quality: opinions "
            f"and turns that a judge is asked about ({JUDGED_ROWS}).",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="quality: a run compared on the same budget of tokens."),
    ] = None,
    rng_seed: Annotated[int, typer.Option("--seed", help="Draws of people and of orders of options.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results are written.")] = Path("evaluation"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite results at --out, and ask anew.")] = False,
) -> None:
    """Measure a model: its opinions and labels beside people's, its values beside Hofstede's, what it has
    forgotten; or, with `--task quality`, a run's data.

    Results go to DIR as Parquet and JSON, and to the terminal as one table. Answers are kept there as they
    come: the same command again goes on where it was stopped.
    """
    given = locals()
    from culturepark.cli.evaluate_options import EvaluateOptions
    from culturepark.cli.evaluation import evaluate_with

    evaluate_with(EvaluateOptions(**given))
