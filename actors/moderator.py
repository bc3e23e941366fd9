"""The actor that conducts the dialogues: feeds messages to the conductor and posts what follows."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from ray.exceptions import RayActorError, RayTaskError

from actors.base import MessagingActor
from actors.mailbox import Outbox
from actors.run_context import PackedContext, RunContext
from actors.supervision import cause_of, leave, losses, never_comes_back
from culturepark.dialogue.conductor import Conductor
from culturepark.dialogue.invariants import InvariantViolation
from culturepark.dialogue.slots import COLLECTOR, REFINERS, Post
from culturepark.errors import RunDirError
from culturepark.limits.budget import Budget
from culturepark.limits.coordinator import Coordinator, known_limits
from culturepark.messages import (
    InProgress,
    LoadReport,
    Message,
    Shares,
    Spent,
    decode,
    decode_in_progress,
    encode,
    stored,
    unpack,
)
from culturepark.store.files import REAL, Files, write_view

_SETTLED_S = 3.0
"""Seconds without a call under way after which all that came in is sure to be on disk: a few times the
interval at which load reports come without news, too."""

_VALIDATE_S = 10.0
"""Seconds between two checks of the conductor's state, which reads all dialogues in flight."""
EVENTS_FILE = "conductor-events.jsonl"
"""The file in `logs/` that a run which ends with an internal error leaves, for debugging."""
_FRAMES = 20
"""Frames of a traceback that are written there, the innermost ones."""


