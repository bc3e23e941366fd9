"""The actor that refines dialogues and hands their outcomes to the collector."""

from __future__ import annotations

import asyncio
import time

from actors.directory import Station
from actors.inputs import Inputs
from actors.pulse import pulse
from culturepark.agent import sampling_with
from culturepark.messages import (
    Balked,
    Outcome,
    Refine,
    Shares,
    encode,
    recorded,
    speaker_usage,
    unpack,
)
from culturepark.refine.pipeline import RefineError, Refiner, RoleModel
from culturepark.settings import Role

_ROLES: tuple[Role, ...] = ("extractor", "verifier", "rewriter")


class RefinerActor(Station):
    """Takes whole dialogues; tells the moderator of each one that is on disk."""

    def __init__(self, inputs: bytes, address: str, post: tuple[str, str]) -> None:
        super().__init__(post)
        # Nothing here can fail: an error in a constructor would reach nobody in words.
        self._given = Inputs.from_bytes(inputs)
        self._address = address
        self._plan = self._given.plan
        self._log = self._given.logger(address.replace("/", "-"))
        self._busy: set[tuple[int, int]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened: Refiner | None = None
        self._pulse: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Make the refiner. Raises ConfigError."""
        self._refiner()

    def _refiner(self) -> Refiner:
        """The refiner, made when it is first needed. Raises ConfigError."""
        if self._opened is None:
            given = self._given
            roles: dict[str, RoleModel] = {}
            for role in _ROLES:
                profile = given.profile(role)
                sampling = sampling_with(profile.sampling(role), given.settings, role)
                roles[role] = RoleModel(given.chat(role, self._log), profile, sampling)
            self._opened = Refiner(given.settings.refine, roles, given.embedder(self._log))
            post = self.mailbox("moderator").post
            self._pulse = asyncio.create_task(pulse(self._address, given.endpoints, post))
        return self._opened

    def take(self, payload: bytes) -> None:
        """Take whole dialogues; one that is under way already is not begun again. Raises ConfigError."""
        for message in unpack(payload):
            if isinstance(message, Shares):
                for endpoint in self._given.endpoints:
                    endpoint.obey(message.shares)
                continue
            assert isinstance(message, Refine)  # nothing else is sent to a refiner
            key = (message.number, message.take)
            if key not in self._busy:
                self._busy.add(key)
                task = asyncio.create_task(self._refine(message, key))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _refine(self, message: Refine, key: tuple[int, int]) -> None:
        try:
            outcome = await self._outcome(message)
        finally:
            self._busy.discard(key)
        if isinstance(outcome, Balked):
            self.mailbox("moderator").post(encode(outcome))
        else:
            box = self.mailbox("collector", on_taken=self._taken, on_failure=self._failed)
            box.post(encode(outcome))

    async def _outcome(self, message: Refine) -> Outcome | Balked:
        brief = self._plan.brief(message.number)
        try:
            refined = await self._refiner().refine(brief, message.turns)
        except RefineError as error:
            cause = error.cause
            self._log.warning("refinement_failed", dialogue=brief.id, kind=cause.kind, reason=cause.reason)
            reason = f"in refinement: {cause.reason}"
            return Balked(message.number, message.take, 0, cause.kind, reason, error.usage)
        except Exception as error:
            # Our own fault must not leave a dialogue waiting for ever.
            self._log.exception("refiner_error", dialogue=brief.id)
            reason = f"in refinement: {type(error).__name__}: {error}"
            return Balked(message.number, message.take, 0, "internal", reason)
        self._log.info(
            "dialogue_refined",
            dialogue=brief.id,
            extracted=len(refined.opinions),
            candidates=sum(not o.rejected for o in refined.opinions),
            rewritten=sum(o.rewritten for o in refined.opinions),
        )
        return Outcome(
            number=message.number,
            turns=message.turns,
            opinions=refined.opinions,
            usage={"speaker": speaker_usage(message.turns)} | refined.usage,
            notes=refined.notes,
            started_s=message.started_s,
            ended_s=time.time(),
        )

    def _failed(self, error: BaseException) -> None:
        """The collector cannot write. It tells the driver, which ends the run; the work stays owed."""
        self._log.error("not_recorded", error=f"{type(error).__name__}: {error}"[:500])

    def _taken(self, batch: list[bytes]) -> None:
        """The collector has these on disk: tell the moderator."""
        moderator = self.mailbox("moderator")
        for outcome in batch:
            moderator.post(encode(recorded(outcome)))
