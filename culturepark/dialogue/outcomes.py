"""The outcome of a dialogue, finished or failed, with the usage of all of its calls."""

from __future__ import annotations

from collections.abc import Mapping

from culturepark.dialogue.slots import Slot
from culturepark.messages import CallFailed, Outcome, Step, bare_usage, only_usage, with_speaker
from culturepark.usage import Usage, add


def finished(number: int, slot: Slot, now_s: float) -> Outcome:
    """The outcome of a complete dialogue that is not refined."""
    return _outcome(number, slot, now_s, bare_usage(slot.steps))


def failed(slot: Slot, failure: CallFailed, now_s: float) -> Outcome:
    """The outcome of a dialogue whose call failed. A refiner has counted its calls before that one itself."""
    usage = failure.usage
    if failure.turn:
        usage = add(usage, bare_usage(slot.steps))
    return _outcome(failure.number, slot, now_s, usage, failure.kind, failure.reason)


def usage_of(failure: CallFailed) -> list[Step]:
    """Records of the usage of a failed call whose dialogue may stay owed. A refiner has stored its own."""
    if not failure.turn:
        return []
    key = b"lost" + failure.term.to_bytes(8, "big") + failure.turn.to_bytes(4, "big")
    return only_usage(failure.number, failure.usage, key)


def _outcome(
    number: int, slot: Slot, now_s: float, usage: Mapping[str, Usage], kind: str = "", reason: str = ""
) -> Outcome:
    turns = slot.dialogue.turns
    return Outcome(
        number=number,
        turns=turns,
        usage=with_speaker(usage, turns),
        failed=kind,
        reason=reason,
        started_s=slot.started_s,
        ended_s=now_s,
    )
