"""Trainings in a process of their own: ours (`local`), ours over Ray (`ray-train`), the user's (`command`).

A process of its own can run out of memory or be killed without harm to others, and how it ended is seen.
While it lives it holds the lock of its output folder, whose descriptor it inherits at its start: so a later
process, even after the launching one was killed, knows whether it still runs, and a second training of the
same job cannot start (mutual exclusion). `supervisor` runs between the two, so that the end of the launching
process does not end the training.
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
"""The libraries that the extra `train` installs and a training imports."""

LESS_MEMORY_FIX = (
    "Lower training.batch or training.row_tokens, with which it begins anew, tune a smaller model, or use a "
    "larger machine."
)
"""The advice when memory ran out."""

_GRACE_S = 10.0
"""Seconds that a process has to end after SIGTERM, and again after SIGKILL."""
_POLL_S = 0.05
"""Seconds between two looks at a process that starts or is to end."""
_LOG_LINES = 3
"""An error shows this many of the last lines of the log."""


class SubprocessBackend:
    """Runs `python -m MODULE JOB.json FD` for each job, FD being the lock it holds."""

    def __init__(self, module: str, sleep: Callable[[float], object] = time.sleep) -> None:
        self._module = module
        self._sleep = sleep
        self._supervisors: dict[str, subprocess.Popen[bytes]] = {}
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
        held, outcome = _is_held(job), _read_outcome(job)  # in this order: it may end between the two
        found = held if outcome is None else outcome.state == "finished"
        return (_pid(job) or "0") if found else None

    def launch(self, job: Job) -> str:
        """See ports.Backend. If a process of this job runs already, returns its id."""
        folder = Path(job.output)
        make_dirs(folder)
        with disk_errors(folder / LOCK_FILE):
            lock = flock.open_file(folder / LOCK_FILE)
        try:
            if not flock.try_acquire(lock):
                if _read_outcome(job) is None:
                    return _pid(job) or "0"
                self.detach(job, "")  # it has left its outcome and is about to exit
                if not flock.try_acquire(lock):
                    what = f"a process that an earlier training left holds {folder / LOCK_FILE}."
                    raise TrainingError(f"training of {job.name}", what, "End that process.")
            with suppress(FileNotFoundError):
                (folder / OUTCOME_FILE).unlink()  # how an earlier attempt ended
            write_atomically(folder / JOB_FILE, msgspec.json.format(msgspec.json.encode(job)))
            self._oom_kills[job.key] = _oom_kills()
            os.ftruncate(lock, 0)
            with disk_errors(folder), (folder / LOG_FILE).open("ab") as log:
                supervisor = subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-m", SUPERVISOR, self._module, str(folder / JOB_FILE), str(lock)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,  # a Ctrl-C in the terminal is for us to pass on
                    env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"},
                )
            self._supervisors[job.key] = supervisor
        finally:
            os.close(lock)  # the process's copy keeps it locked
        try:
            while not (pid := _pid(job)) and supervisor.poll() is None:
                self._sleep(_POLL_S)
        except BaseException:
            self.detach(job, "")
            raise
        return pid or "0"

    def poll(self, job: Job, job_id: str) -> State:
        """See ports.Backend."""
        if supervisor := self._supervisors.get(job.key):
            supervisor.poll()
        if outcome := _read_outcome(job):
            return outcome.state
        if _is_held(job):
            return "running"
        outcome = _read_outcome(job)  # it may have ended in between
        return outcome.state if outcome else "lost"

    def cancel(self, job: Job, job_id: str) -> None:
        """See ports.Backend."""
        if _read_outcome(job) is None:
            self.detach(job, job_id)
            ended = _read_outcome(job)
            if ended is None or ended.state != "finished":  # it may have finished meanwhile
                make_dirs(Path(job.output))
                save_outcome(job, Outcome(state="cancelled", what="it was cancelled."))

    def detach(self, job: Job, job_id: str) -> None:
        """See ports.Backend: the process is stopped, its checkpoints stay."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            waited_s, sent = 0.0, False
            while _is_held(job) and waited_s < _GRACE_S:
                sent = sent or _signal(_pid(job), number)  # the process number may not be written yet
                self._sleep(_POLL_S)
                waited_s += _POLL_S
        if supervisor := self._supervisors.get(job.key):
            supervisor.wait()

    def outcome(self, job: Job, job_id: str) -> Outcome:
        """See ports.Backend. Of a process that left no outcome: what can be seen from outside."""
        if outcome := _read_outcome(job):
            return outcome
        supervisor = self._supervisors.get(job.key)
        code = supervisor.wait() if supervisor else None
        log = Path(job.output) / LOG_FILE
        again = "Run `culturepark finetune` again: it goes on from the last checkpoint."
        if code is not None and code != -signal.SIGKILL:
            what = f"its process ended {exit_words(code)} without a result{_log_words(log)}."
            return Outcome(state="failed", failure="crashed", what=what, fix=f"See {log}.")
        if job.key in self._oom_kills and _oom_kills() > self._oom_kills[job.key]:
            what = "its process was killed by the system, because memory ran out."
            fix = f"{LESS_MEMORY_FIX} {again}"
            return Outcome(state="failed", failure="out_of_memory", what=what, fix=fix)
        what = (
            "its process was killed (SIGKILL)."
            if code
            else f"its process is gone and left no result{_log_words(log)}."
        )
        return Outcome(state="failed", failure="killed", what=what, fix=again)


