"""A world that loses, repeats and shuffles messages: every dialogue is recorded exactly once."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from culturepark.dialogue.conductor import Conductor
from culturepark.dialogue.slots import COLLECTOR, REFINERS, Post
from culturepark.messages import (
    Ask,
    CallFailed,
    FailureKind,
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
    decode,
    encode,
)
from culturepark.plan import Plan
from culturepark.usage import Usage
from tests import builders

TERM = 77


class World:
    """Agents, refiners and a collector that misbehave as Ray's actors may, as the dice say.

    The network delivers at least once. What an actor was asked and did not answer is lost when it dies.
    """

    def __init__(
        self,
        plan: Plan,
        of: Any,
        dice: random.Random,
        fails: int = 0,
        kinds: tuple[FailureKind, ...] = ("server",),
    ) -> None:
        replicas = dict.fromkeys([*plan.agent_cultures(), REFINERS], 2)
        self.plan, self.dice, self.fails, self.kinds = plan, dice, fails, kinds
        self.conductor = Conductor(plan, of, bytes(-(-len(plan) // 8)), TERM, replicas)
        self.halted = False
        self.inbox: list[tuple[str, Any]] = []
        self.answers: list[Message | TurnStored | UsageStored] = []
        self.known: set[tuple[int, int]] = set()
        self.outcomes: dict[int, Outcome] = {}
        self.recorded: Counter[int] = Counter()
        self.noted: dict[int, dict[bytes, Step]] = {}
        self.most_in_flight = 0

    def choose(self, most: int) -> int:
        return self.dice.randrange(most)

    def send(self, posts: list[Post]) -> None:
        self.conductor.validate()
        assert not self.halted or {post.address for post in posts} <= {COLLECTOR}
        progress = self.conductor.progress()
        # Failures that are settled late are on their way to the disk beside the others.
        self.most_in_flight = max(self.most_in_flight, progress.in_flight - progress.refining)
        self.inbox += [(post.address, decode(encode(post.message))) for post in posts]

    def live(self) -> None:
        self.send(self.conductor.fill(0.0))
        for _ in range(20_000):
            if self.conductor.progress().idle:
                return
            assert self.moves(), f"nothing is under way: {self.conductor.progress()}"
        raise AssertionError("it does not end")

    def moves(self) -> bool:
        """Whether something was under way, of which one thing came."""
        if self.answers and (not self.inbox or self.choose(2)):
            at = self.choose(len(self.answers))
            message = self.answers[at]
            if self.choose(5):  # else it comes once more later
                self.answers.pop(at)
            self.send(self.conductor.on(message, 1.0))
            return True
        if not self.inbox:
            return False
        address, message = self.inbox.pop(self.choose(len(self.inbox)))
        if not self.choose(12) and address != COLLECTOR:
            self.kill(address)
        else:
            self.answer(message)
        return True

    def halt(self) -> None:
        """The budget is spent."""
        self.conductor.halt("budget", "it is spent")
        self.halted = True

    def kill(self, address: str) -> None:
        """This actor dies with all it was asked and all it knew."""
        self.inbox = [(to, message) for to, message in self.inbox if to != address]
        self.known.clear()
        self.send(self.conductor.lost(address))

    def answer(self, message: Ask | Refine | Spoke | Step | Outcome) -> None:
        if isinstance(message, Ask):
            speakers = len(self.plan.brief(message.number).speakers)
            if message.transcript is None and message.turn > speakers:
                if (message.number, (message.turn - 1) % speakers) not in self.known:
                    self.answers.append(NeedsTranscript(message.number, message.term, message.turn))
                    return
            elif message.transcript is not None:
                assert [t.number for t in message.transcript] == list(range(1, message.turn))
                assert message.transcript[-1].text == message.heard
            self.known.add((message.number, (message.turn - 1) % speakers))
            if self.fails and (message.number * 31 + message.turn) % self.fails == 0:
                self.fail(message.number, message.turn, "speaker")
                return
            turn = Turn(
                message.turn, (message.turn - 1) % speakers, f"said {message.turn}", usage=Usage(calls=1)
            )
            self.answers.append(Spoke(message.number, message.term, turn))
        elif isinstance(message, Spoke):
            self.answers.append(TurnStored(message.number, message.term, message.turn.number))
        elif isinstance(message, Step):
            self.noted.setdefault(message.number, {})[message.key] = message
            self.answers.append(UsageStored(message.number))
        elif isinstance(message, Refine):
            if len(self.kinds) > 1 and self.fails and message.number % self.fails == 1:
                self.fail(message.number, 0, "verifier")
            else:
                self.record(Outcome(message.number, message.turns))
        else:
            self.record(message)

    def fail(self, number: int, turn: int, role: str) -> None:
        """A call has failed for good; in refinement `turn` is 0."""
        kind = self.kinds[self.choose(len(self.kinds))]
        self.answers.append(CallFailed(number, TERM, turn, kind, "down", {role: Usage(calls=1)}))

    def record(self, outcome: Outcome) -> None:
        """The collector: the first outcome of a dialogue counts, each is acknowledged."""
        if outcome.number not in self.outcomes:
            self.outcomes[outcome.number] = outcome
            self.recorded[outcome.number] += 1
        self.answers.append(OutcomeStored(outcome.number, self.outcomes[outcome.number].failed))


ALL_KINDS = {
    "cultures": ["arabic", "korean"],
    "questions": ["wvs7-q28"],
    "kinds": ["cross", "in-culture", "direct"],
    "dialogues_per_question": 3,
    "utterances": 4,
}
"""A plan with dialogues of every kind."""


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans(), st.sampled_from([0, 5, 9]), st.integers(1, 5))
def test_every_dialogue_is_recorded_once(seed: int, refine: bool, fails: int, at_once: int) -> None:
    of = builders.settings(
        plan=ALL_KINDS,
        refine={"enabled": refine},
        limits={"dialogues_in_flight": at_once, "breaker": 1000},
    )
    plan = builders.plan(of)
    world = World(plan, of, random.Random(seed), fails=fails)
    world.live()
    assert dict(world.recorded) == dict.fromkeys(range(len(plan)), 1)
    assert world.most_in_flight <= at_once
    progress = world.conductor.progress()
    assert progress.ended == progress.planned == len(plan)
    assert progress.failed == sum(bool(o.failed) for o in world.outcomes.values())
    assert progress.turns == sum(len(o.turns) for o in world.outcomes.values())
    for number, outcome in world.outcomes.items():
        assert bool(outcome.failed) == (len(outcome.turns) < plan.utterances_of(number))
        assert [turn.number for turn in outcome.turns] == list(range(1, len(outcome.turns) + 1))
        if outcome.failed:
            # What the failed turn cost is counted with the turns that were said, and was on disk before.
            assert outcome.usage["speaker"].calls == len(outcome.turns) + 1
            assert [step.usage.calls for step in world.noted[number].values()] == [1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 32),
    st.booleans(),
    st.sampled_from([0, 2, 5]),
    st.integers(1, 5),
    st.integers(2, 30),
    st.integers(0, 200),
    st.sampled_from(["halt", "stop", "nothing"]),
)
def test_whatever_comes_and_however_it_stops_nothing_is_lost_or_asked_too_much(
    seed: int, refine: bool, fails: int, at_once: int, breaker: int, after: int, then: str
) -> None:
    of = builders.settings(
        plan=ALL_KINDS,
        refine={"enabled": refine},
        limits={"dialogues_in_flight": at_once, "breaker": breaker},
    )
    plan = builders.plan(of)
    world = World(plan, of, random.Random(seed), fails, ("server", "refused", "forbidden", "too_large"))
    world.send(world.conductor.fill(0.0))
    for _ in range(after):
        world.moves()
    if then == "halt":
        world.halt()
    elif then == "stop":
        world.conductor.stop("drain", "asked to")
    for _ in range(20_000):
        if not world.moves():
            break
    if then == "halt":
        world.conductor.abandon()
        world.conductor.validate()
    progress = world.conductor.progress()
    assert progress.idle
    assert progress.ended == len(world.outcomes) == sum(world.recorded.values())
    if not progress.stopped:
        assert progress.ended == progress.planned


@given(st.sets(st.integers(0, 39)))
def test_resume_is_subtraction(done: set[int]) -> None:
    of = builders.settings(
        plan={"cultures": ["arabic"], "questions": list(builders.THREE[:2]), "dialogues_per_question": 20}
    )
    plan = builders.plan(of)
    bits = np.zeros(len(plan), dtype=np.uint8)
    bits[list(done)] = 1
    replicas = dict.fromkeys([*plan.agent_cultures(), REFINERS], 1)
    conductor = Conductor(plan, of, np.packbits(bits).tobytes(), TERM, replicas)
    started = {post.message.number for post in conductor.fill(0.0)}
    assert started == set(range(40)) - done
    assert conductor.progress().idle == (len(done) == 40)


def crowd(**limits: Any) -> tuple[Plan, Conductor]:
    """Ten dialogues between two speakers, all under way."""
    of = builders.settings(
        plan={"cultures": ["arabic"], "questions": ["wvs7-q28"], "dialogues_per_question": 10},
        limits={"dialogues_in_flight": 3} | limits,
    )
    plan = builders.plan(of)
    replicas = dict.fromkeys([*plan.agent_cultures(), REFINERS], 1)
    return plan, Conductor(plan, of, bytes(2), TERM, replicas)


@pytest.mark.parametrize("kind", ["unauthorised", "no_such_model"])
def test_what_every_call_would_meet_stops_the_run(kind: Any) -> None:
    plan, conductor = crowd()
    posts = conductor.fill(0.0)
    assert conductor.on(CallFailed(0, TERM, 1, kind, "no"), 0.0) == []
    progress = conductor.progress()
    assert (progress.stopped_by, progress.ended, progress.failed) == (kind, 0, 0)
    assert not progress.idle  # two are still under way
    for post in posts[1:]:
        assert conductor.on(CallFailed(post.message.number, TERM, 1, kind, "no"), 0.0) == []
    assert conductor.progress().idle
    assert conductor.progress().planned - conductor.progress().ended == len(plan)  # all owed


def test_an_outage_stops_the_run_and_its_dialogues_stay_owed() -> None:
    plan, conductor = crowd(breaker=3)
    posts = conductor.fill(0.0)
    for number in range(3):
        posts += conductor.on(CallFailed(number, TERM, 1, "server", "down"), 0.0)
    progress = conductor.progress()
    assert progress.stopped_by == "breaker"
    assert "down" in progress.stopped
    for number in {post.message.number for post in posts} - {0, 1, 2}:  # begun before it tripped
        assert conductor.on(CallFailed(number, TERM, 1, "timeout", "late"), 0.0) == []
    progress = conductor.progress()
    assert progress.idle
    assert (progress.ended, progress.failed) == (0, 0)
    assert not [post for post in posts if post.address == COLLECTOR]
    assert progress.planned - progress.ended == len(plan)


def test_a_failure_is_the_dialogues_own_once_another_finishes() -> None:
    _, conductor = crowd(breaker=3)
    conductor.fill(0.0)
    for number in range(2):
        posts = conductor.on(CallFailed(number, TERM, 1, "server", "down"), 0.0)
        assert not [post for post in posts if post.address == COLLECTOR]
    posts = conductor.on(OutcomeStored(2), 0.0)
    failed = [post.message for post in posts if post.address == COLLECTOR]
    assert {(one.number, one.failed) for one in failed if isinstance(one, Outcome)} == {
        (0, "server"),
        (1, "server"),
    }
    assert not conductor.progress().stopped


def test_what_would_fail_again_is_recorded_at_once() -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    (post,) = [
        p for p in conductor.on(CallFailed(0, TERM, 1, "refused", "no"), 0.0) if p.address == COLLECTOR
    ]
    assert isinstance(post.message, Outcome)
    assert post.message.failed == "refused"


PAID = {"speaker": Usage(calls=3, prompt_tokens=3000, unreported=1)}


def notes(posts: list[Post]) -> dict[int, dict[str, Usage]]:
    """What goes to the disk about calls that brought nothing, by dialogue."""
    steps = [post.message for post in posts if isinstance(post.message, Step)]
    assert all(step.only_usage for step in steps)
    return {step.number: {step.role: step.usage} for step in steps}


@pytest.mark.parametrize("kind", ["unauthorised", "empty_reply", "forbidden"])
def test_what_a_failure_took_goes_to_the_disk_though_the_dialogue_stays_owed(kind: Any) -> None:
    _, conductor = crowd(breaker=3)
    conductor.fill(0.0)
    posts = [post for n in range(3) for post in conductor.on(CallFailed(n, TERM, 1, kind, "no", PAID), 0.0)]
    assert notes(posts) == {0: PAID, 1: PAID, 2: PAID}
    progress = conductor.progress()
    assert progress.stopped
    assert progress.ended == 0


def test_a_run_is_not_over_before_what_was_paid_is_on_disk() -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    for number in range(3):
        conductor.on(CallFailed(number, TERM, 1, "unauthorised", "no", PAID), 0.0)
    for number in range(3):
        assert not conductor.progress().idle
        assert conductor.on(UsageStored(number), 0.0) == conductor.on(UsageStored(number), 0.0) == []
    assert conductor.progress().idle


@pytest.mark.parametrize("refine", [True, False])
def test_what_earlier_attempts_took_is_in_the_outcome_once(refine: bool) -> None:
    """Of a dialogue that fails later on, and of one that finishes."""
    of = builders.settings(
        plan={"cultures": ["arabic"], "questions": ["wvs7-q28"], "dialogues_per_question": 10},
        limits={"dialogues_in_flight": 2},
        refine={"enabled": refine},
    )
    plan = builders.plan(of)
    replicas = dict.fromkeys([*plan.agent_cultures(), REFINERS], 1)
    lost = Step(4, b"lost", "speaker", PAID["speaker"], only_usage=True)
    whole = tuple(
        Turn(n, (n - 1) % 2, f"turn {n}", usage=Usage(1)) for n in range(1, plan.utterances_of(4) + 1)
    )
    begun = [InProgress(4, whole, (lost,)), InProgress(7, whole[:2], (replace(lost, number=7),))]
    conductor = Conductor(plan, of, bytes(2), TERM, replicas, begun)
    ended, asked = (post.message for post in conductor.fill(0.0))
    if refine:
        assert isinstance(ended, Refine)
        assert ended.steps == (lost,)  # the refiner counts it
    else:
        assert isinstance(ended, Outcome)
        assert ended.usage == {"speaker": PAID["speaker"] + Usage(len(whole))}
    assert isinstance(asked, Ask)
    more = {"speaker": Usage(calls=1, prompt_tokens=5)}
    (post,) = [
        post
        for post in conductor.on(CallFailed(7, TERM, 3, "refused", "no", more), 0.0)
        if isinstance(post.message, Outcome)
    ]
    assert isinstance(post.message, Outcome)
    assert post.message.usage == {"speaker": PAID["speaker"] + more["speaker"] + Usage(2)}


def test_a_refiner_has_put_on_disk_itself_what_its_failed_calls_took() -> None:
    _, conductor = crowd(breaker=1000)
    (first, *_) = conductor.fill(0.0)
    assert isinstance(first.message, Ask)
    number, turn, posts = first.message.number, 1, [first]
    while isinstance(posts[0].message, Ask):
        conductor.on(Spoke(number, TERM, Turn(turn, (turn - 1) % 2, f"turn {turn}")), 0.0)
        posts = conductor.on(TurnStored(number, TERM, turn), 0.0)
        turn += 1
    assert not notes(conductor.on(CallFailed(number, TERM, 0, "server", "down", {"verifier": Usage(2)}), 0.0))
    (settled,) = [
        post.message for post in conductor.on(OutcomeStored(1), 0.0) if isinstance(post.message, Outcome)
    ]
    assert settled.usage["verifier"] == Usage(2)


def test_a_403_is_the_dialogues_own_once_another_finishes_and_owed_if_none_does() -> None:
    _, conductor = crowd(breaker=3)
    conductor.fill(0.0)
    assert not notes(conductor.on(CallFailed(0, TERM, 1, "forbidden", "moderation"), 0.0))
    (settled,) = [
        post.message for post in conductor.on(OutcomeStored(1), 0.0) if isinstance(post.message, Outcome)
    ]
    assert (settled.number, settled.failed, settled.reason) == (0, "forbidden", "moderation")
    _, revoked = crowd(breaker=3)
    revoked.fill(0.0)
    for number in range(3):
        revoked.on(CallFailed(number, TERM, 1, "forbidden", "no such key"), 0.0)
    progress = revoked.progress()
    assert (progress.stopped_by, progress.ended) == ("breaker", 0)
    assert "no such key" in progress.stopped


@pytest.mark.parametrize("kind", ["forbidden", "too_large", "server"])
def test_what_only_some_dialogues_meet_is_not_owed_for_ever(kind: Any) -> None:
    """A resume in which nothing is owed but them: no other can finish and tell."""
    plan, _ = crowd()
    done = bytes([0b11111111, 0])  # the first eight of ten
    replicas = dict.fromkeys([*plan.agent_cultures(), REFINERS], 1)
    conductor = Conductor(plan, builders.settings(), done, TERM, replicas)
    conductor.fill(0.0)
    posts: list[Post] = []
    for number in (8, 9):
        posts += conductor.on(CallFailed(number, TERM, 1, kind, "no"), 0.0)
    failed = [post.message.failed for post in posts if isinstance(post.message, Outcome)]
    assert failed == ([] if kind == "server" else [kind, kind])
    assert conductor.progress().stopped_by == ("breaker" if kind == "server" else "")


def test_when_nothing_at_all_finishes_nothing_is_failed_for_good() -> None:
    plan, conductor = crowd(breaker=1000)
    waiting = conductor.fill(0.0)
    while waiting:
        waiting += conductor.on(CallFailed(waiting.pop(0).message.number, TERM, 1, "connection", "gone"), 0.0)
    progress = conductor.progress()
    assert progress.idle
    assert (progress.stopped_by, progress.ended) == ("breaker", 0)
    assert len(plan) == progress.planned


def test_an_answer_to_an_earlier_conductor_is_no_answer_to_this_one() -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    old = TERM - 1
    assert conductor.on(Spoke(0, old, Turn(1, 0, "said to another")), 0.0) == []
    assert conductor.on(CallFailed(0, old, 1, "unauthorised", "no"), 0.0) == []
    assert conductor.progress().turns == 0
    assert not conductor.progress().stopped


def test_what_was_asked_of_a_lost_actor_is_asked_again_and_of_no_other() -> None:
    _, conductor = crowd()
    posts = conductor.fill(0.0)
    for address in {post.address for post in posts}:
        assert conductor.lost(address) == [post for post in posts if post.address == address]
    assert conductor.lost("agent/nobody/0") == []


def test_draining_starts_nothing_and_abandoned_dialogues_stay_owed() -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    conductor.stop("drain", "asked to")
    conductor.stop("breaker", "a later reason")
    conductor.on(OutcomeStored(0), 0.0)
    progress = conductor.progress()
    assert (progress.in_flight, progress.stopped_by, progress.idle) == (2, "drain", False)
    assert conductor.abandon() == [1, 2]
    assert conductor.progress().idle
    assert conductor.on(Spoke(1, TERM, Turn(1, 0, "too late")), 0.0) == []


def test_a_dialogue_that_had_begun_goes_on_from_its_last_turn_before_new_ones() -> None:
    of = builders.settings(
        plan={"cultures": ["arabic"], "questions": ["wvs7-q28"], "dialogues_per_question": 10},
        limits={"dialogues_in_flight": 2},
    )
    plan = builders.plan(of)
    turns = (Turn(1, 0, "first"), Turn(2, 1, "second"))
    replicas = dict.fromkeys([*plan.agent_cultures(), REFINERS], 1)
    conductor = Conductor(plan, of, bytes(2), TERM, replicas, [InProgress(7, turns)])
    asked, other = (post.message for post in conductor.fill(0.0))
    assert isinstance(asked, Ask)
    assert (asked.number, asked.turn, asked.heard) == (7, 3, "second")
    assert (other.number, isinstance(other, Ask) and other.turn) == (0, 1)
    (post,) = conductor.on(NeedsTranscript(7, TERM, 3), 0.0)
    assert isinstance(post.message, Ask)
    assert post.message.transcript == turns


def test_no_turn_is_asked_for_before_the_last_one_is_on_disk() -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    (post,) = conductor.on(Spoke(0, TERM, Turn(1, 0, "said")), 0.0)
    assert (post.address, isinstance(post.message, Spoke)) == (COLLECTOR, True)
    assert conductor.on(Spoke(0, TERM, Turn(1, 0, "said again")), 0.0) == []
    assert conductor.on(CallFailed(0, TERM, 1, "server", "late"), 0.0) == []
    (post,) = conductor.on(TurnStored(0, TERM, 1), 0.0)
    assert isinstance(post.message, Ask)
    assert (post.message.turn, post.message.heard) == (2, "said")
    assert conductor.on(TurnStored(0, TERM, 1), 0.0) == []


def test_a_halt_records_what_comes_in_and_asks_for_nothing() -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    conductor.halt("budget", "it is spent")
    (post,) = conductor.on(Spoke(0, TERM, Turn(1, 0, "said")), 0.0)
    assert post.address == COLLECTOR
    assert conductor.on(TurnStored(0, TERM, 1), 0.0) == []
    assert conductor.progress().stopped_by == "budget"


def test_a_lost_refiner_is_told_which_calls_were_paid_for() -> None:
    _, conductor = crowd()
    (first, *_) = conductor.fill(0.0)
    assert isinstance(first.message, Ask)
    number, turn, posts = first.message.number, 1, [first]
    while isinstance(posts[0].message, Ask):
        conductor.on(Spoke(number, TERM, Turn(turn, (turn - 1) % 2, f"turn {turn}")), 0.0)
        posts = conductor.on(TurnStored(number, TERM, turn), 0.0)
        turn += 1
    assert isinstance(posts[0].message, Refine)
    steps = (Step(number=number, key=b"k", role="verifier", text="entails"),)
    (again,) = conductor.lost(posts[0].address, [InProgress(number, (), steps)])
    assert isinstance(again.message, Refine)
    assert again.message.steps == steps
    assert again.message.turns == posts[0].message.turns


def test_a_turn_that_is_stored_twice_after_a_halt_counts_once() -> None:
    _, conductor = crowd()
    conductor.fill(0.0)
    conductor.on(Spoke(0, TERM, Turn(1, 0, "said")), 0.0)
    conductor.halt("budget", "it is spent")
    assert conductor.on(TurnStored(0, TERM, 1), 0.0) == conductor.on(TurnStored(0, TERM, 1), 0.0) == []
    assert conductor.progress().turns == 1
    conductor.validate()


def test_after_a_halt_nothing_is_asked_again() -> None:
    _, conductor = crowd()
    (post, *_) = conductor.fill(0.0)
    conductor.halt("budget", "it is spent")
    assert conductor.lost(post.address) == []
    assert conductor.on(NeedsTranscript(0, TERM, 1), 0.0) == []
    assert conductor.abandon() == [0, 1, 2]
    conductor.validate()
