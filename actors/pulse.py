"""What a process tells the moderator of its endpoints, four times a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from culturepark.limits import PULSE_S, Seen
from culturepark.messages import Pulse, encode
from culturepark.models.http import HttpEndpoint

_AT_LEAST_EVERY_S = 2.0
"""A process with nothing to do still shows that it is there."""


async def pulse(address: str, endpoints: Sequence[HttpEndpoint], post: Callable[[bytes], None]) -> None:
    """Post what the endpoints saw, for ever. From now on they keep to what the moderator answers."""
    for endpoint in endpoints:
        endpoint.obey(())
    busy_before, posted_s = False, float("-inf")
    while endpoints:
        seen = tuple(one for endpoint in endpoints for one in endpoint.report())
        busy, now_s = any(map(_busy, seen)), time.monotonic()
        if busy or busy_before or now_s - posted_s >= _AT_LEAST_EVERY_S:
            post(encode(Pulse(address, seen)))
            posted_s = now_s
        busy_before = busy
        await asyncio.sleep(PULSE_S)


def _busy(seen: Seen) -> bool:
    return bool(seen.in_flight or seen.waiting or seen.completed or seen.refused or seen.broken)
