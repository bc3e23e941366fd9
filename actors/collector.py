"""The only writer: log, shards, manifest, and what is made of them when the run ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import structlog

from actors.base import MessagingActor
from actors.run_context import PackedContext, RunContext
from culturepark.errors import CultureParkError, RunDirError
from culturepark.limits.budget import Budget
from culturepark.messages import Outcome, Spent, encode, encode_in_progress, unpack_raw
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.publish import publish
from culturepark.training.jobs import trainable_cultures

_PREDECESSOR_S = 20.0
"""Seconds to wait for a predecessor that is just ending to release the lock of the run directory."""


class Collector(MessagingActor):
    """Receives outcomes, turns and calls; a frame is acknowledged when they are on disk.

    Frames that come while one is being synced share the next sync, so the slower the disk, the more
    of them share an fsync (group commit).
    """

    def __init__(self, packed: PackedContext, credentials: tuple[str, str], trainer: Any = None) -> None:
        super().__init__(credentials)
        self._trainer = trainer
        self._trained: set[str] = set()
        # Nothing here can fail: an error in a constructor would reach no user in words.
        self._context = RunContext.unpacked(packed)
        self._run = self._context.run
        self._limited = Budget(self._context.settings).limited
        self._waiting: list[tuple[list[msgspec.Raw], asyncio.Future[None]]] = []
        self._writing = asyncio.Lock()
        self._unwritable: CultureParkError | None = None
        self._writer: asyncio.Task[None] | None = None
        self._lock: RunLock | None = None
        self._finished = False
        self._ledger: Ledger
        self._log: structlog.stdlib.BoundLogger

    async def begin(self, term: int) -> tuple[bytes, bytes, bytes]:
        """One bit a dialogue of the plan, set for those that have ended; what is on disk of others; and
        what was spent.

        Turns of this term (the moderator's incarnation number) count from now on. Raises RunDirError.
        """
        async with self._writing:
            await asyncio.to_thread(self._open)
            in_progress = await asyncio.to_thread(self._ledger.begin, term)
            return self._ledger.done(), encode_in_progress(in_progress), encode(Spent(self._ledger.spent()))

    async def in_progress(self, numbers: list[int]) -> bytes:
        """What is on disk of these dialogues, as far as they have not ended."""
        async with self._writing:
            await asyncio.to_thread(self._open)
            return encode_in_progress(await asyncio.to_thread(self._ledger.in_progress, numbers))

    def receive(self, payload: bytes) -> asyncio.Future[None]:
        """Queue records; the future is done when they are durable."""
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((unpack_raw(payload), durable))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all())
        return durable

    async def status(self) -> dict[str, Any]:
        """The funnel of each culture, what was set aside, and what went wrong, if anything did."""
        if self._lock is None:
            async with self._writing:
                await asyncio.to_thread(self._open)
        return {
            "funnels": {culture: dict(funnel) for culture, funnel in self._ledger.funnels.items()},
            "underway": dict(self._ledger.underway),
            "set_aside": self._ledger.report.set_aside,
            "replayed": self._ledger.report.replayed,
            "failure": self._unwritable,
        }

    async def finish(self) -> None:
        """Seal, publish the datasets, the card and the summary, and release the directory.

        Calling it again does nothing: the answer to the first call can be lost.
        """
        async with self._writing:
            await asyncio.to_thread(self._finish)

    def _open(self) -> None:
        """Become the writer and recover, once."""
        if self._lock is not None:
            return
        lock = RunLock.acquire(Path(self._context.root), _PREDECESSOR_S)
        self._log = self._context.logger("collector")
        try:
            self._ledger = Ledger(self._run, lock)
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        report = self._ledger.report
        self._log.info(
            "opened", sealed_cells=report.sealed, replayed=report.replayed, set_aside=report.set_aside
        )

    def _finish(self) -> None:
        if self._finished:
            return
        self._open()
        self._ledger.close()
        publish(self._run, self._ledger.funnels)
        self._log.info("closed")
        assert self._lock is not None  # it was opened
        self._lock.release()
        self._finished = True

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                async with self._writing:
                    await self._write()
        finally:
            self._writer = None

    async def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            if self._unwritable:
                raise self._unwritable
            outcomes = await asyncio.to_thread(self._append_and_sync, [raws for raws, _ in waiting])
            if self._trainer is not None and outcomes:
                await asyncio.to_thread(self._launch_due)
        except Exception as error:  # whatever it is, the driver has to learn of it
            self._unwritable = failure = _in_words(error, self._context.root)
            for _, durable in waiting:
                durable.cancel()
            if self._lock is not None:
                self._log.error("failed", where=failure.where, what=failure.what)
            return
        for _, durable in waiting:
            durable.set_result(None)
        if self._limited:
            self.outbox("moderator").post(encode(Spent(self._ledger.spent())))
        for outcome in outcomes:
            brief = self._run.plan.brief(outcome.number)
            if outcome.failed:
                self._log.warning(
                    "dialogue_failed", dialogue=brief.id, kind=outcome.failed, reason=outcome.reason
                )
            else:
                self._log.info("dialogue_finished", dialogue=brief.id, turns=len(outcome.turns))

    def _launch_due(self) -> None:
        """Seal what cultures whose dialogues are over have, and have them trained."""
        names = [
            n
            for n in trainable_cultures(self._ledger.funnels, self._run.plan.planned())
            if n not in self._trained
        ]
        if names:
            self._ledger.seal()
            self._trained.update(names)
            self._trainer.train.remote(names)

    def _append_and_sync(self, batches: list[list[msgspec.Raw]]) -> list[Outcome]:
        self._open()
        new = [self._ledger.append(bytes(raw)) for raws in batches for raw in raws]
        self._ledger.sync()
        return [outcome for outcome in new if outcome is not None]


def _in_words(error: Exception, root: str) -> CultureParkError:
    if isinstance(error, CultureParkError):
        return error
    what = f"a record could not be written: {type(error).__name__}: {error}"
    return RunDirError(root, what, "This is a fault of culturepark's own; what was recorded before is safe.")
