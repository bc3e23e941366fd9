"""From a run to tuned models: which trainings are due, and running each to its end, across crashes
(idempotent)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from culturepark.errors import ConfigError, CultureParkError, LaunchUnknownError, RunDirError, TrainingError
from culturepark.settings import Settings
from culturepark.store.paths import safe_name
from culturepark.store.rundir import Run
from culturepark.training.backends import open_backend
from culturepark.training.base import base_of
from culturepark.training.datasets import JOINT, seal
from culturepark.training.ports import Backend, Base, Job, Outcome, Recipe
from culturepark.training.records import Record, Records, training_lock

Step = Literal["launch", "watch", "done"]

ENDED = ("finished", "failed", "cancelled")
"""The events that end a training."""
_CANCELLED = Outcome(state="cancelled", what="it was cancelled.")

_LOCK_TRIES, _LOCK_WAIT_S = 10, 0.2

OnEvent = Callable[[str, Job, str], None]
"""A callback with what happens (`resumed`, `launched`, `running`, ...), the job, and the backend's id of
it."""


class Action(Struct, frozen=True):
    """What to do about a training: `launch` it, `watch` the job with `job_id`, or nothing (`done`)."""

    step: Step
    job_id: str = ""


def next_action(last: Record | None, found: str | None, result_kept: bool, retry: bool) -> Action:
    """The action that follows from the records and the backend's answer.

    `last` is the latest record of the training, `found` the backend's id of a job with its key that runs
    or has finished, `result_kept` whether its result still exists, `retry` whether a training that failed or
    was cancelled is tried again.
    """
    match last.event if last else None:
        case "finished" if result_kept:
            return Action("done")
        case "failed" | "cancelled" if not retry:
            return Action("done")
        case None | "finished" | "failed" | "cancelled":
            # The backend may know what the records do not: a directory put back from an old copy, or a
            # job that was cancelled here too late.
            return Action("watch", found) if found and result_kept else Action("launch")
        case "intended":
            return Action("watch", found) if found else Action("launch")
        case "launched":
            assert last is not None
            return Action("watch", found or last.job_id)


def trainable_cultures(funnels: Mapping[str, Mapping[str, int]], planned: Mapping[str, int]) -> list[str]:
    """The cultures whose planned dialogues have all ended, and that have kept samples to train on."""
    found: list[str] = []
    for culture, count in sorted(planned.items()):
        funnel = funnels.get(culture, {})
        ended = funnel.get("finished", 0) + funnel.get("failed", 0)
        if ended >= count and funnel.get("kept", 0):
            found.append(culture)
    return found


def trainable_names(funnels: Mapping[str, Mapping[str, int]], planned: Mapping[str, int]) -> list[str]:
    """The trainings of a run that is over: those cultures, and the joint training where there are several."""
    names = trainable_cultures(funnels, planned)
    return [*names, JOINT] if len(names) > 1 else names


def pending_trainings(root: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` whose training has neither finished, failed nor been cancelled. Raises RunDirError."""
    last = {record.job.name: record.event for record in Records(root).all()}
    return [name for name in names if last.get(name) not in ENDED]


def training_names(run: Run, cultures: list[str] | None, joint: bool) -> list[str]:
    """The trainings that the user asks for: the cultures named, and the joint one with `joint`; with neither
    all cultures and the joint one.

    Raises ConfigError about a culture that the run does not have.
    """
    planned = sorted(run.plan.planned())
    for culture in cultures or ():
        if culture not in planned:
            what = f"this run has no culture {culture!r}."
            raise ConfigError("--culture", what, f"Cultures here: {', '.join(planned)}.")
    if not cultures and not joint:
        return [*planned, JOINT] if len(planned) > 1 else planned
    return [*dict.fromkeys(cultures or ()), *([JOINT] if joint else [])]


