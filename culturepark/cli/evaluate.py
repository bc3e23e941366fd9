"""`culturepark evaluate`: a model's figures, beside those of models that know nothing."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from culturepark.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from culturepark.cultures import Culture
    from culturepark.evaluation.labelled import LabelledSet
    from culturepark.evaluation.measure import Measurement
    from culturepark.evaluation.opinions import Asked
    from culturepark.evaluation.report import Measured
    from culturepark.evaluation.suite import Suite
    from culturepark.evaluation.targets import Target


class Task(StrEnum):
    """What can be evaluated."""

    opinions = "opinions"
    vsm = "vsm"
    moderation = "moderation"
    forgetting = "forgetting"
    quality = "quality"


OF_MODELS = frozenset(Task) - {Task.quality}
"""Tasks that ask a model; quality is of a run's data."""

_NEEDS: dict[str, frozenset[Task]] = {
    "--adapter": OF_MODELS,
    "--baseline": frozenset({Task.quality}),
    "--by": OF_MODELS,
    "--draws": frozenset({Task.opinions}),
    "--harness": frozenset({Task.forgetting}),
    "--items-each": frozenset({Task.vsm}),
    "--judge": frozenset({Task.quality}),
    "--judge-model": frozenset({Task.quality}),
    "--labelled": frozenset({Task.moderation}),
    "--no-base": OF_MODELS,
    "--people": frozenset({Task.vsm}),
    "--question": frozenset({Task.opinions}),
    "--rows": frozenset({Task.moderation, Task.quality}),
    "--seeds": frozenset({Task.opinions}),
    "--tuned-on": frozenset({Task.opinions}),
    "--vsm-items": frozenset({Task.vsm}),
}
"""Options that do something for these tasks alone."""
_JUDGED_ROWS = 200
_PEOPLE = 50


