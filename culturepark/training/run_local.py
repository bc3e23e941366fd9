"""The process that a local training runs in: `python -m culturepark.training.run_local JOB.json FD`.

FD is the locked file that says it lives. Started and watched by `training.child`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from culturepark.training.subprocess_backend import hold, save


def main(arguments: Sequence[str]) -> int:
    """Train, and leave the outcome."""
    job = hold(arguments[0], arguments[1])
    os.set_inheritable(int(arguments[1]), False)
    from culturepark.training.lora import train

    outcome = train(job)
    save(job, outcome)
    return int(outcome.state != "finished")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
