"""Conducting many dialogues at once: which message goes where next. No clock, no I/O.

    posts = conductor.on(message, now_s)

The moderator feeds messages in and sends what comes out. A dialogue takes a slot when it starts and
gives it free when its outcome is on disk, so a slow disk slows the start of new dialogues instead of
filling memory. What is lost with an actor is asked again; answers that come twice change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from msgspec import Struct

from culturepark.dialogue import AskFor, Begin, Broke, Dialogue, Effect, Event, Fail, Finish, Said, step
from culturepark.messages import (
    RUN_STOPPERS,
    Ask,
    Balked,
    Message,
    Outcome,
    Recorded,
    Refine,
    Spoke,
    Turn,
    Unknown,
    speaker_usage,
)
from culturepark.plan import Plan
from culturepark.ports import Usage
from culturepark.settings import Settings

COLLECTOR = "collector"


class Post(Struct, frozen=True):
    """A message and the address it goes to: `agent/<culture>/<i>`, `refiner/<i>` or `collector`."""

    address: str
    message: Ask | Refine | Outcome


class _Slot(Struct):
    """A dialogue in flight. `post` is what it waits for an answer to."""

    dialogue: Dialogue
    started_s: float
    cultures: tuple[str, ...]
    post: Post | None = None


class Progress(Struct, frozen=True):
    """Where the run stands, as the conductor sees it."""

    planned: int
    ended: int
    in_flight: int
    refining: int
    turns: int
    failed: int
    stopped: str
    """Why no new dialogues start: empty, or the reason in words."""
    stopped_by: str
    """`drain`, `breaker`, or the kind of failure that stopped the run."""

    @property
    def idle(self) -> bool:
        """Nothing is under way, and nothing more will start."""
        return not self.in_flight and (bool(self.stopped) or self.ended >= self.planned)


class Conductor:
    """Holds the dialogues of a run, from their start until their outcome is on disk.

    `done` has a bit for each dialogue that needs no more work. `take` is a number that no earlier
    conductor of this run used, so that answers to an earlier one are not taken for answers to this.
    `replicas` counts the replicas of each culture's agent and, as `refiner`, the refiners.
    """

    def __init__(
        self, plan: Plan, settings: Settings, done: bytes, take: int, replicas: Mapping[str, int]
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._take = take
        self._replicas = dict(replicas)
        self._ended = int(np.bitwise_count(np.frombuffer(done, dtype=np.uint8)).sum())
        self._owed = _zeros(done, len(plan))
        self._slots: dict[int, _Slot] = {}
        self._turns = 0
        self._failed = 0
        self._failures_in_a_row = 0
        self._stopped = ""
        self._stopped_by = ""

    def progress(self) -> Progress:
        """Where the run stands."""
        refining = sum(isinstance(s.post and s.post.message, Refine | Outcome) for s in self._slots.values())
        return Progress(
            planned=len(self._plan),
            ended=self._ended,
            in_flight=len(self._slots),
            refining=refining,
            turns=self._turns,
            failed=self._failed,
            stopped=self._stopped,
            stopped_by=self._stopped_by,
        )

    def fill(self, now_s: float) -> list[Post]:
        """Start dialogues while there are free slots and owed dialogues."""
        posts: list[Post] = []
        while not self._stopped and len(self._slots) < self._settings.limits.dialogues_in_flight:
            number = next(self._owed, None)
            if number is None:
                break
            cultures = tuple(persona.culture for persona in self._plan.brief(number).speakers)
            dialogue = Dialogue(self._plan.utterances_of(number), len(cultures))
            self._slots[number] = _Slot(dialogue, now_s, cultures)
            posts += self._advance(number, Begin(), now_s)
        return posts

    def on(self, message: Message, now_s: float) -> list[Post]:
        """What follows from a message."""
        match message:
            case Recorded(number=number, failed=failed):
                return self._recorded(number, failed, now_s)
            case Spoke(number=number, take=take, turn=turn) if self._awaits(number, take):
                return self._spoke(number, turn, now_s)
            case Unknown(number=number, take=take, turn=turn) if self._awaits(number, take):
                return self._retell(number, turn)
            case Balked(number=number, take=take) if self._awaits(number, take):
                return self._balked(message, now_s)
            case _:
                return []

    def lost(self, address: str) -> list[Post]:
        """Ask again what an actor was asked and has not answered: it is gone."""
        return [s.post for s in self._slots.values() if s.post is not None and s.post.address == address]

    def stop(self, by: str, reason: str) -> None:
        """Start no more dialogues. The first reason stays."""
        if not self._stopped:
            self._stopped, self._stopped_by = reason, by

    def abandon(self) -> list[int]:
        """Let go of dialogues still in flight: they stay owed. Returns their numbers."""
        numbers = sorted(self._slots)
        self._slots.clear()
        return numbers

    # --- within

    def _awaits(self, number: int, take: int) -> bool:
        return take == self._take and number in self._slots

    def _spoke(self, number: int, turn: Turn, now_s: float) -> list[Post]:
        before = self._slots[number].dialogue
        posts = self._advance(number, Said(turn), now_s)
        self._turns += self._slots[number].dialogue is not before
        return posts

    def _advance(self, number: int, event: Event, now_s: float, usage: Usage | None = None) -> list[Post]:
        slot = self._slots[number]
        slot.dialogue, effect = step(slot.dialogue, event)
        post = self._post_for(number, slot, effect, now_s, usage)
        if post is None:
            return []
        slot.post = post
        return [post]

    def _post_for(
        self, number: int, slot: _Slot, effect: Effect, now_s: float, usage: Usage | None
    ) -> Post | None:
        match effect:
            case AskFor(turn=turn, speaker=speaker, heard=heard):
                culture = slot.cultures[speaker]
                address = f"agent/{culture}/{number % self._replicas[culture]}"
                return Post(address, Ask(number, self._take, turn, heard))
            case Finish() if self._settings.refine.enabled:
                address = f"refiner/{number % self._replicas['refiner']}"
                return Post(address, Refine(number, self._take, slot.dialogue.turns, slot.started_s))
            case Finish():
                return Post(COLLECTOR, self._outcome(number, slot, now_s))
            case Fail(kind=kind, reason=reason):
                return Post(COLLECTOR, self._outcome(number, slot, now_s, kind, reason, usage))
            case None:
                return None

    def _outcome(
        self,
        number: int,
        slot: _Slot,
        now_s: float,
        kind: str = "",
        reason: str = "",
        usage: Usage | None = None,
    ) -> Outcome:
        spent = speaker_usage(slot.dialogue.turns) + (usage or Usage())
        return Outcome(
            number=number,
            turns=slot.dialogue.turns,
            usage={"speaker": spent},
            failed=kind,
            reason=reason,
            started_s=slot.started_s,
            ended_s=now_s,
        )

    def _retell(self, number: int, turn: int) -> list[Post]:
        """Send an agent the transcript that it does not have."""
        post = self._slots[number].post
        if post is None or not isinstance(post.message, Ask) or post.message.turn != turn:
            return []
        ask = Ask(number, self._take, turn, post.message.heard, self._slots[number].dialogue.turns)
        return [Post(post.address, ask)]

    def _balked(self, message: Balked, now_s: float) -> list[Post]:
        if message.kind in RUN_STOPPERS:
            # Every other call would meet the same: the dialogue stays owed, the run stops.
            self.stop(message.kind, message.reason)
            del self._slots[message.number]
            return []
        return self._advance(
            message.number, Broke(message.turn, message.kind, message.reason), now_s, message.usage
        )

    def _recorded(self, number: int, failed: str, now_s: float) -> list[Post]:
        if self._slots.pop(number, None) is None:
            return []
        self._ended += 1
        self._failed += bool(failed)
        self._failures_in_a_row = self._failures_in_a_row + 1 if failed else 0
        if self._failures_in_a_row >= self._settings.limits.breaker:
            what = f"{self._failures_in_a_row} dialogues in a row failed, the last with `{failed}`"
            self.stop("breaker", what)
        return self.fill(now_s)


def _zeros(bits: bytes, count: int) -> Iterator[int]:
    """The positions of zeros among the first `count` bits, found as they are needed."""
    block = 4096
    for start in range(0, len(bits), block):
        some = np.unpackbits(np.frombuffer(bits[start : start + block], dtype=np.uint8))
        for offset in np.flatnonzero(some == 0):
            if (position := 8 * start + int(offset)) >= count:
                return
            yield position
