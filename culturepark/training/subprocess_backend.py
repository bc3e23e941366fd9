"""Trainings in a process of their own: ours (`local`), ours over Ray (`ray-train`), the user's (`command`).

A process of its own can run out of memory or be killed without taking anybody along, and what became of it is
seen. While it lives it holds a lock on its output folder, which it is born with: so whoever comes later, even
after the launching process was killed, knows whether it still runs, and a second one cannot begin beside it.
`apart` stands between, so that no end of the launching process takes it along.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from culturepark import flock
from culturepark.errors import ConfigError, TrainingError
from culturepark.store.files import disk_errors, make_dirs, write_atomically
from culturepark.training.datasets import verify
from culturepark.training.ports import Job, Outcome, State

JOB_FILE, OUTCOME_FILE, LOG_FILE, LOCK_FILE = "job.json", "outcome.json", "log.txt", "lock"
NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "gguf", "safetensors")
"""What the extra `train` installs and a training imports."""

SMALLER = (
    "Lower training.batch or training.row_tokens, with which it begins anew, tune a smaller model, or use a "
    "larger machine."
)
"""What to do when memory ran out."""

_GRACE_S = 10.0
_POLL_S = 0.05
_LOG_SHOWN = 3


class ChildBackend:
    """Runs `python -m MODULE JOB.json FD` for each job, FD being the lock it holds."""

    def __init__(self, module: str, sleep: Callable[[float], object] = time.sleep) -> None:
        self._module = module
        self._sleep = sleep
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._oom_kills: dict[str, int] = {}

    def prepare(self, job: Job) -> None:
        """See ports.Backend."""
        verify(Path(job.dataset))
        if self._module != COMMAND:
            missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
            if missing:
                what = f"not installed: {', '.join(missing)}."
                fix = "Run `pip install 'culturepark[train]'` (docs/training.md says how without CUDA)."
                raise ConfigError("training on this machine", what, fix)
        elif shutil.which(job.command[0]) is None:
            what = f"there is no program {job.command[0]!r} to run."
            raise ConfigError("training.command", what, "Install it, or give its full path.")

    def find(self, job: Job) -> str | None:
        """See ports.Backend."""
        self._oom_kills.setdefault(job.key, _oom_kills())
        held, outcome = _held(job), _read(job)  # in this order: it may end between the two looks
        there = held if outcome is None else outcome.state == "finished"
        return (_pid(job) or "0") if there else None

    def launch(self, job: Job) -> str:
        """See ports.Backend. Where one runs already, that one's id."""
        folder = Path(job.output)
        make_dirs(folder)
        with disk_errors(folder / LOCK_FILE):
            lock = flock.open_file(folder / LOCK_FILE)
        try:
            if not flock.try_acquire(lock):
                if _read(job) is None:
                    return _pid(job) or "0"
                self.detach(job, "")  # it has said how it ended, and takes its time to leave
                if not flock.try_acquire(lock):
                    what = f"a process that an earlier training left holds {folder / LOCK_FILE}."
                    raise TrainingError(f"training of {job.name}", what, "End that process.")
            with suppress(FileNotFoundError):
                (folder / OUTCOME_FILE).unlink()  # how an earlier attempt ended
            write_atomically(folder / JOB_FILE, msgspec.json.format(msgspec.json.encode(job)))
            self._oom_kills[job.key] = _oom_kills()
            os.ftruncate(lock, 0)
            with disk_errors(folder), (folder / LOG_FILE).open("ab") as log:
                child = subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-m", APART, self._module, str(folder / JOB_FILE), str(lock)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,  # a Ctrl-C in the terminal is for us to pass on
                    env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"},
                )
            self._children[job.key] = child
        finally:
            os.close(lock)  # the child's copy keeps it locked
        try:
            while not (pid := _pid(job)) and child.poll() is None:
                self._sleep(_POLL_S)
        except BaseException:
            self.detach(job, "")
            raise
        return pid or "0"

    def poll(self, job: Job, job_id: str) -> State:
        """See ports.Backend."""
        if child := self._children.get(job.key):
            child.poll()
        if outcome := _read(job):
            return outcome.state
        if _held(job):
            return "running"
        outcome = _read(job)  # it may have ended between the two looks
        return outcome.state if outcome else "lost"

    def cancel(self, job: Job, job_id: str) -> None:
        """See ports.Backend."""
        if _read(job) is None:
            self.detach(job, job_id)
            ended = _read(job)
            if ended is None or ended.state != "finished":  # it may have finished meanwhile
                make_dirs(Path(job.output))
                save(job, Outcome(state="cancelled", what="it was cancelled."))

    def detach(self, job: Job, job_id: str) -> None:
        """See ports.Backend: the process is stopped, its checkpoints stay."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            waited_s, sent = 0.0, False
            while _held(job) and waited_s < _GRACE_S:
                sent = sent or _signal(_pid(job), number)  # the number may have yet to be written
                self._sleep(_POLL_S)
                waited_s += _POLL_S
        if child := self._children.get(job.key):
            child.wait()

    def outcome(self, job: Job, job_id: str) -> Outcome:
        """See ports.Backend. Of a process that did not say how it ended: what can be seen from outside."""
        if outcome := _read(job):
            return outcome
        child = self._children.get(job.key)
        code = child.wait() if child else None
        log = Path(job.output) / LOG_FILE
        again = "Run `culturepark finetune` again: it goes on from the last checkpoint."
        if code is not None and code != -signal.SIGKILL:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            what = f"its process ended {how} without a result{_last_words(log)}."
            return Outcome(state="failed", failure="crashed", what=what, fix=f"See {log}.")
        if job.key in self._oom_kills and _oom_kills() > self._oom_kills[job.key]:
            what = "its process was killed by the system, because memory ran out."
            fix = f"{SMALLER} {again}"
            return Outcome(state="failed", failure="out_of_memory", what=what, fix=fix)
        what = (
            "its process was killed (SIGKILL)."
            if code
            else f"its process is gone and left no result{_last_words(log)}."
        )
        return Outcome(state="failed", failure="killed", what=what, fix=again)


APART = "culturepark.training.supervisor"
LOCAL, COMMAND = "culturepark.training.run_local", "culturepark.training.run_command"
RAY_TRAIN = "actors.ray_train"
"""By name alone: nothing here imports Ray."""


def save(job: Job, outcome: Outcome) -> None:
    """Leave the outcome where `outcome` and `poll` look for it."""
    write_atomically(Path(job.output) / OUTCOME_FILE, msgspec.json.format(msgspec.json.encode(outcome)))


def hold(job_file: str, lock: str) -> Job:
    """For the child: put its process number into the locked file, for whoever wants to stop it. Returns its
    job."""
    os.pwrite(int(lock), f"{os.getpid()}\n".encode(), 0)
    return msgspec.json.decode(Path(job_file).read_bytes(), type=Job)


def kill_all(root: Path) -> None:
    """Kill every training on this machine of the run at `root`; each goes on from its last checkpoint when it
    is launched again."""
    for path in root.glob(f"training/jobs/*/{LOCK_FILE}"):
        with suppress(OSError):
            if flock.is_held(path):
                _signal(_number_in(path), signal.SIGKILL)


def _read(job: Job) -> Outcome | None:
    """The outcome that was left, if there is one."""
    try:
        return msgspec.json.decode((Path(job.output) / OUTCOME_FILE).read_bytes(), type=Outcome)
    except (OSError, msgspec.MsgspecError):
        return None


def _held(job: Job) -> bool:
    """Whether a process lives that holds the job's lock."""
    path = Path(job.output) / LOCK_FILE
    with disk_errors(path):
        return flock.is_held(path)


def _pid(job: Job) -> str:
    return _number_in(Path(job.output) / LOCK_FILE)


def _number_in(lock: Path) -> str:
    try:
        told = lock.read_text("ascii")
    except (OSError, ValueError):
        return ""
    return told.strip() if told.endswith("\n") else ""  # else it is being written


def _signal(pid: str, number: int) -> bool:
    """To the process and those it started; it leads a group of its own. Returns whether there is a number."""
    if not pid.isdigit() or int(pid) <= 1:
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(int(pid), number)
    return True


def _oom_kills() -> int:
    """How often this system has killed a process for memory; 0 where it does not count."""
    try:
        lines = Path("/proc/vmstat").read_text("ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _last_words(log: Path) -> str:
    try:
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return f": {' / '.join(lines[-_LOG_SHOWN:])[-300:]}" if lines else ""
