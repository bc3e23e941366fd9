"""Programs that run in turn (interleaving), so that all of them are measured at the same speed of the
machine.

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
"""Seconds of a turn: long beside the time that a program needs to resume, short beside the changes of a
machine. A process stopped for much longer would be declared dead by its peers."""


class Turns:
    """Lets one process tree after the other run, with the others stopped, until the block ends (round
    robin)."""

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
        """Include the tree below `pid` from the next turn on."""
        self._stopped[pid] = []

    def working_s(self, pid: int, first: float, last: float) -> float:
        """How long a tree worked between two times, in seconds of the clock."""
        stopped = self._stopped.get(pid, ())
        return last - first - sum(max(0.0, min(last, b) - max(first, a)) for a, b in stopped)

    def _alternate(self) -> None:
        while not self._over.is_set():
            # A single tree has no turns: the next one that is added starts beside it.
            for pid in list(self._stopped) if len(self._stopped) > 1 else ():
                others = [one for one in list(self._stopped) if one != pid and _is_alive(one)]
                if not _is_alive(pid) and others:
                    continue
                began = time.time()
                for other in others:
                    _send_signal(other, signal.SIGSTOP)
                self._over.wait(TURN_S)
                for other in others:
                    _send_signal(other, signal.SIGCONT)
                    self._stopped[other].append((began, time.time()))
            self._over.wait(0.01)


def _is_alive(pid: int) -> bool:
    return stat_of(pid)[:1] not in ([], ["Z"])


def _send_signal(pid: int, number: signal.Signals) -> None:
    for _ in range(2):  # a process started meanwhile is found the second time
        for one in tree_of(pid):
            with suppress(ProcessLookupError):
                os.kill(one, number)
