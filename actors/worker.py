"""What agents and refiners have in common: each message is worked on once, many at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from actors.base import MessagingActor
from actors.load_reports import report_load
from actors.run_context import PackedContext, RunContext
from culturepark.messages import Ask, Refine, Shares, unpack

_SHARES = "shares"
"""Stands for the first shares of a moderator that is back: they follow the asks that it sends again, so until
they come, a worker does not know which of its calls are still wanted."""

Work = Callable[[Ask | Refine], Coroutine[None, None, None]]
"""Works on one message to its end, and posts the result. Never raises."""


class Worker(MessagingActor):
    """An actor that works on asks or on whole dialogues. Keeps nothing that must survive.

    A subclass makes in `open` what does the work.
    """

    def __init__(self, packed: PackedContext, address: str, credentials: tuple[str, str]) -> None:
        super().__init__(credentials)
        # Nothing here can fail: an error in a constructor would reach no user in words.
        self.context = RunContext.unpacked(packed)
        self.log = self.context.logger(address.replace("/", "-"))
        self._address = address
        self._busy: dict[tuple[int, int], tuple[int, asyncio.Task[None]]] = {}
        self._unreachable = {"moderator"}
        """What has to be connected before a call is begun, and is not."""
        self._work: Work
        self._reporting: asyncio.Task[None]

    def open(self) -> Work:
        """What does the work. Raises ConfigError."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Open what the work needs. Raises ConfigError."""
        moderator = self.outbox("moderator", on_connection=self._moderator_connected)
        self._work = self.open()
        self._hold()
        reporting = report_load(self._address, self.context.endpoints, moderator.post)
        self._reporting = asyncio.create_task(reporting)
        self._reporting.add_done_callback(self._task_ended)

    def connected(self, address: str, up: bool) -> None:
        """The receiver of results is connected, or is not: then no call is begun, for its reply would
        be lost, and paid for again."""
        (self._unreachable.discard if up else self._unreachable.add)(address)
        self._hold()

    def _moderator_connected(self, up: bool) -> None:
        if not up:
            self._unreachable.add(_SHARES)
        self.connected("moderator", up)

    def _hold(self) -> None:
        for endpoint in self.context.endpoints:
            endpoint.replicas.hold(bool(self._unreachable))

    def receive(self, payload: bytes) -> None:
        """Begin work on each message; one that is under way already is not begun again (idempotent).

        One of another term is begun again: it is from a new moderator, which knows what is on disk, and the
        answer to the old one is not waited for any more.
        """
        busy = self._busy
        for message in unpack(payload):
            if isinstance(message, Shares):
                for endpoint in self.context.endpoints:
                    endpoint.replicas.obey(message.shares)
                    if message.halt:
                        endpoint.halt()
                if _SHARES in self._unreachable and "moderator" not in self._unreachable:
                    self.connected(_SHARES, True)
                continue
            assert isinstance(message, Ask | Refine)  # nothing else is sent to a worker
            key = (message.number, message.turn if isinstance(message, Ask) else 0)
            under_way = busy.get(key)
            if under_way is not None:
                if under_way[0] == message.term:
                    continue
                under_way[1].cancel()
            task = asyncio.create_task(self._work(message))
            busy[key] = (message.term, task)
            task.add_done_callback(lambda done, key=key: self._ended(key, done))

    def _ended(self, key: tuple[int, int], task: asyncio.Task[None]) -> None:
        if (under_way := self._busy.get(key)) is not None and under_way[1] is task:
            del self._busy[key]
        self._task_ended(task)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """A fault of our own would leave a dialogue waiting for ever: those that watch learn of it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
