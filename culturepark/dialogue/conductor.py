"""Conducting many dialogues at once: which message goes where next. No clock, no I/O.

    posts = conductor.on(message, now_s)

The moderator hands it each message and sends the posts that follow. A dialogue has a slot from its start
until its outcome is on disk, so a slow disk slows the start of new dialogues instead of filling memory
(back-pressure). A turn is on disk before the next one is asked for (write-ahead log): whatever dies, no turn
is paid for twice but those that were under way. What an actor that died was asked is asked again
(at-least-once), and an answer that comes twice changes nothing (idempotent).

For debugging, `conductor.events` holds what it saw last, and `conductor.validate()` says what does not
hold of its state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from culturepark.dialogue import health, outcomes
from culturepark.dialogue.event_log import EventLog
from culturepark.dialogue.invariants import (
    InvariantViolation,
    broken_in_dialogue,
    broken_in_doubt,
    broken_in_slot,
)
from culturepark.dialogue.slots import COLLECTOR, Post, Slot, agent_address, refiner_address
from culturepark.dialogue.state import (
    Begin,
    Dialogue,
    Effect,
    Event,
    Finish,
    RequestTurn,
    TurnArrived,
    TurnFailed,
    step,
)
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
    Turn,
    TurnStored,
    UsageStored,
)
from culturepark.models.errors import DOUBTFUL
from culturepark.plan import Plan
from culturepark.settings import Settings

_OWN_KINDS: frozenset[str] = frozenset({"forbidden", "too_large"})
"""Kinds of failure that are in doubt, and that no outage brings about."""


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
    """`drain`, `breaker` (circuit breaker), `budget`, `internal`, or the kind of failure that stopped the
    run."""
    storing_usage: int = 0
    """Dialogues of which the usage of a failed call is on its way to the disk."""

    @property
    def idle(self) -> bool:
        """Nothing is under way, and nothing more will start."""
        under_way = self.in_flight or self.storing_usage
        return not under_way and (bool(self.stopped) or self.ended >= self.planned)


class Conductor:
    """Holds the dialogues of a run, from their start until their outcome is on disk.

    `done` has a bit for each dialogue that needs no more work; `in_progress` says how far others have come:
    they go on from there, before any new one starts. `term` is a number that no earlier conductor of this run
    used (incarnation number), so that an answer to an earlier one is told from an answer to this one.
    `replicas` counts the replicas of each culture's agent and, under REFINERS, the refiners.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        done: bytes,
        term: int,
        replicas: Mapping[str, int],
        in_progress: Iterable[InProgress] = (),
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._term = term
        self._replicas = dict(replicas)
        self.events = EventLog()
        self._ended = int(np.bitwise_count(np.frombuffer(done, dtype=np.uint8)).sum())
        self._in_progress = {one.number: one for one in in_progress}
        self._owed = chain(list(self._in_progress), _zeros(done, len(plan), frozenset(self._in_progress)))
        self._slots: dict[int, Slot] = {}
        self._started = 0
        self._turns = 0
        self._failed = 0
        self._finished = 0
        self._ended_before = self._ended
        self._failures_in_a_row = 0
        self._doubtful: dict[int, tuple[Slot, Post]] = {}
        self._storing_usage: set[int] = set()
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
            storing_usage=len(self._storing_usage),
        )

    def fill(self, now_s: float) -> list[Post]:
        """Start dialogues while there are free slots and owed dialogues."""
        posts = self._fill(now_s)
        self.events.note("fill", "", posts, now_s)
        return posts

    def _fill(self, now_s: float) -> list[Post]:
        posts: list[Post] = []
        while not self._stopped and len(self._slots) < self._settings.limits.dialogues_in_flight:
            number = next(self._owed, None)
            if number is None:
                break
            cultures = self._plan.speaking(number)
            dialogue = Dialogue(self._plan.utterances_of(number), len(cultures))
            slot = Slot(dialogue, now_s, cultures)
            if known := self._in_progress.pop(number, None):
                slot.dialogue = replace(dialogue, turns=known.turns)
                if known.turns:
                    slot.dialogue = self._ended_early(slot.dialogue, known.turns[-1])
                slot.steps = known.steps
            self._slots[number] = slot
            self._started += 1
            posts += self._advance(number, Begin(), now_s)
        return posts

    def on(self, message: Message | TurnStored | UsageStored, now_s: float) -> list[Post]:
        """The posts that follow from a message."""
        posts: list[Post] = []
        try:
            posts = self._follow(message, now_s)
            if not self._slots and self._doubtful and not self._stopped:
                # Nothing is left to tell whether these failures are theirs or an outage's.
                if self._finished or (self._ended_before and self._all_own()):
                    posts += self._settle()
                else:
                    self._trip("no dialogue finished")
            return posts
        finally:  # a message that cannot be followed is the last of the log
            self.events.add(now_s, message, posts)

    def _follow(self, message: Message | TurnStored | UsageStored, now_s: float) -> list[Post]:
        match message:
            case UsageStored(number=number):
                self._storing_usage.discard(number)
                return []
            case OutcomeStored(number=number, failed=failed):
                return self._outcome_stored(number, failed, now_s)
            case Spoke(number=number, term=term) if self._awaits(number, term):
                return self._spoke(message)
            case TurnStored(number=number, term=term, turn=turn) if self._awaits(number, term):
                return self._turn_stored(number, turn, now_s)
            case NeedsTranscript(number=number, term=term, turn=turn) if self._awaits(number, term):
                return self._send_transcript(number, turn)
            case CallFailed(number=number, term=term) if self._awaits(number, term):
                return self._call_failed(message, now_s)
            case _:
                return []

    def held_by(self, address: str) -> list[int]:
        """The dialogues that wait for this actor."""
        return [
            n for n, slot in self._slots.items() if slot.post is not None and slot.post.address == address
        ]

    def lost(self, address: str, in_progress: Iterable[InProgress] = ()) -> list[Post]:
        """Ask again what an actor that died was asked and has not answered.

        `in_progress` says which calls of its refinements are paid for and on disk.
        """
        steps = {one.number: one.steps for one in in_progress}
        posts: list[Post] = []
        for number in () if self._halted else self.held_by(address):
            slot = self._slots[number]
            assert slot.post is not None  # it waits for this actor
            if number in steps and isinstance(slot.post.message, Refine):
                slot.steps = steps[number]
                slot.post = Post(address, replace(slot.post.message, steps=slot.steps))
            posts.append(slot.post)
        self.events.note("lost", address, posts)
        return posts

    def stop(self, by: str, reason: str) -> None:
        """Start no more dialogues. The first reason stays."""
        self.events.note("stop", by)
        if not self._stopped:
            self._stopped, self._stopped_by = reason or by, by

    def halt(self, by: str, reason: str) -> None:
        """Ask for nothing more that costs a model call; answers that come in are still stored."""
        self.events.note("halt", by)
        self.stop(by, reason)
        self._halted = True

    def abandon(self) -> list[int]:
        """Give up the dialogues in flight of a stopped run: they stay owed. Returns their numbers."""
        self.events.note("abandon", str(len(self._slots)))
        numbers = sorted(self._slots)
        self._slots.clear()
        self._storing_usage.clear()
        return numbers

    def validate(self) -> None:
        """Raises InvariantViolation that says what does not hold, between two events. Reads all slots."""
        if broken := list(self._broken()):
            more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
            raise InvariantViolation("; ".join(broken[:5]) + more)

    # --- within

    def _awaits(self, number: int, term: int) -> bool:
        return term == self._term and number in self._slots

    def _spoke(self, message: Spoke) -> list[Post]:
        """Store the turn that is asked for; any other changes nothing."""
        slot = self._slots[message.number]
        asked = slot.post and slot.post.message
        if not isinstance(asked, Ask) or message.turn.number != asked.turn:
            return []
        slot.post = Post(COLLECTOR, message)
        return [slot.post]

    def _turn_stored(self, number: int, turn: int, now_s: float) -> list[Post]:
        slot = self._slots[number]
        said = slot.post and slot.post.message
        if not isinstance(said, Spoke) or not said.turn.number == turn == slot.dialogue.next_turn:
            return []
        self._turns += 1
        slot.dialogue = self._ended_early(slot.dialogue, said.turn)
        return self._advance(number, TurnArrived(said.turn), now_s)

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

    def _post_for(self, number: int, slot: Slot, effect: Effect, now_s: float) -> Post | None:
        match effect:
            case RequestTurn(turn=turn, speaker=speaker, heard=heard):
                address = agent_address(slot.cultures[speaker], number, self._replicas)
                return Post(address, Ask(number, self._term, turn, heard))
            case Finish() if self._settings.refine.enabled:
                address = refiner_address(number, self._replicas)
                turns = slot.dialogue.turns
                return Post(address, Refine(number, self._term, turns, slot.started_s, slot.steps))
            case Finish():
                return Post(COLLECTOR, outcomes.finished(number, slot, now_s))
            case _:
                return None

    def _send_transcript(self, number: int, turn: int) -> list[Post]:
        """Ask again, with the transcript that the agent does not have."""
        post = self._slots[number].post
        if self._halted or post is None or not isinstance(post.message, Ask) or post.message.turn != turn:
            return []
        ask = Ask(number, self._term, turn, post.message.heard, self._slots[number].dialogue.turns)
        return [Post(post.address, ask)]

    def _call_failed(self, message: CallFailed, now_s: float) -> list[Post]:
        number, kind = message.number, message.kind
        slot = self._slots[number]
        if message.turn != slot.awaited_turn:
            return []  # it was answered already
        if kind in RUN_STOPPERS:
            # Every other call would meet the same: the dialogue stays owed, the run stops.
            self.stop(kind, message.reason)
            del self._slots[number]
            return self._store_usage(message)
        if message.turn:
            slot.dialogue, _ = step(slot.dialogue, TurnFailed(message.turn, kind, message.reason))
        post = Post(COLLECTOR, outcomes.failed(slot, message, now_s))
        self._failures_in_a_row += 1
        if kind not in DOUBTFUL:
            slot.post = post
            posts = [post]
        else:
            # An outage is no fault of the dialogue's, nor is a key that was revoked: whether this one failed
            # is settled when another finishes. If none does, it stays owed.
            del self._slots[number]
            if not self._stopped:
                self._doubtful[number] = (slot, post)
            posts = self._store_usage(message)
        if self._failures_in_a_row >= self._settings.limits.breaker:
            self._trip(f"{self._failures_in_a_row} dialogues in a row failed, the last with `{kind}`")
        return posts + self._fill(now_s)

    def _store_usage(self, message: CallFailed) -> list[Post]:
        posts = [Post(COLLECTOR, step) for step in outcomes.usage_of(message)]
        if posts:
            self._storing_usage.add(message.number)
        return posts

    def _all_own(self) -> bool:
        """Whether no failure in doubt is one that an outage brings about. In a run in which dialogues ended
        before, such failures are these dialogues' own: they would be owed for ever."""
        failed = (post.message for _, post in self._doubtful.values())
        return all(isinstance(one, Outcome) and one.failed in _OWN_KINDS for one in failed)

    def _trip(self, what: str) -> None:
        """Stop the run (circuit breaker); the dialogues whose failures are in doubt stay owed."""
        reasons = [
            post.message.reason for _, post in self._doubtful.values() if isinstance(post.message, Outcome)
        ]
        self.stop("breaker", f"{what} ({reasons[-1]})" if reasons else what)
        self._doubtful.clear()

    def _settle(self) -> list[Post]:
        """Others finished, so the failures in doubt are the dialogues' own: store their outcomes."""
        posts: list[Post] = []
        for number, (slot, post) in self._doubtful.items():
            slot.post = post
            self._slots[number] = slot
            posts.append(post)
        self._doubtful.clear()
        return posts

    def _outcome_stored(self, number: int, failed: str, now_s: float) -> list[Post]:
        if self._slots.pop(number, None) is None:
            return []
        self._ended += 1
        if failed:
            self._failed += 1
            return self._fill(now_s)
        self._finished += 1
        self._failures_in_a_row = 0
        return self._settle() + self._fill(now_s)

    def _broken(self) -> Iterator[str]:
        """What does not hold of the state as a whole, and of each dialogue."""
        planned, limits = len(self._plan), self._settings.limits
        in_slots, in_doubt = self._slots.keys(), self._doubtful.keys()
        if self._ended != self._ended_before + self._finished + self._failed:
            parts = f"{self._ended_before} before, {self._finished} finished, {self._failed} failed"
            yield f"{self._ended} have ended: {parts}"
        held = self._finished + self._failed + len(in_slots) + len(in_doubt)
        if held > self._started or (held < self._started and not self._stopped):
            yield f"{self._started} were started, and {held} have ended or are in flight or in doubt"
        if self._ended_before + self._started > planned:
            yield f"{self._ended_before} had ended, {self._started} were started, and {planned} are planned"
        if both := sorted(in_slots & in_doubt):
            yield f"dialogues in flight and in doubt: {both[:5]}"
        if waiting := sorted(self._in_progress.keys() & (in_slots | in_doubt)):
            yield f"dialogues in flight or in doubt that are still to start: {waiting[:5]}"
        if wrong := sorted(n for n in {*in_slots, *in_doubt, *self._storing_usage} if not 0 <= n < planned):
            yield f"dialogues that are not planned: {wrong[:5]}"
        failing = {n for n, slot in self._slots.items() if _fails(slot.post)}
        if (live := len(in_slots) - len(failing)) > limits.dialogues_in_flight:
            yield f"{live} dialogues are in flight, and {limits.dialogues_in_flight} may be"
        if going_on := sorted(self._storing_usage & (in_slots - failing)):
            yield f"dialogues whose call failed, and that go on: {going_on[:5]}"
        if bool(self._stopped) != bool(self._stopped_by) or (self._halted and not self._stopped):
            yield f"it is stopped by `{self._stopped_by}` or halted, and has no reason"
        if self._failures_in_a_row < len(in_doubt):
            yield f"{len(in_doubt)} failures are in doubt, of {self._failures_in_a_row} in a row"
        if not self._stopped and (self._failures_in_a_row >= limits.breaker or (in_doubt and not in_slots)):
            yield f"the breaker did not trip at {self._failures_in_a_row} failures, {len(in_doubt)} in doubt"
        refines = self._settings.refine.enabled
        for number, slot in self._slots.items():
            for what in broken_in_dialogue(slot.dialogue, self._plan.utterances_of(number)):
                yield f"dialogue {number}: {what}"
            for what in broken_in_slot(
                number, slot, self._term, self._replicas, refines=refines, halted=self._halted
            ):
                yield f"dialogue {number}: {what}"
        for number, (slot, post) in self._doubtful.items():
            for what in broken_in_doubt(number, slot, post):
                yield f"dialogue {number}: {what}"


def _fails(post: Post | None) -> bool:
    return post is not None and isinstance(post.message, Outcome) and bool(post.message.failed)


def _zeros(bits: bytes, count: int, skip: frozenset[int]) -> Iterator[int]:
    """The positions of zeros among the first `count` bits, but those to skip, found as they are needed."""
    block = 4096
    for start in range(0, len(bits), block):
        some = np.unpackbits(np.frombuffer(bits[start : start + block], dtype=np.uint8))
        for offset in np.flatnonzero(some == 0):
            if (position := 8 * start + int(offset)) >= count:
                return
            if position not in skip:
                yield position