SUPERVISOR = "culturepark.training.supervisor"
LOCAL, COMMAND = "culturepark.training.run_local", "culturepark.training.run_command"
RAY_TRAIN = "actors.ray_train"
"""The module of `ray-train`, by name alone: it is run as a program, and nothing here imports Ray."""


def save_outcome(job: Job, outcome: Outcome) -> None:
    """Write the outcome to the file that `outcome` and `poll` read."""
    write_atomically(Path(job.output) / OUTCOME_FILE, msgspec.json.format(msgspec.json.encode(outcome)))


def register_process(job_file: str, lock: str) -> Job:
    """For the training process: write its process number into the locked file (pid file), by which it can be
    stopped. Returns its job."""
    os.pwrite(int(lock), f"{os.getpid()}\n".encode(), 0)
    return msgspec.json.decode(Path(job_file).read_bytes(), type=Job)


def kill_all(root: Path) -> None:
    """Kill every training on this machine of the run at `root`; each goes on from its last checkpoint when it
    is launched again."""
    for path in root.glob(f"training/jobs/*/{LOCK_FILE}"):
        with suppress(OSError):
            if flock.is_held(path):
                _signal(_read_pid(path), signal.SIGKILL)


def exit_words(code: int) -> str:
    """How a process ended, by its exit code; a negative one is a signal's number."""
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log that are not blank, at most `count`; none if it cannot be read."""
    try:
        text = log.read_text("utf-8", "replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()][-count:]


def _read_outcome(job: Job) -> Outcome | None:
    """The outcome that the process left, if there is one."""
    try:
        return msgspec.json.decode((Path(job.output) / OUTCOME_FILE).read_bytes(), type=Outcome)
    except (OSError, msgspec.MsgspecError):
        return None


def _is_held(job: Job) -> bool:
    """Whether a living process holds the job's lock."""
    path = Path(job.output) / LOCK_FILE
    with disk_errors(path):
        return flock.is_held(path)


def _pid(job: Job) -> str:
    return _read_pid(Path(job.output) / LOCK_FILE)


def _read_pid(lock: Path) -> str:
    try:
        text = lock.read_text("ascii")
    except (OSError, ValueError):
        return ""
    return text.strip() if text.endswith("\n") else ""  # else it is being written


def _signal(pid: str, number: int) -> bool:
    """Send a signal to the process and those it started (process group). Returns whether `pid` is one."""
    if not pid.isdigit() or int(pid) <= 1:
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(int(pid), number)
    return True


def _oom_kills() -> int:
    """How often this system has killed a process because memory ran out (OOM kills); 0 where the system does
    not count them."""
    try:
        lines = Path("/proc/vmstat").read_text("ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _log_words(log: Path) -> str:
    lines = last_lines(log, _LOG_LINES)
    return f": {' / '.join(lines)[-300:]}" if lines else ""
