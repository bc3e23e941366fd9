"""The options of `culturepark evaluate` as one value, and which of them do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from culturepark.cli.arguments import By, Task
from culturepark.errors import ConfigError
from culturepark.evaluation.targets import EMBEDDED

NO_JUDGE = "none"
"""The value of --judge that asks no judge."""

OF_MODELS = frozenset(Task) - {Task.quality}
"""Tasks that ask a model; quality is of a run's data."""

_NEEDS: dict[str, frozenset[Task]] = {
    "adapter": OF_MODELS,
    "baseline": frozenset({Task.quality}),
    "by": OF_MODELS,
    "draws": frozenset({Task.opinions}),
    "harness": frozenset({Task.forgetting}),
    "items_each": frozenset({Task.vsm}),
    "judge": frozenset({Task.quality}),
    "judge_model": frozenset({Task.quality}),
    "labelled": frozenset({Task.moderation}),
    "no_base": OF_MODELS,
    "people": frozenset({Task.vsm}),
    "question": frozenset({Task.opinions}),
    "rows": frozenset({Task.moderation, Task.quality}),
    "seeds": frozenset({Task.opinions}),
    "tuned_on": frozenset({Task.opinions}),
    "vsm_items": frozenset({Task.vsm}),
}
"""Options that do something for these tasks alone."""


class EvaluateOptions(Struct, frozen=True, kw_only=True):
    """What the user gave. Fields are called as the options are; None, "" or False where one was left out."""

    target: str
    model: str
    against: str | None
    against_model: str
    adapter: Sequence[str] | None
    no_base: bool
    api_key_env: str
    task: Sequence[Task] | None
    culture: Sequence[str] | None
    seeds: Sequence[str] | None
    question: Sequence[str] | None
    tuned_on: Sequence[Path] | None
    draws: int | None
    people: int | None
    items_each: int | None
    vsm_items: Path | None
    labelled: Sequence[str] | None
    by: By | None
    harness: Sequence[str] | None
    judge: str | None
    judge_model: str
    rows: int | None
    baseline: Path | None
    rng_seed: int
    out: Path
    force: bool

    @property
    def tasks(self) -> frozenset[Task]:
        """The tasks that are named; else all that ask a model, moderation only with a labelled set."""
        if self.task:
            return frozenset(self.task)
        return OF_MODELS if self.labelled else OF_MODELS - {Task.moderation}


def check_options(options: EvaluateOptions) -> None:
    """Raises ConfigError for an option that would do nothing, or whose value does not fit another's."""
    tasks = options.tasks
    for field, needs in _NEEDS.items():
        if _is_given(getattr(options, field)) and not needs & tasks:
            *others, last = sorted(needs)
            what = f"{', '.join(others)} or {last}" if others else last
            name = f"--{field.replace('_', '-')}"
            fix = f"Add `--task {last}`, or leave {name} out."
            raise ConfigError(name, f"it is for {what}, which is not evaluated.", fix)
    if options.against_model and (options.against is None or not tasks & OF_MODELS):
        what = "there is no second endpoint whose model this could be."
        raise ConfigError("--against-model", what, "Add `--against URL`, or leave --against-model out.")
    if options.no_base and not options.adapter:
        what = "without an adapter there would be no model left."
        raise ConfigError("--no-base", what, "Name one with --adapter, or leave --no-base out.")
    _check_judge(options)


def _is_given(value: object) -> bool:
    return value is not None and value is not False and value != ""


def _check_judge(options: EvaluateOptions) -> None:
    judge = options.judge
    if judge == NO_JUDGE and options.rows and Task.moderation not in options.tasks:
        what = "it is for the judge of the data, and none is asked."
        raise ConfigError("--rows", what, f"Leave `--judge {NO_JUDGE}` out, or --rows.")
    if options.judge_model and judge in (None, NO_JUDGE):
        what = "it is the model of a judge, and --judge names none."
        raise ConfigError("--judge-model", what, "Add `--judge URL`, or leave it out.")
    if Task.quality in options.tasks and judge not in (None, NO_JUDGE, EMBEDDED) and "://" not in judge:
        what = f"{judge!r} is no address, not `{EMBEDDED}` and not `{NO_JUDGE}`."
        raise ConfigError("--judge", what, "Name an endpoint such as http://host:8000/v1.")
