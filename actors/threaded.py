"""Actors whose loop is their own, so that Ray's thread can wait inside a call."""

from __future__ import annotations

import asyncio
import os
import threading
import traceback
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

from actors.base import MessagingActor
from actors.mailbox import Place

T = TypeVar("T")


class ThreadedActor:
    """A messaging actor that answers Ray's calls one at a time, on a loop in a thread of its own.

    While no call is under way, Ray's own thread looks for signals a hundred times a second: most of what an
    idle actor costs, in each of its processes. While it waits in `watch` it costs nothing. A class with a
    single coroutine among its methods would get a loop of Ray's, so this one has none.
    """

    wrapped: ClassVar[type[MessagingActor]]

    def __init__(self, *args: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._actor = self.wrapped(*args)
        threading.Thread(target=self._run_loop, name="loop", daemon=True).start()

    def _run_loop(self) -> None:
        try:
            self._loop.run_forever()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # whatever ended the loop: without it this actor must not look alive

    def where(self) -> Place:
        """As `MessagingActor.where`."""
        return self._wait_for(self._actor.where())

    def watch(self, known: str = "") -> str:
        """As `MessagingActor.watch`. Other calls wait meanwhile: it returns when no sender is connected."""
        return self._wait_for(self._actor.watch(known))

    def _wait_for(self, answer: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(answer, self._loop).result()


def threaded(actor: type[MessagingActor]) -> type[ThreadedActor]:
    """A class of actors with a thread, for `actor`. Ray shows it by the name of `actor`."""
    return type(actor.__name__, (ThreadedActor,), {"wrapped": actor})
