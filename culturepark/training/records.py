"""The records of a run's trainings: one numbered file an event, complete and synced before the next step
(write-ahead log).

`training/records/000001.json` and so on. The order is: intent, then the backend's id of the job, then the
outcome. A later process reads them, and asks the backend for a job with the same key before it launches one.
So a launch is neither forgotten nor, where the backend can find jobs by key, repeated.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from culturepark import flock
from culturepark.errors import RunDirError
from culturepark.store.files import REAL, Files, disk_errors, make_dirs, write_new
from culturepark.training.ports import Job, Outcome

Event = Literal["intended", "launched", "finished", "failed", "cancelled"]

_NAME = re.compile(r"[0-9]{6}\.json")


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """One event of a training. `at_s` is seconds since 1970.

    Paths within `job` are relative to the run directory, which may be moved.
    """

    number: int
    key: str
    event: Event
    at_s: float
    job: Job
    job_id: str = ""
    outcome: Outcome | None = None
    schema: int = 1


class Records:
    """The records of one run directory."""

    def __init__(self, root: Path, files: Files = REAL, clock: Callable[[], float] = time.time) -> None:
        self.root = root.resolve()
        self._folder = self.root / "training" / "records"
        self._files = files
        self._clock = clock

    def all(self) -> list[Record]:
        """Every record, oldest first. Raises RunDirError naming one that cannot be read."""
        if not self._folder.is_dir():
            return []
        found: list[Record] = []
        with disk_errors(self._folder):
            names = sorted(name for name in os.listdir(self._folder) if _NAME.fullmatch(name))
        for name in names:
            path = self._folder / name
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Record))
            except OSError as error:
                what = f"it cannot be read: {error.strerror}."
                raise RunDirError(str(path), what, "Check the disk.") from None
            except msgspec.MsgspecError as error:
                fix = "Put it back from a copy. Without it a training might be launched twice."
                raise RunDirError(str(path), f"it is damaged: {error}.", fix) from None
        return found

    def last(self, key: str) -> Record | None:
        """The latest record of a training."""
        return next((record for record in reversed(self.all()) if record.key == key), None)

    def latest(self) -> list[Record]:
        """The latest record of each training."""
        return list({record.key: record for record in self.all()}.values())

    def newest_finished(self, name: str) -> str | None:
        """The key of the training of this name that finished last."""
        ended = (one.key for one in reversed(self.all()) if (one.job.name, one.event) == (name, "finished"))
        return next(ended, None)

    def add(self, event: Event, job: Job, job_id: str = "", outcome: Outcome | None = None) -> Record:
        """Append a record, durable when this returns. Raises RunDirError."""
        make_dirs(self._folder, self._files)
        stored = msgspec.structs.replace(
            job, dataset=self._inside(job.dataset), output=self._inside(job.output)
        )
        while True:
            number = max((record.number for record in self.all()), default=0) + 1
            record = Record(number, job.key, event, round(self._clock(), 3), stored, job_id, outcome)
            data = msgspec.json.format(msgspec.json.encode(record))
            try:
                write_new(self._folder / f"{number:06}.json", data, self._files)
            except FileExistsError:
                continue
            return record

    def job(self, record: Record) -> Job:
        """The record's job with its paths as they are now."""
        job = record.job
        return msgspec.structs.replace(
            job, dataset=str(self.root / job.dataset), output=str(self.root / job.output)
        )

    def _inside(self, path: str) -> str:
        full = Path(path)
        return str(full.relative_to(self.root)) if full.is_relative_to(self.root) else path


@contextmanager
def training_lock(root: Path) -> Generator[None]:
    """The lock for launching and watching trainings of a run (mutual exclusion of processes). Raises
    RunDirError if another process has it."""
    folder = root.resolve() / "training"
    make_dirs(folder)
    with disk_errors(folder):
        fd = flock.open_file(folder / "lock")
    try:
        if not flock.try_acquire(fd):
            what = "another process is launching or watching trainings of this run."
            fix = "Wait until it has ended, or stop it with Ctrl-C; nothing is lost."
            raise RunDirError(str(folder), what, fix)
        yield
    finally:
        os.close(fd)
