"""An event loop that lets events gather, so that one wake-up serves many.

A process that gets a few hundred replies a second would wake up for each of them and send a frame for
each, and the waking costs as much as the work. A rest of a few milliseconds before waiting for events lets
them come together. A loop that is idle still wakes at once for the first event; one that has more to do
than it can never rests, since its next events are there already.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

REST_S = 0.005
"""Far below what a model takes to reply. A turn passes through five loops, so it adds about 20 ms to it."""


class _Resting:
    """A selector that rests before it waits. For all else it is the one that it was given."""

    def __init__(self, selector: Any) -> None:
        self._selector = selector
        self._select = selector.select

    def __getattr__(self, name: str) -> Any:
        return getattr(self._selector, name)

    def select(self, timeout: float | None = None) -> Any:
        """As a selector's own; `timeout` is at most 0 when the loop has work at hand."""
        if timeout is None or timeout > 0:
            time.sleep(REST_S)
            timeout = None if timeout is None else max(0.0, timeout - REST_S)
        return self._select(timeout)


def rest_between_events(loop: asyncio.AbstractEventLoop) -> None:
    """Make this loop rest. Loops without a selector, such as uvloop's, stay as they are."""
    selector = getattr(loop, "_selector", None)
    if selector is not None and not isinstance(selector, _Resting):
        cast(Any, loop)._selector = _Resting(selector)