def create_job(run: Run, name: str, settings: Settings, base: Base | None = None) -> Job:
    """Seal the dataset of `name` and describe its training.

    `settings` are the run's, with changes of [training] at most. `base` is `base_of(settings)`, computed here
    if it is not given. Raises TrainingError for an empty dataset, ConfigError about the base.
    """
    training = settings.training
    base = base or base_of(settings)
    folder, facts = seal(run, name, training)
    recipe = Recipe(
        rank=training.rank,
        alpha=training.alpha,
        dropout=training.dropout,
        learning_rate=training.learning_rate,
        epochs=training.epochs,
        max_steps=training.max_steps,
        batch=training.batch,
        row_tokens=training.row_tokens,
        seed=settings.plan.seed,
    )
    job = Job(
        name=name,
        backend=training.backend,
        dataset=str(folder),
        dataset_hash=facts.hash,
        rows=facts.n_train,
        output="",
        base=base,
        recipe=recipe,
        command=training.command if training.backend == "command" else (),
        checkpoint_steps=training.checkpoint_steps,
        workers=training.workers if training.backend == "ray-train" else 1,
    )
    output = run.root.resolve() / "training" / "jobs" / f"{safe_name(name)}-{job.key[:12]}"
    return replace(job, output=str(output))


def run_training(
    records: Records,
    backend: Backend,
    job: Job,
    *,
    poll_s: float,
    retry: bool = True,
    on_event: OnEvent = lambda what, job, job_id: None,
    sleep: Callable[[float], object] = time.sleep,
) -> Outcome:
    """Run one training to its end: launch it unless it is launched, poll it, record each step before the next
    (write-ahead log, idempotent).

    A training that an earlier process launched is found again. One whose process is gone since is launched
    again and goes on from its last checkpoint; one that dies while it is polled has failed, and its outcome
    says how. With `retry` off, one that failed before stays failed. When interrupted (KeyboardInterrupt),
    what runs on this machine is stopped, to go on next time. Call it under `records.training_lock`. Raises
    CultureParkError.
    """
    last = records.last(job.key)
    result_kept = last is None or last.outcome is None or result_exists(job, last.outcome)
    if last and last.event == "finished" and result_kept and last.outcome:
        if records.newest_finished(job.name) != job.key:
            # A name means the training that was asked for last.
            records.add("finished", job, last.job_id, last.outcome)
        on_event("finished before", job, last.job_id)
        return last.outcome
    action = next_action(last, _find(backend, job, last, retry), result_kept, retry)
    if action.step == "done":
        outcome = last.outcome if last else None
        assert outcome is not None
        return outcome
    job_id = action.job_id
    if action.step == "watch":
        state = backend.poll(job, job_id)
        if state == "lost":
            action = Action("launch")
        elif last is None or (last.event, last.job_id) != ("launched", job_id):
            records.add("launched", job, job_id)
            on_event("found", job, job_id)
        else:
            on_event("resumed", job, job_id)
    if action.step == "launch":
        backend.prepare(job)
        records.add("intended", job)
        try:
            job_id = backend.launch(job)
        except LaunchUnknownError:
            raise  # nothing is known to have failed: it stays intended, and the next start looks for it
        except CultureParkError as error:
            refused = Outcome(state="failed", failure="refused", what=error.what, fix=error.fix)
            records.add("failed", job, outcome=refused)
            raise
        records.add("launched", job, job_id)
        on_event("launched", job, job_id)
    return _watch(records, backend, job, job_id, poll_s, on_event, sleep)


def cancel(records: Records, backend: Backend, job: Job) -> Outcome | None:
    """Stop a training that was launched, and record how it ended; one that had ended before keeps its
    outcome. None if there is none to stop. Call it under `records.training_lock`. Raises CultureParkError,
    also if it goes on in spite of that."""
    last = records.last(job.key)
    if last is None or last.event not in ("intended", "launched"):
        return None
    job_id = backend.find(job) or last.job_id
    if not job_id:
        if job.backend != "openai":
            return None  # its process was never started
        what = "whether it was launched is not known: the service has no such job yet."
        raise TrainingError(f"training of {job.name}", what, "Look again in a few minutes.")
    backend.cancel(job, job_id)
    state = backend.poll(job, job_id)
    if state == "running":
        fix = "Give the same command again, or stop it where it runs."
        raise TrainingError(f"training of {job.name}", f"{job_id} was asked to stop and still runs.", fix)
    ended = backend.outcome(job, job_id) if state in ("finished", "failed") else _CANCELLED
    return _record_end(records, job, job_id, ended)


