"""Where actors find each other: Ray's names lead to their doors, so that a restart changes nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.event_batching import rest_between_events
from actors.mailbox import Inbox, Outbox, Place
from actors.ray_patches import without_addons
from culturepark.errors import CultureParkError

without_addons()  # here, as Ray reads an actor's arguments as soon as it has imported its class

_AGAIN_S = 0.1
_GC_THRESHOLDS = (20_000, 50, 50)
_NAMELESS_S = 30.0
"""How long a name may be unknown to Ray: it registers actors one by one."""


class MessagingActor:
    """What every actor that takes messages has: a door, and mailboxes to the others.

    A subclass takes the payloads of frames in `take`.
    """

    def __init__(self, post: tuple[str, str]) -> None:
        """`post` is the run's namespace and its token."""
        self._namespace, token = post
        self._token = token.encode()
        self._mailboxes: dict[str, Outbox] = {}
        self._door = Inbox(self.take, self._token, self.broke)
        self._settled = False
        self._life = secrets.token_hex(8)
        self._failure: BaseException | None = None

    def prepare(self) -> None:
        """Make what the work needs, so that the first message does not wait for it. Raises ConfigError."""

    def take(self, payload: bytes) -> asyncio.Future[None] | None:
        """Take the messages of a frame; a future says when they are taken, None that they are."""
        raise NotImplementedError

    async def where(self) -> Place:
        """Host and port of the door, which opens when this is first asked.

        Raises ConfigError if this actor cannot work.
        """
        if not self._settled:
            self.prepare()
            _settle()
            self._settled = True
        return await self._door.open(ray.util.get_node_ip_address())

    async def watch(self, known: str = "") -> str:
        """Which life of this actor this is. If it is the one that is `known`, this returns only once nobody
        is connected to the door: a caller that waits for it learns at once when the actor is gone.

        Raises what keeps this actor from its work.
        """
        if self._failure is None and known == self._life:
            await self._door.deserted.wait()
        if self._failure is not None:
            raise self._failure
        return self._life

    def broke(self, error: BaseException) -> None:
        """Tell those who watch that this actor cannot work."""
        self._failure = self._failure or error
        self._door.deserted.set()

    def handle(self, address: str) -> Any:
        """The actor at an address. Raises ValueError if there is none."""
        return ray.get_actor(address, namespace=self._namespace)

    def mailbox(self, address: str, **options: Any) -> Outbox:
        """The one mailbox of this process to an address; `options` count when it is made."""
        box = self._mailboxes.get(address)
        if box is None:
            options.setdefault("on_failure", lambda error: leave(f"mailbox to {address}: {error}"))
            box = Outbox(lambda: self._find(address), self._token, **options)
            self._mailboxes[address] = box
        return box

    async def _find(self, address: str) -> Place:
        """Where an actor's door is, once it has one. Raises what keeps it from ever having one."""
        deadline = time.monotonic() + _NAMELESS_S
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
            await asyncio.sleep(_AGAIN_S)  # it died or is starting again; Ray restarts it


def _settle() -> None:
    """Spare the collector of cycles what stays for good, and let it run seldom.

    Thousands of calls under way are many young objects that hold no cycles: with Python's own
    thresholds a third of an agent's CPU time goes into looking at them again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    rest_between_events(asyncio.get_running_loop())


async def losses(handle: Any) -> AsyncIterator[str]:
    """Each time an actor is found to have another life than before: why the last one ended, as Ray tells it.

    Lives are compared, so one that began, took messages and ended between two looks is not missed. Raises
    what keeps the actor from its work.
    """
    known = why = ""
    while True:
        try:
            life: str = await handle.watch.remote(known)
        except RayTaskError as error:
            raise cause_of(error) from error
        except RayActorError as error:
            if never_comes_back(error):
                raise
            why = str(error)
            await asyncio.sleep(_AGAIN_S)
        else:
            if life == known:  # nobody is connected, and it must not be kept from telling where it is
                await asyncio.sleep(_AGAIN_S)
            elif known or why:
                yield why
            known, why = life, ""


def never_comes_back(error: RayActorError) -> bool:
    """Whether an actor failed in its constructor, which Ray does not try again."""
    return "creation task" in str(error)


def cause_of(error: BaseException) -> BaseException:
    """The error that an actor raised, out of Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, CultureParkError) else error


def leave(reason: str) -> None:
    """End this actor's process: its owner restarts it, and what it held is asked again.

    For faults that leave the actor unable to do its work, so that it does not look alive.
    """
    print(f"culturepark: leaving: {reason}", flush=True)
    asyncio.get_running_loop().call_later(0.2, os._exit, 1)