class By(StrEnum):
    """How answers are taken."""

    logprobs = "logprobs"
    sampling = "sampling"


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
        int | None, typer.Option(help=f"vsm: people of each culture, at least and by default {_PEOPLE}.")
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
            f"and turns that a judge is asked about ({_JUDGED_ROWS}).",
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
    import asyncio

    from culturepark.cli.quality import NONE, Ask, measure_data
    from culturepark.cli.views.evaluation import show_report
    from culturepark.cli.views.terminal import line_of
    from culturepark.cli.views.terminal import out as console_for
    from culturepark.cultures import load_cultures
    from culturepark.evaluation import forgetting, vsm
    from culturepark.evaluation.answer_cache import forget
    from culturepark.evaluation.harness import require_harness, require_plain
    from culturepark.evaluation.measure import against_first, compare_pairs
    from culturepark.evaluation.report import Measured, check_free, report_of, write_report
    from culturepark.evaluation.suite import Suite
    from culturepark.evaluation.targets import adapter_target, target_of, trained_on
    from culturepark.store.rundir import load_run

    tasks = set(task or OF_MODELS - (set[Task]() if labelled else {Task.moderation}))
    given = {
        "--adapter": adapter,
        "--baseline": baseline,
        "--by": by,
        "--draws": draws,
        "--harness": harness,
        "--items-each": items_each,
        "--judge": judge,
        "--judge-model": judge_model,
        "--labelled": labelled,
        "--no-base": no_base or None,
        "--people": people,
        "--question": question,
        "--rows": rows,
        "--seeds": seeds,
        "--tuned-on": tuned_on,
        "--vsm-items": vsm_items,
    }
    _refuse_idle([name for name, value in given.items() if value not in (None, "")], tasks)
    if against_model and (against is None or not tasks & OF_MODELS):
        what = "there is no second endpoint whose model this could be."
        raise ConfigError("--against-model", what, "Add `--against URL`, or leave --against-model out.")
    if judge == NONE and rows and Task.moderation not in tasks:
        what = "it is for the judge of the data, and none is asked."
        raise ConfigError("--rows", what, f"Leave `--judge {NONE}` out, or --rows.")
    check_free(out, force)
    of_models = tasks & OF_MODELS
    targets = [target_of(target, model, api_key_env)] if of_models else []
    if of_models and against is not None:
        targets.append(target_of(against, against_model, api_key_env))
    if adapter and not Path(target).is_dir():
        what = f"{target} is no run, so it has no adapters."
        raise ConfigError("--adapter", what, "Name a run's directory.")
    if no_base:
        if not adapter:
            what = "without an adapter there would be no model left."
            raise ConfigError("--no-base", what, "Name one with --adapter, or leave --no-base out.")
        targets.pop(0)
    targets += [adapter_target(Path(target), name) for name in adapter or ()]
    if harness:
        require_harness()
        for one in targets:
            require_plain(one.adapters)
    registry = load_cultures()
    chosen = _cultures(culture, registry, targets)
    seen = frozenset[str]().union(
        *(one.trained_on for one in targets), *(trained_on(load_run(one)) for one in tuned_on or ())
    )
    suite = Suite(
        cultures=registry,
        asked=tuple(_asked(seeds or ["builtin"], question, seen, chosen)) if Task.opinions in tasks else (),
        groups=tuple(
            vsm.groups_of(
                chosen,
                _PEOPLE if people is None else people,
                rng_seed,
                vsm.N_ITEMS if items_each is None else items_each,
            )
        )
        if Task.vsm in tasks
        else (),
        items=vsm.read_items(vsm_items),
        labelled=tuple(_labelled(labelled, chosen, rows, rng_seed)) if Task.moderation in tasks else (),
        abilities=forgetting.read_items() if Task.forgetting in tasks else (),
        apart=tuple(one.id for one in chosen) if any(one.cultures for one in targets) else (),
        draws=draws,
        method=by.value if by is not None else None,
        rng_seed=rng_seed,
    )
    if force:
        forget(out)
    console = console_for()
    _tell_of(console, suite.labelled)
    of_data, of_judge, notes = Measured(), Measured(), list[str]()
    if Task.quality in tasks:
        ask = Ask(
            run=target,
            out=out,
            against=against,
            baseline=baseline,
            cultures=tuple(one.id for one in chosen) if culture else (),
            judge=judge,
            judge_model=judge_model,
            api_key_env=api_key_env,
            rows=rows or _JUDGED_ROWS,
            rng_seed=rng_seed,
        )
        of_data, of_judge, notes = asyncio.run(measure_data(console, ask))
    measured = Measured()
    if targets:
        measured = asyncio.run(_measured(console, suite, targets, harness or (), out))
    comparisons = compare_pairs([*against_first(measured), *against_first(of_data)])
    measured |= of_data | of_judge
    report = report_of(measured, comparisons, notes)
    write_report(out, report, measured)
    show_report(console, report)
    console.print(line_of(f"Written to {out}", "dim"), soft_wrap=True)


def _refuse_idle(given: Sequence[str], tasks: AbstractSet[Task]) -> None:
    """Refuse an option that would do nothing. Raises ConfigError."""
    for name in given:
        if not (needs := _NEEDS[name]) & tasks:
            *others, last = sorted(needs)
            what = f"{', '.join(others)} or {last}" if others else last
            fix = f"Add `--task {last}`, or leave {name} out."
            raise ConfigError(name, f"it is for {what}, which is not evaluated.", fix)


def _cultures(
    wanted: Sequence[str] | None, registry: dict[str, Culture], targets: Sequence[Target]
) -> list[Culture]:
    """Those that are named; else all that every target can be asked about and whose people were asked
    anything, but for the main contact's. Raises ConfigError."""
    from culturepark.cultures import culture_named
    from culturepark.settings import PlanSettings

    limits = [target.cultures for target in targets if target.cultures is not None]
    able = frozenset(registry).intersection(*limits)
    if not wanted:
        known = [one for one in registry.values() if one.survey_keys and one.id != PlanSettings().contact]
        return [one for one in known if one.id in able]
    named = [culture_named(registry, name, "--culture") for name in dict.fromkeys(wanted)]
    for one in named:
        if one.id not in able:
            fix = f"There are adapters of {', '.join(sorted(able)) or 'none'}: see `culturepark finetune`."
            raise ConfigError("--culture", f"the run has no adapter for {one.id}.", fix)
    return named


