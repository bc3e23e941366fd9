"""Programs that work in turn, so that all of them find the machine as fast, or as slow, as the others do.

The speed of a shared machine changes within minutes, by more than what is to be measured.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import TracebackType

from measuring import stat_of, tree_of

TURN_S = 10.0
"""Long beside what a program takes to go on, short beside the changes of a machine. What is stopped for much
longer would be found dead by what it is connected to."""


class Turns:
    """Lets one process tree after the other work, the others stopped, until it is left."""

    def __init__(self) -> None:
        self._stopped: dict[int, list[tuple[float, float]]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._alternate, daemon=True)

    def __enter__(self) -> Turns:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def add(self, pid: int) -> None:
        """Let the tree below `pid` take part, from the next turn on."""
        self._stopped[pid] = []

    def working_s(self, pid: int, first: float, last: float) -> float:
        """How long a tree worked between two times, in seconds of the clock."""
        stopped = self._stopped.get(pid, ())
        return last - first - sum(max(0.0, min(last, b) - max(first, a)) for a, b in stopped)

    def _alternate(self) -> None:
        while not self._over.is_set():
            # Alone, nobody has a turn: the next one who is added would start beside it.
            for pid in list(self._stopped) if len(self._stopped) > 1 else ():
                others = [one for one in list(self._stopped) if one != pid and _works(one)]
                if not _works(pid) and others:
                    continue
                began = time.time()
                for other in others:
                    _tell(other, signal.SIGSTOP)
                self._over.wait(TURN_S)
                for other in others:
                    _tell(other, signal.SIGCONT)
                    self._stopped[other].append((began, time.time()))
            self._over.wait(0.01)


def _works(pid: int) -> bool:
    return stat_of(pid)[:1] not in ([], ["Z"])


def _tell(pid: int, what: signal.Signals) -> None:
    for _ in range(2):  # what was made meanwhile is found the second time
        for one in tree_of(pid):
            with suppress(ProcessLookupError):
                os.kill(one, what)
