"""What a process tells the moderator of its endpoints: four times a second while there is news."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from culturepark.limits.adaptive import REPORT_EVERY_S
from culturepark.messages import LoadReport, Seen, encode
from culturepark.models.endpoint import HttpEndpoint

_AT_LEAST_EVERY_S = 1.0
"""Without news a process still shows that it is there, and hears how much it may do."""
_QUIET_S = 2 * REPORT_EVERY_S
"""Between looks without news, which is most of them when a model takes seconds to reply: where it runs on the
same machine, looking costs it. Any longer, and a call would wait for a greater share for long."""


async def pulse(address: str, endpoints: Sequence[HttpEndpoint], post: Callable[[bytes], None]) -> None:
    """Post what the endpoints saw, for ever. From now on they keep to what the moderator answers."""
    for endpoint in endpoints:
        endpoint.replicas.obey(())
    told: list[tuple[int, int]] = []
    posted_s = float("-inf")
    while endpoints:
        seen = tuple(one for endpoint in endpoints for one in endpoint.replicas.report())
        asked, now_s = [(one.in_flight, one.waiting) for one in seen], time.monotonic()
        news = asked != told or any(map(_news, seen))
        if news or now_s - posted_s >= _AT_LEAST_EVERY_S:
            post(encode(LoadReport(address, seen)))
            told, posted_s = asked, now_s
        await asyncio.sleep(min(REPORT_EVERY_S if news else _QUIET_S, posted_s + _AT_LEAST_EVERY_S - now_s))


def _news(seen: Seen) -> bool:
    """Whether something happened, or waits for a greater share. What is not told is not counted again."""
    ended = seen.completed or seen.refused or seen.broken
    return bool(ended or seen.waiting or seen.retried or seen.prompt_tokens or seen.completion_tokens)
