"""The actor that tunes models while the run goes on, one at a time. What it did is in the run directory."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from actors.run_context import PackedContext, RunContext
from culturepark.errors import CultureParkError
from culturepark.evaluation.exam_texts import exam_texts
from culturepark.models.local.serving import local_embedder
from culturepark.store.rundir import Run, load_run
from culturepark.training.backends import open_backend
from culturepark.training.datasets import read_dataset
from culturepark.training.jobs import ENDED, create_job, run_training
from culturepark.training.leakage import (
    CachedEmbedder,
    LeakageReport,
    check_dataset,
    read_report,
    training_texts,
)
from culturepark.training.ports import Job
from culturepark.training.records import Records, training_lock

_MOST_EMBEDDED = 2000
"""A dataset of more texts than this is searched for leaks without embeddings: these need a minute or two."""


class Trainer:
    """Follows the trainings that it is asked for, each to its end. Asking twice is harmless (idempotent):
    what was launched, and how it ended, is on record, and a training that failed is not tried again by
    itself."""

    def __init__(self, packed: PackedContext, driver: int) -> None:
        """`driver` is the process on this node that the run belongs to."""
        context = RunContext.unpacked(packed)
        self._driver = 0 if _gone(driver) else driver  # its id may mean nothing here, in a container
        self._root = Path(context.root)
        self._log: structlog.stdlib.BoundLogger = context.logger("trainer")
        self._states: dict[str, str] = {}
        self._errors: dict[str, CultureParkError] = {}
        self._waiting: list[str] = []
        self._working: asyncio.Task[None] | None = None
        self._stopping = threading.Event()
        self._vectors: dict[str, NDArray[np.float32]] = {}

    async def train(self, names: list[str]) -> None:
        """Train these, cultures by their ids or the joint one, unless they were asked for before."""
        for name in names:
            if name not in self._states:
                self._states[name] = "waiting"
                self._waiting.append(name)
        if self._working is None and self._waiting:
            self._working = asyncio.create_task(self._work())

    async def status(self) -> dict[str, str]:
        """How each stands: waiting, running, finished, failed."""
        return dict(self._states)

    async def errors(self) -> dict[str, CultureParkError]:
        """The errors of those that failed."""
        return dict(self._errors)

    async def stop(self) -> None:
        """Stop the one that runs; it goes on from its last checkpoint when the run is resumed."""
        self._stopping.set()
        self._waiting.clear()
        if self._working is not None:
            await self._working

    async def _work(self) -> None:
        while self._waiting:
            name = self._waiting.pop(0)
            self._states[name] = "running"
            self._states[name] = await asyncio.to_thread(self._follow, name)
        self._working = None

    def _follow(self, name: str) -> str:
        try:
            run = load_run(self._root)
            with training_lock(run.root):
                job = create_job(run, name, run.settings)
                records = Records(run.root)
                last = records.last(job.key)
                if last is None or last.event not in ENDED:
                    self._look_for_leaks(run, Path(job.dataset))
                    self._sleep(0)  # a stop meanwhile launches nothing
                    if _gone(self._driver):
                        # It was ended at once, and with it what it found running: this one it would not find.
                        raise KeyboardInterrupt
                outcome = run_training(
                    records,
                    open_backend(run.settings),
                    job,
                    poll_s=min(1.0, run.settings.training.poll_s),
                    retry=False,
                    on_event=self._say,
                    sleep=self._sleep,
                )
            if outcome.state != "finished":
                self._errors[name] = outcome.error(job)
            return outcome.state
        except KeyboardInterrupt:
            return "stopped"
        except CultureParkError as error:
            self._errors[name] = error
            self._log.error("training_failed", name=name, where=error.where, what=error.what)
            return "failed"
        except Exception as error:  # our own fault must not end the run: its data is what counts
            self._log.exception("trainer_error", name=name)
            what = f"{type(error).__name__}: {error}"
            self._errors[name] = CultureParkError(f"training of {name}", what, "See logs/trainer.jsonl.")
            return "failed"

    def _look_for_leaks(self, run: Run, dataset: Path) -> None:
        """Search the training rows for evaluation texts, and keep a report. If that fails, the training goes
        on all the same. Only a small dataset is searched by embeddings: a large one would delay the
        training."""

        async def look() -> LeakageReport | None:
            sets = exam_texts(run, read_dataset(dataset).held_out)
            if (before := read_report(dataset)) and before.items.keys() >= sets.keys():
                return None
            if len(training_texts(dataset)) > _MOST_EMBEDDED:
                return await check_dataset(dataset, sets, None)
            async with local_embedder(run.settings) as embedder:
                remembered = CachedEmbedder(embedder, self._vectors) if embedder is not None else None
                return await check_dataset(dataset, sets, remembered)

        try:
            report = asyncio.run(look())
        except Exception as error:  # whatever an embedder dies of
            self._log.warning("leakage_unknown", dataset=dataset.name, why=f"{type(error).__name__}: {error}")
            return
        if report is None:
            return
        tell = self._log.warning if report.matches else self._log.info
        tell("leakage_looked_for", dataset=dataset.name, sets=report.items, found=len(report.matches))

    def _say(self, what: str, job: Job, job_id: str) -> None:
        if what != "running":
            self._log.info("training", name=job.name, what=what, job=job_id)

    def _sleep(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise KeyboardInterrupt


def _gone(process: int) -> bool:
    """Whether a process has ended; 0 stands for one that nothing is known of."""
    if not process:
        return False
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:
        return False  # another user's, or a system without these files
    return state == "Z"  # it waits to be asked how it ended
