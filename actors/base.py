"""The base class of actors that exchange messages: an inbox of its own, and an outbox to each of the others.

Ray's names of actors lead to their inboxes, so a restart, which opens a new inbox, changes no address.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.event_batching import batch_events
from actors.mailbox import Inbox, Outbox, Place
from actors.ray_patches import without_addons
from actors.supervision import RETRY_S, cause_of, leave, never_comes_back

without_addons()  # here, as Ray reads an actor's arguments as soon as it has imported its class

_GC_THRESHOLDS = (20_000, 50, 50)
"""Thresholds of Python's garbage collector in an actor's process, by generation."""
_UNNAMED_S = 30.0
"""Seconds that a name may be unknown to Ray, which registers actors one by one."""


class MessagingActor:
    """What every actor that exchanges messages has. A subclass handles what comes in `receive`."""

    def __init__(self, credentials: tuple[str, str]) -> None:
        """`credentials` are the run's namespace and its token."""
        self._namespace, token = credentials
        self._token = token.encode()
        self._outboxes: dict[str, Outbox] = {}
        self._inbox = Inbox(self.receive, self._token, self.fail)
        self._prepared = False
        self._incarnation = secrets.token_hex(8)
        self._failure: BaseException | None = None

    def prepare(self) -> None:
        """Make what the work needs, so that the first message does not wait for it. Raises ConfigError."""

    def receive(self, payload: bytes) -> asyncio.Future[None] | None:
        """Handle the messages of a frame; a future says when they are handled, None that they are."""
        raise NotImplementedError

    async def where(self) -> Place:
        """Host and port of the inbox, which opens when this is first asked.

        Raises ConfigError if this actor cannot work.
        """
        if not self._prepared:
            self.prepare()
            _tune_process()
            self._prepared = True
        return await self._inbox.open(ray.util.get_node_ip_address())

    async def watch(self, known: str = "") -> str:
        """The id of this actor's incarnation. If it is the one that is `known`, this returns only once no
        sender is connected (long polling): a caller that waits for it learns at once when the actor is gone.

        Raises what keeps this actor from its work.
        """
        if self._failure is None and known == self._incarnation:
            await self._inbox.no_senders.wait()
        if self._failure is not None:
            raise self._failure
        return self._incarnation

    def fail(self, error: BaseException) -> None:
        """Tell those that watch that this actor cannot work."""
        self._failure = self._failure or error
        self._inbox.no_senders.set()

    def handle(self, address: str) -> Any:
        """The actor at an address. Raises ValueError if there is none."""
        return ray.get_actor(address, namespace=self._namespace)

    def outbox(self, address: str, **options: Any) -> Outbox:
        """The one outbox of this process to an address; `options` count when it is made."""
        box = self._outboxes.get(address)
        if box is None:
            options.setdefault("on_failure", lambda error: leave(f"outbox to {address}: {error}"))
            box = Outbox(lambda: self._find(address), self._token, **options)
            self._outboxes[address] = box
        return box

    async def _find(self, address: str) -> Place:
        """Where an actor's inbox is, once it has one. Raises what keeps it from ever having one."""
        deadline = time.monotonic() + _UNNAMED_S
        while True:
            try:
                place: Place = await self.handle(address).where.remote()
            except RayTaskError as error:
                raise cause_of(error) from error
            except RayActorError as error:
                if never_comes_back(error):
                    raise
            except ValueError:
                if time.monotonic() > deadline:
                    raise
            else:
                return place
            await asyncio.sleep(RETRY_S)  # it died or is starting again; Ray restarts it


def _tune_process() -> None:
    """Let the garbage collector pass over what stays for good, and run seldom; let the loop batch events.

    Thousands of calls under way are many young objects that hold no cycles: with Python's own
    thresholds a third of an agent's CPU time goes into looking at them again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    batch_events(asyncio.get_running_loop())
