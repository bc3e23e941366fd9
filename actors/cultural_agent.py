"""The actor that speaks for one culture. Keeps nothing that must survive."""

from __future__ import annotations

import asyncio

from actors.directory import Directory
from actors.inputs import Inputs
from culturepark.agent import CulturalSpeaker
from culturepark.messages import Ask, Balked, decode, encode, unpack


class CulturalAgent:
    """Answers asks in batches; each answer goes to the moderator when it is there."""

    def __init__(self, inputs: bytes, address: str, namespace: str) -> None:
        # Nothing here can fail: an error in a constructor would reach nobody in words.
        self._given = Inputs.from_bytes(inputs)
        self._plan = self._given.plan
        self._log = self._given.logger(address.replace("/", "-"))
        self._directory = Directory(namespace)
        self._busy: set[tuple[int, int, int]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened: CulturalSpeaker | None = None

    def _speaker(self) -> CulturalSpeaker:
        """The speaker, made when it is first needed. Raises ConfigError."""
        if self._opened is None:
            given = self._given
            model, profile = given.chat("speaker", self._log), given.profile("speaker")
            self._opened = CulturalSpeaker(given.plan, given.settings, model, profile)
        return self._opened

    async def receive(self, batch: bytes) -> None:
        """Take a batch of asks; an ask that is under way already is not begun again."""
        self._speaker()
        for raw in unpack(batch):
            ask = decode(raw)
            assert isinstance(ask, Ask)  # nothing else is sent to an agent
            key = (ask.number, ask.take, ask.turn)
            if key not in self._busy:
                self._busy.add(key)
                task = asyncio.create_task(self._answer(ask, key))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def watch(self) -> None:
        """Return never: a caller that waits for this learns at once when the actor is gone.

        Raises ConfigError if this actor cannot work.
        """
        self._speaker()
        await asyncio.Event().wait()

    async def _answer(self, ask: Ask, key: tuple[int, int, int]) -> None:
        try:
            answer = await self._speaker().speak(ask)
        except Exception as error:
            # Our own fault must not leave a dialogue waiting for ever.
            self._log.exception("agent_error", dialogue=self._plan.brief(ask.number).id, turn=ask.turn)
            answer = Balked(ask.number, ask.take, ask.turn, "internal", f"{type(error).__name__}: {error}")
        finally:
            self._busy.discard(key)
        if isinstance(answer, Balked):
            dialogue = self._plan.brief(ask.number).id
            self._log.warning(
                "turn_failed", dialogue=dialogue, turn=ask.turn, kind=answer.kind, reason=answer.reason
            )
        self._directory.mailbox("moderator").post(encode(answer))
