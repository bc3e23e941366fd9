"""Where actors find each other: by address, through Ray's names, so that a restart changes nothing."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray

from actors.mailbox import Mailbox


class Directory:
    """Addresses are actor names within the run's namespace. Each process has its own."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._mailboxes: dict[str, Mailbox] = {}

    def handle(self, address: str) -> Any:
        """The actor at an address. Raises ValueError if there is none."""
        return ray.get_actor(address, namespace=self.namespace)

    def mailbox(self, address: str, **options: Any) -> Mailbox:
        """The one mailbox of this process to an address; `options` count when it is made."""
        if address not in self._mailboxes:
            handle = self.handle(address)

            async def send(batch: bytes) -> None:
                await handle.receive.remote(batch)

            options.setdefault("on_failure", lambda error: leave(f"mailbox to {address}: {error}"))
            self._mailboxes[address] = Mailbox(send, **options)
        return self._mailboxes[address]


def leave(reason: str) -> None:
    """End this actor's process: its owner restarts it, and what it held is asked again.

    For faults that leave the actor unable to do its work, so that it does not look alive.
    """
    print(f"culturepark: leaving: {reason}", flush=True)
    asyncio.get_running_loop().call_later(0.2, os._exit, 1)