class Moderator(MessagingActor):
    """Conducts all dialogues of a run. Restarted, it asks the collector what is done and goes on."""

    def __init__(self, packed: PackedContext, credentials: tuple[str, str], replicas: dict[str, int]) -> None:
        super().__init__(credentials)
        context = RunContext.unpacked(packed)
        self._context = context
        self._log = context.logger("moderator")
        self._replicas = replicas
        self._limits = Coordinator(context.settings.limits, known_limits(context.settings.models.values()))
        self._conductor: Conductor | None = None
        self._starting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining_since: float | None = None
        self._budget = Budget(context.settings)
        self._halted_since: float | None = None
        self._quiet_since = 0.0
        self._validate_at = 0.0

    async def start(self) -> None:
        """Begin, or begin again after a restart. Calling it again does nothing."""
        async with self._starting:
            if self._conductor is not None:
                return
            remove_events(Path(self._context.root))
            term = secrets.randbits(48)
            ended, underway, spent = await self._of_collector("begin", term)
            in_progress = decode_in_progress(underway)
            plan, settings = self._context.plan, self._context.settings
            conductor = Conductor(plan, settings, ended, term, self._replicas, in_progress)
            for address in self._addresses():
                # `MessagingActor.watch` waits for a loss only while a sender is connected.
                self._outbox(address)
                task = asyncio.create_task(self._watch(address))
                self._tasks.add(task)
                task.add_done_callback(self._task_ended)
            self._conductor = conductor
            progress = conductor.progress()
            self._log.info(
                "started", planned=progress.planned, ended=progress.ended, begun=len(in_progress), take=term
            )
            self._spent(decode(spent))
            with self._noticing():
                self._send(conductor.fill(time.time()))

    def receive(self, payload: bytes) -> None:
        """Handle answers. After a restart, answers to a predecessor change nothing."""
        if self._conductor is None:
            return
        now = time.time()
        for message in unpack(payload):
            if isinstance(message, LoadReport):
                shares = self._limits.update(message.address, message.seen, time.monotonic())
                self._tell(message.address, Shares(shares, self._halted_since is not None))
            elif isinstance(message, Spent):
                self._spent(message)
            else:
                self._send(self._conductor.on(message, now))

    def _tell(self, address: str, shares: Shares) -> None:
        self._outbox(address).post(encode(shares))

    def _outbox(self, address: str) -> Outbox:
        on_acknowledged = self._acknowledged if address == COLLECTOR else None
        return self.outbox(address, on_acknowledged=on_acknowledged, on_failure=self.fail)

    def _spent(self, message: Message) -> None:
        """Stop all calls once the budget is reached."""
        assert isinstance(message, Spent)
        assert self._conductor is not None  # start made it
        if self._halted_since is not None:
            return
        if reason := self._budget.reached(message.usage, self._in_flight()):
            self._log.warning("budget_reached", reason=reason)
            self._conductor.halt("budget", reason)
            self._halted_since = self._quiet_since = time.monotonic()
            for address in self._addresses():
                self._tell(address, Shares((), halt=True))

    def _in_flight(self) -> int:
        return sum(one["in_flight"] for one in self._limits.view())

    def _abandon_late(self) -> None:
        """Abandon what will not end: dialogues that a drain left too long, or that a budget holds back
        once all their calls have come in and are on disk."""
        assert self._conductor is not None  # start made it
        now, limits = time.monotonic(), self._context.settings.limits
        late = self._draining_since is not None and now - self._draining_since > limits.drain_s
        if self._halted_since is not None:
            if self._in_flight():
                self._quiet_since = now
            # A call that was begun at the last moment may last its whole deadline, and its count is owed.
            most_s = limits.deadline_s + _SETTLED_S
            late |= now - self._quiet_since > _SETTLED_S or now - self._halted_since > most_s
        if late and (numbers := self._conductor.abandon()):
            self._log.warning("abandoned", dialogues=len(numbers))

    async def status(self) -> dict[str, Any]:
        """Where the run stands; begins the run if this process has not yet."""
        await self.start()
        assert self._conductor is not None  # start made it
        self._abandon_late()
        progress = self._conductor.progress()
        self._validate(now=progress.idle)
        return {
            "progress": msgspec.to_builtins(progress),
            "idle": progress.idle,
            "failure": self._failure,
            "endpoints": self._limits.view(),
        }

    async def drain(self, by: str, reason: str) -> None:
        """Start no more dialogues; abandon those that do not end in time."""
        await self.start()
        assert self._conductor is not None  # start made it
        self._log.info("draining", by=by, reason=reason)
        self._conductor.stop(by, reason)
        self._draining_since = self._draining_since or time.monotonic()

    def _addresses(self) -> list[str]:
        agents = [
            f"agent/{culture}/{i}"
            for culture, count in self._replicas.items()
            if culture != REFINERS
            for i in range(count)
        ]
        return [*agents, *(f"refiner/{i}" for i in range(self._replicas[REFINERS]))]

    def _send(self, posts: list[Post]) -> None:
        for post in posts:
            self._outbox(post.address).post(encode(post.message))

    def _acknowledged(self, first: int, records: list[bytes]) -> None:
        """The collector has these on disk."""
        assert self._conductor is not None  # nothing was posted before
        now = time.time()
        with self._noticing():  # the outbox would lose an error, and the run would wait for ever
            for record in records:
                self._send(self._conductor.on(stored(record), now))

    async def _watch(self, address: str) -> None:
        """Ask again what an actor was asked, each time it is lost."""
        async for why in losses(self.handle(address)):
            assert self._conductor is not None  # start made it
            paid = await self._paid_for(address) if address.startswith("refiner/") else []
            posts = self._conductor.lost(address, paid)
            self._log.warning("actor_lost", address=address, asked_again=len(posts), why=why[:200])
            self._send(posts)

    async def _paid_for(self, address: str) -> list[InProgress]:
        """Which calls for the dialogues that wait for this actor are on disk."""
        assert self._conductor is not None  # start made it
        return decode_in_progress(await self._of_collector("in_progress", self._conductor.held_by(address)))

    async def _of_collector(self, method: str, *given: Any) -> Any:
        """What the collector answers, also when it is only being restarted. Raises RunDirError."""
        while True:
            try:
                return await getattr(self.handle("collector"), method).remote(*given)
            except RayTaskError as error:
                raise cause_of(error) from error
            except RayActorError as error:
                if never_comes_back(error):
                    raise
                await asyncio.sleep(0.2)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.fail(error)

    def _validate(self, now: bool) -> None:
        """Check the conductor's state every so often, or now. What contradicts itself ends the run."""
        assert self._conductor is not None  # start made it
        if self._failure is None and (now or time.monotonic() >= self._validate_at):
            self._validate_at = time.monotonic() + _VALIDATE_S
            try:
                self._conductor.validate()
            except InvariantViolation as error:
                self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Note what cannot be mended here: the driver reads it and ends the run."""
        first, self._failure = self._failure is None, self._failure or error
        self._log.error("failed", error=f"{type(error).__name__}: {error}"[:500])
        if self._conductor is None:
            leave(str(error))
            return
        self._conductor.stop("internal", str(error))
        if first:
            write_events(Path(self._context.root), self._conductor, error)


def write_events(root: Path, conductor: Conductor, error: BaseException, files: Files = REAL) -> None:
    """Write what the conductor saw last to `logs/conductor-events.jsonl`, for debugging.

    A line on the failure and the state, then one line for each event, oldest first. None of them holds a word
    of a model or of an error's message, which may quote one. A node that does not see the run directory, or a
    full disk, leaves no file.
    """
    progress = msgspec.to_builtins(conductor.progress())
    del progress["stopped"]  # in words, which may be an endpoint's
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    head = {
        "error": type(error).__name__,
        "where": [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames],
        "broken": _broken(conductor),
        "progress": progress,
    }
    lines = b"".join(msgspec.json.encode(one) + b"\n" for one in (head, *conductor.events.records()))
    path = root / "logs" / EVENTS_FILE
    with contextlib.suppress(OSError, RunDirError):
        with contextlib.suppress(FileExistsError):
            files.mkdir(path.parent)  # the run directory is not made anew, should this node not see it
        write_view(path, lines, files)


def remove_events(root: Path, files: Files = REAL) -> None:
    """Remove the file of an earlier failure, which says nothing of the run that goes on."""
    with contextlib.suppress(OSError):
        files.remove(root / "logs" / EVENTS_FILE)


def _broken(conductor: Conductor) -> str:
    """What does not hold of the conductor's state; empty if nothing is found."""
    try:
        conductor.validate()
    except InvariantViolation as violation:
        return str(violation)
    except Exception as error:  # whatever the state is, the events are to be written
        return f"its state cannot be checked: {type(error).__name__}"
    return ""
