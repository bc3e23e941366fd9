"""Load reports: what a process tells the moderator of its endpoints, news or not (heartbeat)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from culturepark.limits.adaptive import REPORT_EVERY_S
from culturepark.messages import LoadReport, Seen, encode
from culturepark.models.endpoint import HttpEndpoint

_AT_LEAST_EVERY_S = 1.0
"""Seconds between reports without news: they show that the process is there, and the answers tell it how much
it may do."""
_QUIET_S = 2 * REPORT_EVERY_S
"""Seconds between looks without news, which are most of them when a model needs seconds to reply: a look
costs CPU time, which the model lacks if it runs on the same machine. With more, calls would wait long for a
share."""


async def report_load(
    address: str, endpoints: Sequence[HttpEndpoint], post: Callable[[bytes], object]
) -> None:
    """Post what the endpoints saw, for ever. From now on they keep to what the moderator answers."""
    for endpoint in endpoints:
        endpoint.replicas.obey(())
    reported: list[tuple[int, int]] = []
    posted_s = float("-inf")
    while endpoints:
        seen = tuple(one for endpoint in endpoints for one in endpoint.replicas.report())
        load, now_s = [(one.in_flight, one.waiting) for one in seen], time.monotonic()
        news = load != reported or any(map(_is_news, seen))
        if news or now_s - posted_s >= _AT_LEAST_EVERY_S:
            post(encode(LoadReport(address, seen)))
            reported, posted_s = load, now_s
        await asyncio.sleep(min(REPORT_EVERY_S if news else _QUIET_S, posted_s + _AT_LEAST_EVERY_S - now_s))


def _is_news(seen: Seen) -> bool:
    """Whether a call ended, or waits for a greater share. What is not reported now is not counted again."""
    ended = seen.completed or seen.refused or seen.broken
    return bool(ended or seen.waiting or seen.retried or seen.prompt_tokens or seen.completion_tokens)
