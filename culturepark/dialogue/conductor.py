"""Conducting many dialogues at once: which message goes where next. No clock, no I/O.

    posts = conductor.on(message, now_s)

The moderator feeds messages in and sends what comes out. A dialogue takes a slot when it starts and
gives it free when its outcome is on disk, so a slow disk slows the start of new dialogues instead of
filling memory. A turn is on disk before the next one is asked for, so whatever dies, no turn is paid for
twice but those that were under way. What is lost with an actor is asked again; answers that come twice
change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from culturepark.dialogue import health
from culturepark.dialogue.state import AskFor, Begin, Broke, Dialogue, Effect, Event, Finish, Said, step
from culturepark.messages import (
    RUN_STOPPERS,
    Ask,
    CallFailed,
    InProgress,
    Message,
    NeedsTranscript,
    Outcome,
    OutcomeStored,
    Refine,
    Spoke,
    Step,
    Turn,
    TurnStored,
    UsageStored,
    bare_usage,
    only_usage,
    with_speaker,
)
from culturepark.models.errors import DOUBTFUL
from culturepark.plan import Plan
from culturepark.settings import Settings
from culturepark.usage import Usage

COLLECTOR = "collector"
REFINERS = "/refiners"
"""Their key beside those of cultures, which hold no slash."""
_OWN: frozenset[str] = frozenset({"forbidden", "too_large"})


class Post(Struct, frozen=True):
    """A message and the address it goes to: `agent/<culture>/<i>`, `refiner/<i>` or `collector`."""

    address: str
    message: Ask | Refine | Spoke | Step | Outcome


class _Slot(Struct):
    """A dialogue in flight. `post` is what it waits for an answer to; `steps` are the calls of its
    refinement that an earlier attempt has paid for, and what calls took that brought nothing."""

    dialogue: Dialogue
    started_s: float
    cultures: tuple[str, ...]
    post: Post | None = None
    steps: tuple[Step, ...] = ()


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
    """`drain`, `breaker`, `budget`, or the kind of failure that stopped the run."""
    noting: int = 0
    """Dialogues that wait for nothing but that what a failed call took is on disk."""

    @property
    def idle(self) -> bool:
        """Nothing is under way, and nothing more will start."""
        under_way = self.in_flight or self.noting
        return not under_way and (bool(self.stopped) or self.ended >= self.planned)


class Conductor:
    """Holds the dialogues of a run, from their start until their outcome is on disk.

    `done` has a bit for each dialogue that needs no more work; `begun` says how far others have come:
    they go on from there, before any new one starts. `term` is a number that no earlier
    conductor of this run used, so that answers to an earlier one are not taken for answers to this.
    `replicas` counts the replicas of each culture's agent and, under REFINERS, the refiners.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        done: bytes,
        term: int,
        replicas: Mapping[str, int],
        begun: Iterable[InProgress] = (),
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._term = term
        self._replicas = dict(replicas)
        self._ended = int(np.bitwise_count(np.frombuffer(done, dtype=np.uint8)).sum())
        self._begun = {one.number: one for one in begun}
        self._owed = chain(list(self._begun), _zeros(done, len(plan), frozenset(self._begun)))
        self._slots: dict[int, _Slot] = {}
        self._turns = 0
        self._failed = 0
        self._finished = 0
        self._before = self._ended
        self._failures_in_a_row = 0
        self._doubtful: dict[int, tuple[_Slot, Post]] = {}
        self._noting: set[int] = set()
        self._stopped = ""
        self._stopped_by = ""
        self._halted = False

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
            noting=len(self._noting),
        )

    def fill(self, now_s: float) -> list[Post]:
        """Start dialogues while there are free slots and owed dialogues."""
        posts: list[Post] = []
        while not self._stopped and len(self._slots) < self._settings.limits.dialogues_in_flight:
            number = next(self._owed, None)
            if number is None:
                break
            cultures = self._plan.speaking(number)
            dialogue = Dialogue(self._plan.utterances_of(number), len(cultures))
            slot = _Slot(dialogue, now_s, cultures)
            if begun := self._begun.pop(number, None):
                slot.dialogue = replace(dialogue, turns=begun.turns)
                if begun.turns:
                    slot.dialogue = self._ended_early(slot.dialogue, begun.turns[-1])
                slot.steps = begun.steps
            self._slots[number] = slot
            posts += self._advance(number, Begin(), now_s)
        return posts

    def on(self, message: Message | TurnStored | UsageStored, now_s: float) -> list[Post]:
        """What follows from a message."""
        posts = self._on(message, now_s)
        if not self._slots and self._doubtful and not self._stopped:
            # Nothing is left to tell whether these failures are theirs or an outage's.
            if self._finished or (self._before and self._all_their_own()):
                posts += self._settle()
            else:
                self._trip("no dialogue finished")
        return posts

    def _on(self, message: Message | TurnStored | UsageStored, now_s: float) -> list[Post]:
        match message:
            case UsageStored(number=number):
                self._noting.discard(number)
                return []
            case OutcomeStored(number=number, failed=failed):
                return self._recorded(number, failed, now_s)
            case Spoke(number=number, term=term) if self._awaits(number, term):
                return self._spoke(message)
            case TurnStored(number=number, term=term, turn=turn) if self._awaits(number, term):
                return self._kept(number, turn, now_s)
            case NeedsTranscript(number=number, term=term, turn=turn) if self._awaits(number, term):
                return self._retell(number, turn)
            case CallFailed(number=number, term=term) if self._awaits(number, term):
                return self._balked(message, now_s)
            case _:
                return []

    def held_by(self, address: str) -> list[int]:
        """The dialogues that wait for this actor."""
        return [
            n for n, slot in self._slots.items() if slot.post is not None and slot.post.address == address
        ]

    def lost(self, address: str, begun: Iterable[InProgress] = ()) -> list[Post]:
        """Ask again what an actor was asked and has not answered: it is gone.

        `begun` says which calls of refinements it had been paid for.
        """
        steps = {one.number: one.steps for one in begun}
        posts: list[Post] = []
        for number in self.held_by(address):
            slot = self._slots[number]
            assert slot.post is not None  # it waits for this actor
            if number in steps and isinstance(slot.post.message, Refine):
                slot.steps = steps[number]
                slot.post = Post(address, replace(slot.post.message, steps=slot.steps))
            posts.append(slot.post)
        return posts

    def stop(self, by: str, reason: str) -> None:
        """Start no more dialogues. The first reason stays."""
        if not self._stopped:
            self._stopped, self._stopped_by = reason, by

    def halt(self, by: str, reason: str) -> None:
        """Ask nobody for anything more, as far as calls cost something; what comes in is still recorded."""
        self.stop(by, reason)
        self._halted = True

    def abandon(self) -> list[int]:
        """Let go of dialogues still in flight: they stay owed. Returns their numbers."""
        numbers = sorted(self._slots)
        self._slots.clear()
        self._noting.clear()
        return numbers

    # --- within

    def _awaits(self, number: int, term: int) -> bool:
        return term == self._term and number in self._slots

    def _spoke(self, message: Spoke) -> list[Post]:
        """Put the turn that is asked for on disk; any other changes nothing."""
        slot = self._slots[message.number]
        asked = slot.post and slot.post.message
        if not isinstance(asked, Ask) or message.turn.number != asked.turn:
            return []
        slot.post = Post(COLLECTOR, message)
        return [slot.post]

    def _kept(self, number: int, turn: int, now_s: float) -> list[Post]:
        slot = self._slots[number]
        said = slot.post and slot.post.message
        if not isinstance(said, Spoke) or said.turn.number != turn:
            return []
        self._turns += 1
        slot.dialogue = self._ended_early(slot.dialogue, said.turn)
        return self._advance(number, Said(said.turn), now_s)

    def _ended_early(self, dialogue: Dialogue, last: Turn) -> Dialogue:
        """The dialogue, ending with this turn if its health says so."""
        ends = health.ends(last.number, last.health, self._settings.health, dialogue.utterances)
        return replace(dialogue, utterances=last.number) if ends else dialogue

    def _advance(self, number: int, event: Event, now_s: float) -> list[Post]:
        slot = self._slots[number]
        slot.dialogue, effect = step(slot.dialogue, event)
        post = self._post_for(number, slot, effect, now_s)
        if post is None or (self._halted and post.address != COLLECTOR):
            return []
        slot.post = post
        return [post]

    def _post_for(self, number: int, slot: _Slot, effect: Effect, now_s: float) -> Post | None:
        match effect:
            case AskFor(turn=turn, speaker=speaker, heard=heard):
                culture = slot.cultures[speaker]
                address = f"agent/{culture}/{number % self._replicas[culture]}"
                return Post(address, Ask(number, self._term, turn, heard))
            case Finish() if self._settings.refine.enabled:
                address = f"refiner/{number % self._replicas[REFINERS]}"
                turns = slot.dialogue.turns
                return Post(address, Refine(number, self._term, turns, slot.started_s, slot.steps))
            case Finish():
                return Post(COLLECTOR, self._outcome(number, slot, now_s))
            case _:
                return None

    def _outcome(
        self,
        number: int,
        slot: _Slot,
        now_s: float,
        kind: str = "",
        reason: str = "",
        usage: Mapping[str, Usage] | None = None,
    ) -> Outcome:
        spent = bare_usage(slot.steps) if usage is None else usage
        return Outcome(
            number=number,
            turns=slot.dialogue.turns,
            usage=with_speaker(spent, slot.dialogue.turns),
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
        ask = Ask(number, self._term, turn, post.message.heard, self._slots[number].dialogue.turns)
        return [Post(post.address, ask)]

    def _balked(self, message: CallFailed, now_s: float) -> list[Post]:
        number, kind = message.number, message.kind
        slot = self._slots[number]
        if message.turn != _awaited(slot):
            return []  # it has answered already
        if kind in RUN_STOPPERS:
            # Every other call would meet the same: the dialogue stays owed, the run stops.
            self.stop(kind, message.reason)
            del self._slots[number]
            return self._note(message)
        if message.turn:
            slot.dialogue, _ = step(slot.dialogue, Broke(message.turn, kind, message.reason))
        post = Post(COLLECTOR, self._failure(slot, message, now_s))
        self._failures_in_a_row += 1
        if kind not in DOUBTFUL:
            slot.post = post
            posts = [post]
        else:
            # An outage is no fault of the dialogue's, nor is a key that is no longer good: whether this
            # one failed is settled when another finishes. If none does, it stays owed.
            del self._slots[number]
            if not self._stopped:
                self._doubtful[number] = (slot, post)
            posts = self._note(message)
        if self._failures_in_a_row >= self._settings.limits.breaker:
            self._trip(f"{self._failures_in_a_row} dialogues in a row failed, the last with `{kind}`")
        return posts + self.fill(now_s)

    def _note(self, message: CallFailed) -> list[Post]:
        """Put on disk what a failed call took whose dialogue may stay owed. A refiner has done so itself."""
        if not message.turn:
            return []
        key = b"lost" + message.term.to_bytes(8, "big") + message.turn.to_bytes(4, "big")
        posts = [Post(COLLECTOR, one) for one in only_usage(message.number, message.usage, key)]
        if posts:
            self._noting.add(message.number)
        return posts

    def _all_their_own(self) -> bool:
        """Whether nothing is in doubt but what an outage does not bring about. In a run that has ended others
        before, it is these dialogues' own: they would be owed for ever."""
        failed = (post.message for _, post in self._doubtful.values())
        return all(isinstance(one, Outcome) and one.failed in _OWN for one in failed)

    def _failure(self, slot: _Slot, message: CallFailed, now_s: float) -> Outcome:
        """How a dialogue ends with a failure. A refiner knows what calls before this one took."""
        usage = dict(message.usage)
        if message.turn:
            for role, took in bare_usage(slot.steps).items():
                usage[role] = usage.get(role, Usage()) + took
        return self._outcome(message.number, slot, now_s, message.kind, message.reason, usage)

    def _trip(self, what: str) -> None:
        reasons = [
            post.message.reason for _, post in self._doubtful.values() if isinstance(post.message, Outcome)
        ]
        self.stop("breaker", f"{what} ({reasons[-1]})" if reasons else what)
        self._doubtful.clear()

    def _settle(self) -> list[Post]:
        """Others finished, so the doubtful failures are the dialogues' own: record them."""
        posts: list[Post] = []
        for number, (slot, post) in self._doubtful.items():
            slot.post = post
            self._slots[number] = slot
            posts.append(post)
        self._doubtful.clear()
        return posts

    def _recorded(self, number: int, failed: str, now_s: float) -> list[Post]:
        if self._slots.pop(number, None) is None:
            return []
        self._ended += 1
        if failed:
            self._failed += 1
            return self.fill(now_s)
        self._finished += 1
        self._failures_in_a_row = 0
        return self._settle() + self.fill(now_s)


def _awaited(slot: _Slot) -> int:
    """The turn that was asked for; 0 for a refinement, -1 if nobody is asked anything."""
    asked = slot.post and slot.post.message
    if isinstance(asked, Ask):
        return asked.turn
    return 0 if isinstance(asked, Refine) else -1


def _zeros(bits: bytes, count: int, but: frozenset[int]) -> Iterator[int]:
    """The positions of zeros among the first `count` bits, `but` these, found as they are needed."""
    block = 4096
    for start in range(0, len(bits), block):
        some = np.unpackbits(np.frombuffer(bits[start : start + block], dtype=np.uint8))
        for offset in np.flatnonzero(some == 0):
            if (position := 8 * start + int(offset)) >= count:
                return
            if position not in but:
                yield position
