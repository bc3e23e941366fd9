"""The actor that speaks for one culture. Keeps nothing that must survive."""

from __future__ import annotations

import asyncio

from actors.directory import Station
from actors.inputs import Inputs
from actors.pulse import pulse
from culturepark.agent import CulturalSpeaker
from culturepark.messages import Ask, Balked, Shares, encode, unpack


class CulturalAgent(Station):
    """Answers asks in batches; each answer goes to the moderator when it is there."""

    def __init__(self, inputs: bytes, address: str, post: tuple[str, str]) -> None:
        super().__init__(post)
        # Nothing here can fail: an error in a constructor would reach nobody in words.
        self._given = Inputs.from_bytes(inputs)
        self._address = address
        self._plan = self._given.plan
        self._log = self._given.logger(address.replace("/", "-"))
        self._busy: set[tuple[int, int, int]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened: CulturalSpeaker | None = None
        self._pulse: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Make the speaker. Raises ConfigError."""
        self._speaker()

    def _speaker(self) -> CulturalSpeaker:
        """The speaker, made when it is first needed. Raises ConfigError."""
        if self._opened is None:
            given = self._given
            model, profile = given.chat("speaker", self._log), given.profile("speaker")
            self._opened = CulturalSpeaker(given.plan, given.settings, model, profile)
            post = self.mailbox("moderator").post
            self._pulse = asyncio.create_task(pulse(self._address, given.endpoints, post))
        return self._opened

    def take(self, payload: bytes) -> None:
        """Take asks; one that is under way already is not begun again. Raises ConfigError."""
        for ask in unpack(payload):
            if isinstance(ask, Shares):
                for endpoint in self._given.endpoints:
                    endpoint.obey(ask.shares)
                continue
            assert isinstance(ask, Ask)  # nothing else is sent to an agent
            key = (ask.number, ask.take, ask.turn)
            if key not in self._busy:
                self._busy.add(key)
                task = asyncio.create_task(self._answer(ask, key))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

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
        self.mailbox("moderator").post(encode(answer))
