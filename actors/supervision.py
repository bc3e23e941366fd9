"""Noticing that an actor was lost, telling why, and ending one that cannot do its work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from culturepark.errors import CultureParkError

RETRY_S = 0.1
"""Seconds before an actor is asked again that did not answer, is being restarted or has no senders."""
_EXIT_AFTER_S = 0.2
"""Seconds that an actor's process lives on after `leave`, so that what it wrote last gets out."""


async def losses(handle: Any) -> AsyncIterator[str]:
    """Each time an actor is found to be another incarnation: why the last one ended, as Ray tells it.

    Incarnations are compared, so one that began, received messages and ended between two looks is not
    missed. Raises what keeps the actor from its work.
    """
    known = why = ""
    while True:
        try:
            incarnation: str = await handle.watch.remote(known)
        except RayTaskError as error:
            raise cause_of(error) from error
        except RayActorError as error:
            if never_comes_back(error):
                raise
            why = str(error)
            await asyncio.sleep(RETRY_S)
        else:
            if incarnation == known:  # it has no senders, and must not be kept from telling where it is
                await asyncio.sleep(RETRY_S)
            elif known or why:
                yield why
            known, why = incarnation, ""


def never_comes_back(error: RayActorError) -> bool:
    """Whether an actor failed in its constructor, which Ray does not try again."""
    return "creation task" in str(error)


def cause_of(error: BaseException) -> BaseException:
    """The error that an actor raised, out of Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, CultureParkError) else error


def leave(reason: str) -> None:
    """End this actor's process: Ray restarts it, and what it held is asked again (fail-fast).

    For faults that leave the actor unable to do its work, so that it does not look alive.
    """
    print(f"culturepark: leaving: {reason}", flush=True)
    asyncio.get_running_loop().call_later(_EXIT_AFTER_S, os._exit, 1)