def _asked(
    sources: Sequence[str], wanted: Sequence[str] | None, seen: frozenset[str], cultures: Sequence[Culture]
) -> list[Asked]:
    from culturepark.evaluation.opinions import asked_of
    from culturepark.seeds import load_seeds

    known = {seed.id: seed for seed in load_seeds(sources)}
    for name in wanted or ():
        if name not in known:
            fix = "`culturepark seeds list` shows the built-in ones."
            raise ConfigError("--question", f"there is no question {name!r}.", fix)
        if name in seen:
            what = f"{name} is among the questions of the run, so it is not held out."
            raise ConfigError("--question", what, "Take one that the run did not talk about.")
    held_out = [seed for seed in known.values() if seed.id not in seen and (not wanted or seed.id in wanted)]
    asked = asked_of(held_out, cultures)
    if not asked:
        what = "no question is left that is held out and was asked in these cultures."
        fix = "Name other questions with --seeds, or leave opinions out with --task."
        raise ConfigError("opinions", what, fix)
    return asked


def _labelled(
    wanted: Sequence[str] | None, cultures: Sequence[Culture], rows: int | None, rng_seed: int
) -> list[LabelledSet]:
    """The sets that are named, else the one of our own, each at most so many texts. Raises ConfigError."""
    from culturepark.evaluation.labelled import (
        SYNTHETIC,
        drawn_from,
        find_labelled,
        of_cultures,
        read_labelled,
    )

    ids = [one.id for one in cultures]
    found: list[LabelledSet] = []
    for words in wanted or [SYNTHETIC]:
        one = of_cultures(read_labelled(*find_labelled(words)), ids)
        if one.task.name in (other.task.name for other in found):
            fix = "Give one of them a task file of its own, with another name."
            raise ConfigError("--labelled", f"{one.task.name} is named twice.", fix)
        found.append(drawn_from(one, rows, rng_seed))
    return found


def _tell_of(console: Console, sets: Sequence[LabelledSet]) -> None:
    """What is to be known of labelled sets, before their texts cost anything."""
    from culturepark.cli.views.terminal import line_of
    from culturepark.words import plural

    for one in sets:
        texts = f"{plural(len(one.rows), 'text')} in {one.task.language}"
        words = f"{one.task.name}: {texts}. {one.task.licence}"
        console.print(line_of(words, "dim"))
        for note in one.notes:
            console.print(line_of(f"  {note}", "yellow"))


async def _measured(
    console: Console, suite: Suite, targets: Sequence[Target], benchmarks: Sequence[str], out: Path
) -> Measured:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from culturepark.cli.views.terminal import line_of
    from culturepark.evaluation.answer_cache import AnswerCache
    from culturepark.evaluation.suite import names_apart, put_to
    from culturepark.evaluation.targets import target_models
    from culturepark.words import plural

    names = names_apart([target.name for target in targets])
    measured: Measured = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for number, (name, target) in enumerate(zip(names, targets, strict=True), 1):
        apart = target.cultures is not None
        total = suite.questions + (len(suite.apart) - 1) * len(suite.abilities) * apart
        # First: what the harness does not know or cannot download shows before anything else was asked.
        ran = await _benchmarked(console, name, target, benchmarks, out / f"harness-{number}")
        async with target_models([target]) as [model]:
            with (
                closing(AnswerCache(out, name, target, suite.rng_seed)) as kept,
                Progress(*columns, console=console, transient=True) as progress,
            ):
                if kept:
                    words = f"{name}: {plural(len(kept), 'answer')} of an earlier evaluation that was stopped"
                    progress.console.print(line_of(words, "dim"))
                bar = progress.add_task(line_of(name).plain, total=total)
                measured[name] = await put_to(
                    suite, model, name, lambda bar=bar: progress.advance(bar), apart=apart, kept=kept
                )
        measured[name] += ran
    return measured


async def _benchmarked(
    console: Console, name: str, target: Target, benchmarks: Sequence[str], folder: Path
) -> list[Measurement]:
    from msgspec.structs import replace

    from culturepark.cli.views.terminal import line_of
    from culturepark.evaluation.harness import LOG, evaluate
    from culturepark.models.local.engine import own_cpus
    from culturepark.models.local.serving import served

    if not benchmarks:
        return []
    # The harness knows one address only: one server, with all CPUs.
    whole = replace(target.model, threads=target.model.threads or own_cpus())
    async with served(whole) as ready:
        words = f"{name}: lm-evaluation-harness on {', '.join(benchmarks)}; its output is in {folder / LOG}"
        with console.status(line_of(words)):
            return await evaluate(ready, benchmarks, folder)
