"""An event loop that processes events in batches (interrupt coalescing), so that one wake-up serves many.

A process that gets a few hundred replies a second would wake up for each of them and send a frame for
each, and the waking costs as much as the work. A delay of a few milliseconds before waiting for events lets
them come together. A loop that is idle still wakes at once for the first event; one that has more to do
than it can never delays, since its next events are there already.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

BATCHING_S = 0.005
"""Seconds that a loop lets events gather: far below what a model needs to reply. A turn passes through five
loops, so this adds about 20 ms to it."""


class _BatchingSelector:
    """A selector that sleeps before it waits. For all else it is the one that it was given."""

    def __init__(self, selector: Any) -> None:
        self._selector = selector
        self._select = selector.select

    def __getattr__(self, name: str) -> Any:
        return getattr(self._selector, name)

    def select(self, timeout: float | None = None) -> Any:
        """As a selector's own; `timeout` is at most 0 when the loop has work at hand."""
        if timeout is None or timeout > 0:
            time.sleep(BATCHING_S)
            timeout = None if timeout is None else max(0.0, timeout - BATCHING_S)
        return self._select(timeout)


def batch_events(loop: asyncio.AbstractEventLoop) -> None:
    """Make this loop batch events. Loops without a selector, such as uvloop's, stay as they are."""
    selector = getattr(loop, "_selector", None)
    if selector is not None and not isinstance(selector, _BatchingSelector):
        cast(Any, loop)._selector = _BatchingSelector(selector)
