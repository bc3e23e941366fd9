"""What `culturepark evaluate` does: which models it asks, what it asks them, and where the results go."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from msgspec.structs import replace
from rich.console import Console

from culturepark.cli.arguments import PEOPLE, Task
from culturepark.cli.evaluate_options import OF_MODELS, EvaluateOptions, check_options
from culturepark.cli.quality import measure_data
from culturepark.cli.views.evaluation import progress_bar, show_labelled, show_report
from culturepark.cli.views.terminal import safe_line, stdout_console
from culturepark.cultures import Culture, culture_named, load_cultures
from culturepark.errors import ConfigError
from culturepark.evaluation import forgetting, harness, vsm
from culturepark.evaluation.answer_cache import AnswerCache, delete_results
from culturepark.evaluation.labelled import (
    LabelledSet,
    only_cultures,
    read_labelled,
    stratified_sample,
)
from culturepark.evaluation.labelled_tasks import SYNTHETIC, find_labelled
from culturepark.evaluation.measure import Measurement, compare_pairs, pairs_with_first
from culturepark.evaluation.opinions import SurveyQuestion, survey_questions
from culturepark.evaluation.report import Measured, check_free, report_of, write_report
from culturepark.evaluation.suite import Suite, evaluate_model, unique_names
from culturepark.evaluation.targets import Target, adapter_target, target_models, target_of, trained_on
from culturepark.models.local.engine import own_cpus
from culturepark.models.local.serving import served
from culturepark.seeds import load_seeds
from culturepark.settings import PlanSettings
from culturepark.store.rundir import load_run
from culturepark.words import plural


def evaluate_with(options: EvaluateOptions) -> None:
    """Ask, write what was found to `options.out`, and show it.

    Raises ConfigError, RunDirError, EndpointError.
    """
    check_options(options)
    check_free(options.out, options.force)
    targets = _targets(options)
    registry = load_cultures()
    cultures = _cultures(options.culture, registry, targets)
    suite = _suite(options, registry, cultures, targets)
    if options.force:
        delete_results(options.out)
    console = stdout_console()
    show_labelled(console, suite.labelled)
    of_data, of_judge, notes = Measured(), Measured(), list[str]()
    if Task.quality in options.tasks:
        named = tuple(one.id for one in cultures) if options.culture else ()
        of_data, of_judge, notes = asyncio.run(measure_data(console, options, named))
    measured = Measured()
    if targets:
        measured = asyncio.run(_measured(console, suite, targets, options.harness or (), options.out))
    comparisons = compare_pairs([*pairs_with_first(measured), *pairs_with_first(of_data)])
    measured |= of_data | of_judge
    report = report_of(measured, comparisons, notes)
    write_report(options.out, report, measured)
    show_report(console, report)
    console.print(safe_line(f"Written to {options.out}", "dim"), soft_wrap=True)


def _targets(options: EvaluateOptions) -> list[Target]:
    """The models that are asked; none where only a run's data is measured."""
    targets: list[Target] = []
    if options.tasks & OF_MODELS:
        targets.append(target_of(options.target, options.model, options.api_key_env))
        if options.against is not None:
            targets.append(target_of(options.against, options.against_model, options.api_key_env))
    if options.adapter and not Path(options.target).is_dir():
        what = f"{options.target} is no run, so it has no adapters."
        raise ConfigError("--adapter", what, "Name a run's directory.")
    if options.no_base:
        targets.pop(0)
    targets += [adapter_target(Path(options.target), name) for name in options.adapter or ()]
    if options.harness:
        harness.require_harness()
        for one in targets:
            harness.refuse_adapters(one.adapters)
    return targets


def _cultures(
    wanted: Sequence[str] | None, registry: dict[str, Culture], targets: Sequence[Target]
) -> list[Culture]:
    """Those that are named; else all that every target can be asked about and whose people were asked
    anything, but for the main contact's. Raises ConfigError."""
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


