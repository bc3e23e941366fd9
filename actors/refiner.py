"""The actor that refines dialogues and posts their outcomes to the collector."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import structlog

from actors.worker import Work, Worker
from culturepark.messages import Ask, CallFailed, Outcome, Refine, Step, encode, outcome_stored, with_speaker
from culturepark.plan import Plan
from culturepark.prompts.profile import sampling_with
from culturepark.refine.journal import Journal
from culturepark.refine.pipeline import RefineError, Refiner, RoleModel
from culturepark.settings import Role

_ROLES: tuple[Role, ...] = ("extractor", "verifier", "rewriter")


class RefinerActor(Worker):
    """Refines whole dialogues; tells the moderator of each one that is on disk."""

    def open(self) -> Work:
        """The refiner, refining. Raises ConfigError."""
        context, log = self.context, self.log
        roles: dict[str, RoleModel] = {}
        for role in _ROLES:
            profile = context.profile(role)
            sampling = sampling_with(profile.sampling(role), context.settings, role)
            roles[role] = RoleModel(context.chat(role, log), profile, sampling)
        settings = context.settings
        paid = settings.models[settings.roles.embedder].engine == "openai"
        refiner = Refiner(settings.refine, roles, context.embedder(log), paid_vectors=paid)
        moderator = self.outbox("moderator")
        steps: dict[int, asyncio.Future[None]] = {}
        """Steps that are not on disk yet, by their sequence numbers in the collector's outbox."""

        def on_disk(first: int, records: list[bytes]) -> None:
            """The collector has these on disk: go on with what waits for a step, or tell the moderator."""
            for number, record in enumerate(records, first):
                if step := steps.pop(number, None):
                    if not step.done():
                        step.set_result(None)
                else:
                    moderator.post(encode(outcome_stored(record)))

        self.connected("collector", False)
        collector = self.outbox(
            "collector", on_acknowledged=on_disk, on_connection=partial(self.connected, "collector")
        )

        def keep(step: Step) -> asyncio.Future[None]:
            kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            steps[collector.post(encode(step))] = kept
            return kept

        async def refine(message: Ask | Refine) -> None:
            assert isinstance(message, Refine)  # nothing else is sent to a refiner
            journal = Journal(message.number, message.steps, keep)
            outcome = await _outcome(refiner, context.plan, message, journal, log)
            (moderator if isinstance(outcome, CallFailed) else collector).post(encode(outcome))

        return refine


async def _outcome(
    refiner: Refiner, plan: Plan, message: Refine, journal: Journal, log: structlog.stdlib.BoundLogger
) -> Outcome | CallFailed:
    brief = plan.brief(message.number)
    try:
        refined = await refiner.refine(brief, message.turns, journal)
    except RefineError as error:
        cause = error.cause
        log.warning("refinement_failed", dialogue=brief.id, kind=cause.kind, reason=cause.reason)
        reason = f"in refinement: {cause.reason}"
        return CallFailed(message.number, message.term, 0, cause.kind, reason, error.usage)
    except Exception as error:
        # Our own fault must not leave a dialogue waiting for ever.
        log.exception("refiner_error", dialogue=brief.id)
        reason = f"in refinement: {type(error).__name__}: {error}"
        return CallFailed(message.number, message.term, 0, "internal", reason, journal.usage)
    log.info(
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
        usage=with_speaker(refined.usage, message.turns),
        notes=refined.notes,
        started_s=message.started_s,
        ended_s=time.time(),
    )