def cancel_all(
    run: Run, settings: Settings, names: Collection[str], backend: str = ""
) -> Iterator[tuple[Job, Outcome | CultureParkError]]:
    """`cancel` each training of these names that the records call begun, of one `backend` or of any (empty),
    whatever its dataset and its settings were; yields how each ended, or why it could not be stopped. Call it
    under `records.training_lock`. Raises RunDirError."""
    records = Records(run.root)
    for record in records.latest():
        job = records.job(record)
        if job.name not in names or record.event in ENDED or backend not in ("", job.backend):
            continue
        try:
            outcome = cancel(records, open_backend(_settings_of(job, settings)), job)
        except RunDirError:
            raise
        except CultureParkError as error:
            yield job, error
        else:
            if outcome is not None:
                yield job, outcome


def _settings_of(job: Job, settings: Settings) -> Settings:
    """The settings that open the backend of a recorded job. Raises ConfigError."""
    training = replace(settings.training, backend=job.backend)
    if job.backend == "openai":
        named = training.model or settings.roles.speaker
        matching = [
            name
            for name, model in settings.models.items()
            if (model.engine, model.model) == ("openai", job.base.name)
        ]
        if not matching or (len(matching) > 1 and named not in matching):
            n = len(matching)
            what = f"{n} entries of [models] are {job.base.name!r}; which launched it is not clear."
            raise ConfigError("training.model", what, "Name it: `--set training.model=NAME`.")
        training = replace(training, model=named if named in matching else matching[0])
    return replace(settings, training=training)


def detach_all(run: Run) -> None:
    """Stop a run's trainings on this machine, to go on from their checkpoints another time, unless another
    process watches them."""
    for _ in range(_LOCK_TRIES):
        try:
            with training_lock(run.root):
                records = Records(run.root)
                for record in records.latest():
                    if record.event in ("intended", "launched"):
                        open_backend(run.settings).detach(records.job(record), record.job_id)
            return
        except CultureParkError:  # the holder of the lock may be about to end
            time.sleep(_LOCK_WAIT_S)


def result_exists(job: Job, outcome: Outcome) -> bool:
    """Whether the result of a training still exists; the model of a service is assumed to."""
    return job.backend == "openai" or (Path(job.output) / outcome.model).is_dir()


def _find(backend: Backend, job: Job, last: Record | None, retry: bool) -> str | None:
    if last is not None and last.event in ("failed", "cancelled") and not retry:
        return None
    return backend.find(job)


def _watch(
    records: Records,
    backend: Backend,
    job: Job,
    job_id: str,
    poll_s: float,
    on_event: OnEvent,
    sleep: Callable[[float], object],
) -> Outcome:
    try:
        while (state := backend.poll(job, job_id)) == "running":
            on_event("running", job, job_id)
            sleep(poll_s)
    except KeyboardInterrupt:
        backend.detach(job, job_id)
        raise
    outcome = backend.outcome(job, job_id)
    if state == "lost":
        outcome = replace(outcome, state="failed")
    outcome = _record_end(records, job, job_id, outcome)
    on_event(outcome.state, job, job_id)
    return outcome


def _record_end(records: Records, job: Job, job_id: str, outcome: Outcome) -> Outcome:
    """Record how a training ended: it failed unless it finished or was cancelled."""
    event = outcome.state if outcome.state in ("finished", "cancelled") else "failed"
    outcome = replace(outcome, state=event)
    records.add(event, job, job_id, outcome)
    return outcome
