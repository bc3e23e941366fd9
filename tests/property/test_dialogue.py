"""Whatever events come in whatever order, a dialogue's turns are consecutive and it ends once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from culturepark.dialogue.state import (
    Begin,
    Dialogue,
    Event,
    Fail,
    Finish,
    RequestTurn,
    TurnArrived,
    TurnFailed,
    step,
)
from culturepark.messages import Turn

turns = st.builds(Turn, number=st.integers(0, 7), speaker=st.integers(0, 1), text=st.sampled_from("abc"))
events = st.one_of(
    st.just(Begin()),
    st.builds(TurnArrived, turns),
    st.builds(TurnFailed, st.integers(0, 7), st.just("timeout"), st.just("late")),
)


@given(st.lists(events, max_size=40), st.integers(1, 6), st.integers(1, 2))
def test_whatever_comes_the_rules_hold(sequence: list[Event], utterances: int, speakers: int) -> None:
    state = Dialogue(utterances, speakers)
    ends = 0
    for event in sequence:
        before = state
        state, effect = step(state, event)
        ends += isinstance(effect, Finish | Fail)
        assert state.turns[: len(before.turns)] == before.turns
        if before.ended:
            assert (state, effect) == (before, None)
        if isinstance(effect, RequestTurn):
            assert effect.turn == len(state.turns) + 1 <= utterances
            assert effect.speaker == (effect.turn - 1) % speakers
            assert effect.heard == (state.turns[-1].text if state.turns else "")
        if isinstance(effect, Finish):
            assert len(state.turns) == utterances
        # The same message again changes nothing more and ends nothing twice.
        again, repeated = step(state, event)
        assert again.turns == state.turns
        assert isinstance(event, Begin) or repeated is None
        assert not (ends and isinstance(repeated, Finish | Fail))
    assert [turn.number for turn in state.turns] == list(range(1, len(state.turns) + 1))
    assert [turn.speaker for turn in state.turns] == [i % speakers for i in range(len(state.turns))]
    assert ends == state.ended <= 1


@given(st.integers(1, 20), st.integers(1, 2))
def test_answering_every_ask_finishes(utterances: int, speakers: int) -> None:
    state, effect = step(Dialogue(utterances, speakers), Begin())
    asked = 0
    while isinstance(effect, RequestTurn):
        asked += 1
        state, effect = step(state, TurnArrived(Turn(effect.turn, effect.speaker, f"turn {asked}")))
    assert isinstance(effect, Finish)
    assert asked == utterances == len(state.turns)


def test_a_failure_ends_only_the_turn_that_is_owed() -> None:
    state, _ = step(Dialogue(4), TurnArrived(Turn(1, 0, "yes")))
    assert step(state, TurnFailed(1, "timeout", "an old failure")) == (state, None)
    ended, effect = step(state, TurnFailed(2, "server", "down"))
    assert ended.ended
    assert effect == Fail("server", "down")
