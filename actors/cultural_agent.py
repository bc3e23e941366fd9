"""The actor that speaks for one culture. Keeps nothing that must survive."""

from __future__ import annotations

from actors.worker import Work, Worker
from culturepark.dialogue.speaker import CulturalSpeaker
from culturepark.messages import Ask, CallFailed, Refine, encode


class CulturalAgent(Worker):
    """Answers asks; each answer is posted to the moderator."""

    def open(self) -> Work:
        """The speaker, answering. Raises ConfigError."""
        context, log, plan = self.context, self.log, self.context.plan
        speaker = CulturalSpeaker(
            plan, context.settings, context.chat("speaker", log), context.profile("speaker")
        )
        moderator = self.outbox("moderator")

        async def answer(ask: Ask | Refine) -> None:
            assert isinstance(ask, Ask)  # no whole dialogues are sent to an agent
            try:
                answer = await speaker.speak(ask)
            except Exception as error:
                # Our own fault must not leave a dialogue waiting for ever.
                log.exception("agent_error", dialogue=plan.brief(ask.number).id, turn=ask.turn)
                what = f"{type(error).__name__}: {error}"
                answer = CallFailed(ask.number, ask.term, ask.turn, "internal", what)
            if isinstance(answer, CallFailed):
                log.warning(
                    "turn_failed",
                    dialogue=plan.brief(ask.number).id,
                    turn=ask.turn,
                    kind=answer.kind,
                    reason=answer.reason,
                )
            moderator.post(encode(answer))

        return answer
