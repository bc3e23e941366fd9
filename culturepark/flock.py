"""Lock files, held by descriptor (advisory locks of the kernel, `flock`).

A lock is held as long as a descriptor of its open file is: it ends with the process, however that ends, so
there is no stale lock. A child process inherits the descriptor (`subprocess.Popen(pass_fds=...)`) and then
holds the lock, too, even after its parent has died. The library `filelock` keeps its descriptor to itself and
cannot hand it to a child; hence this module.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def open_file(path: Path, mode: int = 0o644) -> int:
    """Open the lock file `path`, made with `mode` if it is not there; returns the descriptor, not locked yet.

    Closing the descriptor releases the lock. A symbolic link is refused. Raises OSError.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def acquire(fd: int) -> None:
    """Lock the open file exclusively; waits without limit. Raises OSError."""
    fcntl.flock(fd, fcntl.LOCK_EX)


def try_acquire(fd: int, *, shared: bool = False) -> bool:
    """Lock the open file exclusively, or `shared`, without waiting; False if another holder is in the way.

    Another holder is one that opened the file itself, in this process or another. Raises OSError.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(path: Path) -> bool:
    """Whether the lock file `path` is locked exclusively now; False if there is no such file.

    Two that ask at the same time do not disturb each other. Raises OSError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_acquire(fd, shared=True)
    finally:
        os.close(fd)
