"""Actors whose loop is their own, so that Ray's thread can wait inside a call."""

from __future__ import annotations

import asyncio
import os
import threading
import traceback
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

from actors.directory import MessagingActor
from actors.mailbox import Place

T = TypeVar("T")


class ThreadedActor:
    """A station as an actor that answers one call at a time, on a loop in a thread of its own.

    While no call is under way, Ray's own thread looks for signals a hundred times a second: most of what an
    idle actor costs, in each of its processes. While it waits in `watch` it costs nothing. A class with a
    single coroutine among its methods would get a loop of Ray's, so this one has none.
    """

    station: ClassVar[type[MessagingActor]]

    def __init__(self, *args: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._station = self.station(*args)
        threading.Thread(target=self._live, name="loop", daemon=True).start()

    def _live(self) -> None:
        try:
            self._loop.run_forever()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # whatever ended the loop: without it this actor must not look alive

    def where(self) -> Place:
        """As the station's own."""
        return self._run(self._station.where())

    def watch(self, known: str = "") -> str:
        """As the station's own. Other calls wait meanwhile: it returns when nobody is connected."""
        return self._run(self._station.watch(known))

    def _run(self, answer: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(answer, self._loop).result()


def threaded(station: type[MessagingActor]) -> type[ThreadedActor]:
    """The seat of a kind of station, by whose name Ray shows the actor."""
    return type(station.__name__, (ThreadedActor,), {"station": station})