def _suite(
    options: EvaluateOptions,
    registry: Mapping[str, Culture],
    cultures: Sequence[Culture],
    targets: Sequence[Target],
) -> Suite:
    """What each model is asked; tasks that are not evaluated stay empty."""
    tasks = options.tasks
    seen = frozenset[str]().union(
        *(one.trained_on for one in targets), *(trained_on(load_run(one)) for one in options.tuned_on or ())
    )
    people = PEOPLE if options.people is None else options.people
    items_each = vsm.N_ITEMS if options.items_each is None else options.items_each
    return Suite(
        cultures=registry,
        survey=tuple(_survey(options, seen, cultures)) if Task.opinions in tasks else (),
        groups=tuple(vsm.groups_of(cultures, people, options.rng_seed, items_each))
        if Task.vsm in tasks
        else (),
        items=vsm.read_items(options.vsm_items),
        labelled=tuple(_labelled(options, cultures)) if Task.moderation in tasks else (),
        abilities=forgetting.read_items() if Task.forgetting in tasks else (),
        model_cultures=tuple(one.id for one in cultures) if any(one.cultures for one in targets) else (),
        draws=options.draws,
        method=options.by.value if options.by is not None else None,
        rng_seed=options.rng_seed,
    )


def _survey(
    options: EvaluateOptions, seen: frozenset[str], cultures: Sequence[Culture]
) -> list[SurveyQuestion]:
    """The questions of the opinions, without those `seen` in training. Raises ConfigError."""
    wanted = options.question or ()
    known = {seed.id: seed for seed in load_seeds(options.seeds or ["builtin"])}
    for name in wanted:
        if name not in known:
            fix = "`culturepark seeds list` shows the built-in ones."
            raise ConfigError("--question", f"there is no question {name!r}.", fix)
        if name in seen:
            what = f"{name} is among the questions of the run, so it is not held out."
            raise ConfigError("--question", what, "Name one that the run did not talk about.")
    held_out = [seed for seed in known.values() if seed.id not in seen and (not wanted or seed.id in wanted)]
    questions = survey_questions(held_out, cultures)
    if not questions:
        what = "no question is left that is held out and was asked in these cultures."
        fix = "Name other questions with --seeds, or leave opinions out with --task."
        raise ConfigError("opinions", what, fix)
    return questions


def _labelled(options: EvaluateOptions, cultures: Sequence[Culture]) -> list[LabelledSet]:
    """The sets that are named, else the one of our own, each at most so many texts. Raises ConfigError."""
    ids = [one.id for one in cultures]
    found: list[LabelledSet] = []
    for words in options.labelled or [SYNTHETIC]:
        one = only_cultures(read_labelled(*find_labelled(words)), ids)
        if one.task.name in (other.task.name for other in found):
            fix = "Give one of them a task file of its own, with another name."
            raise ConfigError("--labelled", f"{one.task.name} is named twice.", fix)
        found.append(stratified_sample(one, options.rows, options.rng_seed))
    return found


async def _measured(
    console: Console, suite: Suite, targets: Sequence[Target], benchmarks: Sequence[str], out: Path
) -> Measured:
    """The figures of each model by its name. What it answers is kept in `out` as it comes."""
    names = unique_names([target.name for target in targets])
    measured: Measured = {}
    for number, (name, target) in enumerate(zip(names, targets, strict=True), 1):
        per_culture = target.cultures is not None
        total = suite.questions + (len(suite.model_cultures) - 1) * len(suite.abilities) * per_culture
        # First: what the harness does not know or cannot download shows before anything else was asked.
        ran = await _benchmarked(console, name, target, benchmarks, out / f"harness-{number}")
        async with target_models([target]) as [model]:
            with closing(AnswerCache(out, name, target, suite.rng_seed)) as cache:
                if cache:
                    words = (
                        f"{name}: {plural(len(cache), 'answer')} of an earlier evaluation that was stopped"
                    )
                    console.print(safe_line(words, "dim"))
                with progress_bar(console, name, total) as advance:
                    measured[name] = await evaluate_model(
                        suite, model, name, advance, per_culture=per_culture, cache=cache
                    )
        measured[name] += ran
    return measured


async def _benchmarked(
    console: Console, name: str, target: Target, benchmarks: Sequence[str], folder: Path
) -> list[Measurement]:
    """Figures of lm-evaluation-harness; its output goes to `folder`."""
    if not benchmarks:
        return []
    # The harness knows one address only: one server, with all CPUs.
    whole = replace(target.model, threads=target.model.threads or own_cpus())
    log = folder / harness.LOG
    async with served(whole) as ready:
        words = f"{name}: lm-evaluation-harness on {', '.join(benchmarks)}; its output is in {log}"
        with console.status(safe_line(words)):
            return await harness.evaluate(ready, benchmarks, folder)
