"""Micro-batching transport: many messages in one actor call.

A Ray call costs about a millisecond of CPU whatever it carries up to 100 KB, five times a bare model
call. So messages to one destination wait together while the call before them is under way, and a few
milliseconds more when the load is light: the busier the system, the larger the batches, with nothing
to tune. Delivery is at least once: a batch is sent again until the receiver has taken it, so receivers
are idempotent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from ray.exceptions import RayActorError, RayTaskError

from culturepark.errors import CultureParkError
from culturepark.messages import pack

MAX_MESSAGES = 64
MAX_BYTES = 90_000
"""Over 100 KB an argument goes through the object store, which is dearer again."""
LINGER_S = 0.003
_RETRY_S = (0.05, 0.1, 0.2, 0.5)


class Mailbox:
    """Messages to one destination, in order, one call at a time.

    `send` carries a batch and returns once the receiver has taken it. `on_taken` is told the
    messages of each batch that was. `on_failure` is told once, when the receiver raised an error of
    its own: then nothing more is sent.
    """

    def __init__(
        self,
        send: Callable[[bytes], Awaitable[object]],
        *,
        on_failure: Callable[[BaseException], None],
        on_taken: Callable[[list[bytes]], None] | None = None,
        linger_s: float = LINGER_S,
    ) -> None:
        self._send = send
        self._on_failure = on_failure
        self._on_taken = on_taken
        self._linger_s = linger_s
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._pump = asyncio.get_running_loop().create_task(self._run())
        self._pump.add_done_callback(self._noticed)

    def post(self, message: bytes) -> None:
        """Queue a message."""
        self._queue.append(message)
        self._wake.set()

    def __len__(self) -> int:
        return len(self._queue)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            if len(self._queue) < MAX_MESSAGES:
                await asyncio.sleep(self._linger_s)
            batch = self._take()
            await self._deliver(pack(batch))
            if self._on_taken:
                self._on_taken(batch)
            if not self._queue:
                self._wake.clear()

    def _take(self) -> list[bytes]:
        batch: list[bytes] = []
        size = 0
        while self._queue and len(batch) < MAX_MESSAGES:
            size += len(self._queue[0])
            if batch and size > MAX_BYTES:
                break
            batch.append(self._queue.popleft())
        return batch

    async def _deliver(self, batch: bytes) -> None:
        attempt = 0
        while True:
            try:
                await self._send(batch)
            except RayTaskError:
                raise  # the receiver's own error: sending again would not help
            except RayActorError as error:
                if never_comes_back(error):
                    raise
                # It died or is starting again; Ray restarts it, and it will take the batch then.
                await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
                attempt += 1
            else:
                return

    def _noticed(self, pump: asyncio.Task[None]) -> None:
        if not pump.cancelled() and (error := pump.exception()) is not None:
            self._on_failure(cause_of(error))


def never_comes_back(error: RayActorError) -> bool:
    """Whether an actor failed in its constructor, which Ray does not try again."""
    return "creation task" in str(error)


def cause_of(error: BaseException) -> BaseException:
    """The error that an actor raised, out of Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, CultureParkError) else error
