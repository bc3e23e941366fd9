"""The process that runs a trainer of the user's: `python -m culturepark.training.run_command JOB.json FD`.

The trainer inherits the locked file FD, so the job counts as running as long as the trainer does, even if
this process is killed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence

from culturepark.training.ports import Job, Outcome
from culturepark.training.subprocess_backend import LOG_FILE, exit_words, register_process, save_outcome


def arguments_of(job: Job) -> list[str]:
    """The command with its placeholders filled in: one argument stays one argument."""
    values = {
        "dataset": job.dataset,
        "output": job.output,
        "base": job.base.path or job.base.name,
        "name": job.name,
    }
    return [re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), one) for one in job.command]


def main(arguments: Sequence[str]) -> int:
    """Run the command, and leave the outcome."""
    job = register_process(arguments[0], arguments[1])
    began_s = time.monotonic()
    command = arguments_of(job)
    try:
        code = subprocess.run(command, pass_fds=(int(arguments[1]),), check=False).returncode  # noqa: S603
    except OSError as error:
        outcome = _failed(f"{command[0]} cannot be run: {error.strerror}.", "Mend training.command.")
    else:
        took_s = round(time.monotonic() - began_s, 1)
        outcome = (
            _failed(f"the command ended {exit_words(code)}.", f"See {LOG_FILE} in {job.output}.")
            if code
            else Outcome(state="finished", model=".", seconds=took_s)
        )
    save_outcome(job, outcome)
    return int(outcome.state != "finished")


def _failed(what: str, fix: str) -> Outcome:
    return Outcome(state="failed", failure="crashed", what=what, fix=fix)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
