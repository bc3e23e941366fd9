"""The actor that refines dialogues and hands their outcomes to the collector."""

from __future__ import annotations

import asyncio
import time

from actors.directory import Directory
from actors.inputs import Inputs
from culturepark.agent import sampling_with
from culturepark.messages import (
    Balked,
    Outcome,
    Recorded,
    Refine,
    decode,
    decode_outcome,
    encode,
    speaker_usage,
    unpack,
)
from culturepark.refine.pipeline import RefineError, Refiner, RoleModel
from culturepark.settings import Role

_ROLES: tuple[Role, ...] = ("extractor", "verifier", "rewriter")


class RefinerActor:
    """Takes whole dialogues; tells the moderator of each one that is on disk."""

    def __init__(self, inputs: bytes, address: str, namespace: str) -> None:
        given = Inputs.from_bytes(inputs)
        self._log = given.logger(address.replace("/", "-"))
        self._plan = given.plan
        self._directory = Directory(namespace)
        self._busy: set[tuple[int, int]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        roles: dict[str, RoleModel] = {}
        for role in _ROLES:
            profile = given.profile(role)
            sampling = sampling_with(profile.sampling(role), given.settings, role)
            roles[role] = RoleModel(given.chat(role, self._log), profile, sampling)
        self._refiner = Refiner(given.settings.refine, roles, given.embedder(self._log))

    async def receive(self, batch: bytes) -> None:
        """Take a batch of dialogues; one that is under way already is not begun again."""
        for raw in unpack(batch):
            message = decode(raw)
            assert isinstance(message, Refine)  # nothing else is sent to a refiner
            key = (message.number, message.take)
            if key not in self._busy:
                self._busy.add(key)
                task = asyncio.create_task(self._refine(message, key))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def watch(self) -> None:
        """Return never: a caller that waits for this learns at once when the actor is gone."""
        await asyncio.Event().wait()

    async def _refine(self, message: Refine, key: tuple[int, int]) -> None:
        try:
            outcome = await self._outcome(message)
        finally:
            self._busy.discard(key)
        if isinstance(outcome, Balked):
            self._directory.mailbox("moderator").post(encode(outcome))
        else:
            box = self._directory.mailbox("collector", on_taken=self._taken, on_failure=self._failed)
            box.post(encode(outcome))

    async def _outcome(self, message: Refine) -> Outcome | Balked:
        brief = self._plan.brief(message.number)
        spoken = {"speaker": speaker_usage(message.turns)}
        failed, reason = "", ""
        try:
            refined = await self._refiner.refine(brief, message.turns)
        except RefineError as error:
            self._log.warning(
                "refinement_failed", dialogue=brief.id, kind=error.cause.kind, reason=error.cause.reason
            )
            if error.cause.stops_run:
                return Balked(message.number, message.take, 0, error.cause.kind, error.cause.reason)
            failed, reason, usage = error.cause.kind, f"in refinement: {error.cause.reason}", error.usage
            opinions, notes = (), ()
        except Exception as error:
            # Our own fault must not leave a dialogue waiting for ever.
            self._log.exception("refiner_error", dialogue=brief.id)
            failed, reason, usage = "internal", f"in refinement: {type(error).__name__}: {error}", {}
            opinions, notes = (), ()
        else:
            opinions, usage, notes = refined.opinions, refined.usage, refined.notes
            self._log.info(
                "dialogue_refined",
                dialogue=brief.id,
                extracted=len(opinions),
                candidates=sum(not o.rejected for o in opinions),
                rewritten=sum(o.rewritten for o in opinions),
            )
        return Outcome(
            number=message.number,
            turns=message.turns,
            opinions=opinions,
            usage=spoken | usage,
            failed=failed,
            reason=reason,
            notes=notes,
            started_s=message.started_s,
            ended_s=time.time(),
        )

    def _failed(self, error: BaseException) -> None:
        """The collector cannot write. It tells the driver, which ends the run; the work stays owed."""
        self._log.error("not_recorded", error=f"{type(error).__name__}: {error}"[:500])

    def _taken(self, batch: list[bytes]) -> None:
        """The collector has these on disk: tell the moderator."""
        moderator = self._directory.mailbox("moderator")
        for raw in batch:
            outcome = decode_outcome(raw)
            moderator.post(encode(Recorded(outcome.number, outcome.failed)))
