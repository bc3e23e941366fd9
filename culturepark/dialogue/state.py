"""The dialogue as a state machine: who speaks next, and when it ends. No clock, no I/O.

    state, effect = step(state, event)

A dialogue begins, its turns come one by one from alternating speakers, and it ends exactly once:
`Finish` after the last turn or `Fail` with the reason. Events that do not fit (a turn that has come
already, anything after the end) change nothing and have no effect, so an event may come twice
(idempotent).
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from culturepark.messages import FailureKind, Turn


class Dialogue(Struct, frozen=True):
    """The state of one dialogue. `utterances` turns make it complete; `ended` comes once."""

    utterances: int
    speakers: int = 2
    turns: tuple[Turn, ...] = ()
    ended: bool = False

    @property
    def next_turn(self) -> int:
        """The number of the turn that is due, from 1."""
        return len(self.turns) + 1

    @property
    def next_speaker(self) -> int:
        """The index of the persona whose turn it is."""
        return len(self.turns) % self.speakers


class Begin(Struct, frozen=True):
    """The dialogue has a slot and starts, or goes on after the turns that an earlier term has stored."""


class TurnArrived(Struct, frozen=True):
    """A turn came, and is on disk."""

    turn: Turn


class TurnFailed(Struct, frozen=True):
    """Turn `turn` will never come: its model call failed for good."""

    turn: int
    kind: FailureKind
    reason: str


class RequestTurn(Struct, frozen=True):
    """Ask this speaker for this turn; `heard` is the text of the turn before it, empty at the first."""

    turn: int
    speaker: int
    heard: str


class Finish(Struct, frozen=True):
    """The dialogue is complete."""


class Fail(Struct, frozen=True):
    """The dialogue ends without its last turn."""

    kind: FailureKind
    reason: str


Event = Begin | TurnArrived | TurnFailed
Effect = RequestTurn | Finish | Fail | None


def step(state: Dialogue, event: Event) -> tuple[Dialogue, Effect]:
    """What the dialogue is after this event, and what has to be done about it."""
    if state.ended:
        return state, None
    if isinstance(event, Begin):
        return _go_on(state)
    if isinstance(event, TurnArrived):
        turn = event.turn
        if turn.number != state.next_turn or turn.speaker != state.next_speaker:
            return state, None
        return _go_on(replace(state, turns=(*state.turns, turn)))
    if event.turn != state.next_turn:
        return state, None
    return replace(state, ended=True), Fail(event.kind, event.reason)


def _go_on(state: Dialogue) -> tuple[Dialogue, Effect]:
    if len(state.turns) >= state.utterances:
        return replace(state, ended=True), Finish()
    heard = state.turns[-1].text if state.turns else ""
    return state, RequestTurn(state.next_turn, state.next_speaker, heard)
