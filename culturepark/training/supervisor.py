"""One process between a launcher and a training (supervisor).

    python -m culturepark.training.supervisor MODULE JOB.json FD

Ray kills the children of an actor that ends, though not their children: a training that was a child of the
actor would die with it, and be launched, and perhaps paid for, a second time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Start the training in a process group of its own, and end as it ends."""
    module, job_file, lock = arguments
    fd = int(lock)
    training = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", module, job_file, lock], pass_fds=(fd,), start_new_session=True
    )
    os.close(fd)  # the training's copy alone holds the lock
    code = training.wait()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the one signal that Python handles itself
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
