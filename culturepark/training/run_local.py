"""The process that a local training runs in: `python -m culturepark.training.run_local JOB.json FD`.

FD is the descriptor of the locked file by which it counts as running. `training.supervisor` starts it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from culturepark.training.subprocess_backend import register_process, save_outcome


def main(arguments: Sequence[str]) -> int:
    """Train, and leave the outcome."""
    job = register_process(arguments[0], arguments[1])
    os.set_inheritable(int(arguments[1]), False)
    from culturepark.training.lora import train

    outcome = train(job)
    save_outcome(job, outcome)
    return int(outcome.state != "finished")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
