"""What agents and refiners have in common: each message is worked on once, many at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from actors.directory import MessagingActor
from actors.load_reports import pulse
from actors.run_context import Handed, RunContext
from culturepark.messages import Ask, Refine, Shares, unpack

_SHARES = "shares"
"""What a moderator that is back says after what it still wants: until then, nobody knows what that is."""

Work = Callable[[Ask | Refine], Coroutine[None, None, None]]
"""Works on one message to its end, and posts what came of it. Never raises."""


class Worker(MessagingActor):
    """An actor that works on asks or on whole dialogues. Keeps nothing that must survive.

    A subclass makes in `open` what does the work.
    """

    def __init__(self, inputs: Handed, address: str, post: tuple[str, str]) -> None:
        super().__init__(post)
        # Nothing here can fail: an error in a constructor would reach nobody in words.
        self.given = RunContext.taken(inputs)
        self.log = self.given.logger(address.replace("/", "-"))
        self._address = address
        self._busy: dict[tuple[int, int], tuple[int, asyncio.Task[None]]] = {}
        self._lost = {"moderator"}
        """Who has to be there before a call is begun, and is not."""
        self._work: Work
        self._pulse: asyncio.Task[None]

    def open(self) -> Work:
        """What does the work. Raises ConfigError."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Open what the work needs. Raises ConfigError."""
        moderator = self.mailbox("moderator", on_link=self._moderated)
        self._work = self.open()
        self._hold()
        beat = pulse(self._address, self.given.endpoints, moderator.post)
        self._pulse = asyncio.create_task(beat)
        self._pulse.add_done_callback(self._noticed)

    def linked(self, address: str, up: bool) -> None:
        """Who takes what comes of the work is there, or is not: then no call is begun, for its reply would
        be lost, and paid for again."""
        (self._lost.discard if up else self._lost.add)(address)
        self._hold()

    def _moderated(self, up: bool) -> None:
        if not up:
            self._lost.add(_SHARES)
        self.linked("moderator", up)

    def _hold(self) -> None:
        for endpoint in self.given.endpoints:
            endpoint.replicas.hold(bool(self._lost))

    def take(self, payload: bytes) -> None:
        """Take messages; one that is under way already is not begun again.

        One of another term is: a new moderator asks, who was told what is on disk, and nobody waits for
        the old one's answer any more.
        """
        busy = self._busy
        for message in unpack(payload):
            if isinstance(message, Shares):
                for endpoint in self.given.endpoints:
                    endpoint.replicas.obey(message.shares)
                    if message.halt:
                        endpoint.halt()
                if _SHARES in self._lost and "moderator" not in self._lost:
                    self.linked(_SHARES, True)
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
        self._noticed(task)

    def _noticed(self, task: asyncio.Task[None]) -> None:
        """A fault of our own would leave a dialogue waiting for ever: whoever watches learns of it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.broke(error)
