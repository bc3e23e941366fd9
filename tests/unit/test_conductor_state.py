"""What a conductor tells of itself: a state that contradicts itself is named; its last events are kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from culturepark.dialogue.event_log import POSTS, EventLog
from culturepark.dialogue.invariants import InvariantViolation
from culturepark.dialogue.slots import COLLECTOR, Post
from culturepark.messages import InProgress, Outcome, OutcomeStored, Refine, Spoke, Step, Turn, TurnStored
from tests import builders
from tests.property.test_conductor import TERM, crowd

# --- the state


def _of_slot(**fields: Any) -> Callable[[Any], None]:
    def corrupt(conductor: Any) -> None:
        slot = conductor._slots[0]
        for name, value in fields.items():
            setattr(slot, name, value(slot) if callable(value) else value)

    return corrupt


def _post(**fields: Any) -> Callable[[Any], Post]:
    return lambda slot: replace(slot.post, **fields)


def _message(**fields: Any) -> Callable[[Any], Post]:
    return lambda slot: replace(slot.post, message=replace(slot.post.message, **fields))


def _dialogue(**fields: Any) -> Callable[[Any], Any]:
    return lambda slot: replace(slot.dialogue, **fields)


def _state(name: str, value: Any) -> Callable[[Any], None]:
    return lambda conductor: setattr(conductor, name, value)


def _in_doubt(outcome: Outcome, number: int = 7) -> Callable[[Any], None]:
    def corrupt(conductor: Any) -> None:
        conductor._doubtful[number] = (replace(conductor._slots[0]), Post(COLLECTOR, outcome))
        conductor._failures_in_a_row = conductor._started = 4

    return corrupt


TOO_MANY = _in_doubt(Outcome(7, (), failed="server"))
BROKEN: dict[str, Callable[[Any], None]] = {
    "dialogue 0: it waits for nothing": _of_slot(post=None),
    "dialogue 0: its Ask goes to agent/korean/0": _of_slot(post=_post(address="agent/korean/0")),
    "dialogue 0: turn 3 is asked for, and 1 is due": _of_slot(post=_message(turn=3)),
    "dialogue 0: its post is of dialogue 5": _of_slot(post=_message(number=5)),
    "dialogue 0: its Ask is of term 1, and this is 77": _of_slot(post=_message(term=1)),
    "dialogue 0: it has ended, and a turn is asked for": _of_slot(dialogue=_dialogue(ended=True)),
    "dialogue 0: turn 2 is in the place of turn 1": _of_slot(dialogue=_dialogue(turns=(Turn(2, 0, "a"),))),
    "dialogue 0: turn 1 is by speaker 1": _of_slot(dialogue=_dialogue(turns=(Turn(1, 1, "a"),))),
    "dialogue 0: it has 0 turns of 99": _of_slot(dialogue=_dialogue(utterances=99)),
    "dialogue 0: it holds a step of another": _of_slot(steps=(Step(4, b"", "verifier"),)),
    "dialogue 0: 0 turns of": _of_slot(post=Post("refiner/0", Refine(0, TERM, (), 0.0))),
    "dialogue 0: it has not ended, and its outcome": _of_slot(
        post=Post(COLLECTOR, Outcome(0, (), failed="x"))
    ),
    "dialogue 0: turn 2 of speaker 1 goes to the disk": _of_slot(
        post=Post(COLLECTOR, Spoke(0, TERM, Turn(2, 1, "a")))
    ),
    "dialogue 0: it has 2 speakers of 1 cultures": _of_slot(cultures=("arabic",)),
    "dialogue 0: it waits for a Step": _of_slot(post=Post(COLLECTOR, Step(0, b"", "verifier"))),
    "dialogue 7: it has failed in doubt, and has not ended": TOO_MANY,
    "dialogue 7: its failure `refused` is in no doubt": _in_doubt(Outcome(7, (), failed="refused")),
    "dialogue 7: what waits in doubt is not its outcome": _in_doubt(Outcome(8, (), failed="server")),
    "dialogues in flight and in doubt: [1]": _in_doubt(Outcome(1, (), failed="server"), 1),
    "3 were started, and 2 have ended or are in flight": lambda conductor: conductor._slots.pop(1),
    "4 have ended: 0 before, 0 finished, 0 failed": _state("_ended", 4),
    "8 had ended, 3 were started, and 10 are planned": _state("_ended_before", 8),
    "still to start: [2]": _state("_in_progress", {2: InProgress(2)}),
    "not planned: [10]": _state("_storing_usage", {10}),
    "dialogues whose call failed, and that go on: [1]": _state("_storing_usage", {1}),
    "it is stopped by `drain` or halted, and has no reason": _state("_stopped_by", "drain"),
    "the breaker did not trip at 99 failures": _state("_failures_in_a_row", 99),
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_state_that_contradicts_itself_is_named(said: str) -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    conductor.validate()
    BROKEN[said](conductor)
    with pytest.raises(InvariantViolation) as raised:
        conductor.validate()
    assert said in str(raised.value)


def test_more_in_flight_than_there_may_be_is_named() -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    conductor._settings = builders.settings(limits={"dialogues_in_flight": 2})
    with pytest.raises(InvariantViolation, match="3 dialogues are in flight, and 2 may be"):
        conductor.validate()


# --- the log of events


def test_the_log_tells_what_came_and_what_followed_without_any_text() -> None:
    _, conductor = crowd()
    conductor.fill(1.0)
    conductor.on(Spoke(0, TERM, Turn(1, 0, "a secret")), 2.0)
    conductor.on(TurnStored(0, TERM, 1), 3.0)
    conductor.on(OutcomeStored(9), 4.0)  # of no dialogue in flight
    conductor.lost("agent/american/0")
    conductor.stop("internal", "a secret, too")
    filled, spoke, stored, other, lost, stopped = conductor.events.records()
    assert [filled["event"], len(filled["posts"])] == ["fill", 3]
    ask, spoken = (
        {"address": "agent/arabic/0", "kind": "Ask", "number": 0, "turn": 2},
        {"address": COLLECTOR, "kind": "Spoke", "number": 0, "turn": 1},
    )
    assert spoke == {"at_s": 2.0, "event": "Spoke", "number": 0, "turn": 1, "posts": [spoken]}
    assert stored["event"] == "TurnStored"
    assert stored["posts"][0] | {"address": ""} == ask | {"address": ""}
    assert other == {"at_s": 4.0, "event": "OutcomeStored", "number": 9, "turn": 0}
    assert (lost["at_s"], lost["detail"], stopped["detail"]) == (None, "agent/american/0", "internal")
    assert "secret" not in repr(list(conductor.events.records()))


def test_the_log_is_bounded_and_keeps_no_message() -> None:
    log = EventLog(most=10)
    turn = Turn(1, 0, "a long text")
    before = sys.getrefcount(turn)
    for number in range(1000):
        log.add(0.0, Spoke(number, TERM, turn), [Post(COLLECTOR, Spoke(number, TERM, turn))] * (number % 50))
    records = list(log.records())
    assert [record["number"] for record in records] == list(range(990, 1000))
    assert (len(records[-1]["posts"]), records[-1]["posts_in_all"]) == (POSTS, 49)
    assert sys.getrefcount(turn) == before


def test_a_message_that_cannot_be_followed_is_the_last_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    monkeypatch.setattr("culturepark.dialogue.conductor.step", None)
    conductor.on(Spoke(0, TERM, Turn(1, 0, "said")), 2.0)
    with pytest.raises(TypeError):
        conductor.on(TurnStored(0, TERM, 1), 3.0)
    *_, last = conductor.events.records()
    assert last == {"at_s": 3.0, "event": "TurnStored", "number": 0, "turn": 1}
