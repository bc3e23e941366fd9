"""Refinement: what is read out of replies, and that every opinion has a fate and a reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from culturepark.messages import Opinion, Step, Turn
from culturepark.models.errors import ModelError
from culturepark.plan import Brief
from culturepark.ports import Embedding, Prompt, Sampling
from culturepark.prompts.registry import profile_named
from culturepark.refine import journal
from culturepark.refine.extract import MAX_OPINIONS, read_opinions, sentences_as_opinions
from culturepark.refine.journal import Journal
from culturepark.refine.pipeline import RefineError, Refinement, Refiner, RoleModel
from culturepark.refine.verify import read_verdict
from culturepark.refine.wording import first_person, holds_no_opinion
from culturepark.settings import PaperFaults, RefineSettings
from culturepark.text import sentences, tidy, words
from culturepark.usage import Usage
from tests import builders

TURN = "In Jordan elders eat first. My father taught me so! We never waste bread."

# --- reading an extractor's reply

LISTED = ["Elders eat first.", "Bread is never wasted."]
OBJECT = json.dumps({"opinions": [{"opinion": o, "quote": ""} for o in LISTED]})


@pytest.mark.parametrize(
    "reply",
    [
        OBJECT,
        f"```json\n{OBJECT}\n```",
        f"Here is what I found:\n{OBJECT}\nI hope this helps.",
        json.dumps(LISTED),
        f"The opinions are {json.dumps(LISTED)}.",
        json.dumps([{"opinion": o} for o in LISTED]),
        json.dumps({"opinions": LISTED}),
        json.dumps({"opinions": [{"opinion": o, "quote": None, "more": 1} for o in LISTED]}),
        "1. Elders eat first.\n2. Bread is never wasted.",
        "Opinions:\n\n1) Elders eat first.\n2) Bread is never wasted.\n\nThat is all.",
        "- Elders eat first.\n- Bread is never wasted.",
        "* Elders eat first.\n* Bread is never wasted.",
    ],
)
def test_the_opinions_are_found_in_every_shape_models_use(reply: str) -> None:
    found = read_opinions(reply, TURN)
    assert found is not None
    assert [one.text for one in found] == LISTED


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "There is nothing to say.",
        '{"opinions": "none"}',
        '{"opinions": [1, 2]}',
        '{"opinions": [{"text": "x"}]}',
        '{"opinions": [{"opinion": "cut off',
        "{" * 5000,
        "[" * 50_000,
        "null",
    ],
)
def test_what_is_no_list_is_not_guessed_at(reply: str) -> None:
    assert read_opinions(reply, TURN) is None


def test_an_empty_list_is_an_answer() -> None:
    assert read_opinions('{"opinions": []}', TURN) == []
    assert read_opinions('{"opinions": [{"opinion": " \\u0000 ", "quote": "x"}]}', TURN) == []


def test_more_opinions_than_a_turn_can_hold_are_not_believed() -> None:
    reply = json.dumps([f"Opinion {i}." for i in range(200)])
    assert len(read_opinions(reply, TURN) or []) == MAX_OPINIONS
    assert len(read_opinions(reply, TURN, 50) or []) == 50


@pytest.mark.parametrize(
    ("turn", "quote", "expected"),
    [
        (TURN, "My father taught me so!", "My father taught me so!"),
        (TURN, "my FATHER taught me so.", "My father taught me so"),
        (TURN, "  We never waste bread. ", "We never waste bread."),
        (TURN, "Something nobody said.", TURN),
        (TURN, "   ", TURN),
        # These letters change their length when they are made small.
        ("\u0130\u0130\u0130 Istanbul is my home. We feed guests.", "we feed guests", "We feed guests"),
        ("\u1e9e\u0130 and more. We keep it.", "WE KEEP IT.", "We keep it."),
    ],
)
def test_spans_hold_the_quote(turn: str, quote: str, expected: str) -> None:
    (found,) = (
        read_opinions(json.dumps({"opinions": [{"opinion": "Other words here.", "quote": quote}]}), turn)
        or []
    )
    assert turn[found.start : found.end] == expected


@given(st.text(max_size=60), st.text(max_size=20))
def test_spans_never_leave_the_turn(turn: str, quote: str) -> None:
    reply = json.dumps({"opinions": [{"opinion": "x", "quote": quote}]})
    for found in read_opinions(reply, turn) or []:
        assert 0 <= found.start <= found.end <= len(turn)
        if quote.strip() and quote.strip() in turn:
            assert turn[found.start : found.end].lower() == quote.strip().lower()


# --- sentences


@given(st.text(alphabet="ab Z.!?\n\"')\u3002 ", max_size=60))
def test_sentences_cover_the_text_in_order_and_exactly(text: str) -> None:
    end = 0
    left = list(text)
    for start, stop in sentences(text):
        assert end <= start < stop <= len(text)
        assert not text[start].isspace()
        left[start:stop] = " " * (stop - start)
        end = stop
    # Nothing but blanks and stops is outside of all sentences.
    assert not [c for c in left if c.isalnum()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One thing. Another thing! A third?", ["One thing.", "Another thing!", "A third?"]),
        ("Dr. Haddad said it. I agree.", ["Dr. Haddad said it.", "I agree."]),
        ("It cost 3.5 dinars. Not much.", ["It cost 3.5 dinars.", "Not much."]),
        ('She said "no." Then she left.', ['She said "no."', "Then she left."]),
        ("No stop at the end", ["No stop at the end"]),
        ("First line\nSecond line", ["First line", "Second line"]),
        (
            "\u6211\u7231\u5bb6\u3002\u5bb6\u7231\u6211\u3002",
            ["\u6211\u7231\u5bb6\u3002", "\u5bb6\u7231\u6211\u3002"],
        ),
        ("...", []),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert [text[a:b] for a, b in sentences(text)] == expected


def test_a_sentence_that_leans_on_the_one_before_stays_with_it() -> None:
    turn = "We eat together. It keeps us close. My father works hard."
    found = sentences_as_opinions(turn)
    assert [one.text for one in found] == ["We eat together. It keeps us close.", "My father works hard."]
    assert all(turn[one.start : one.end] == one.text for one in found)


@given(st.text(max_size=40))
def test_tidy_text_can_be_kept(text: str) -> None:
    clean = tidy(text + "\ud800")
    clean.encode()
    assert not {"\x00", "\r", "\t", "\u202e"} & set(clean)
    assert not clean.startswith((" ", "\n"))


def test_a_template_token_does_not_appear_when_another_inside_it_goes() -> None:
    assert tidy("a<|im_<|x|>start|>b") == "ab"


# --- verdicts


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"reason": "it says so", "verdict": "entails"}', "entails"),
        ('```json\n{"verdict": " Contradicts ", "reason": "x"}\n```', "contradicts"),
        ('I think: {"reason": "new", "verdict": "novel"} is right', "novel"),
        ("Novel.", "novel"),
        ("The opinion contradicts the answer.", "contradicts"),
        ('{"reason": "does not contradict it", "verdict": "entails"}', "entails"),
        ("", None),
        ("It entails or contradicts, who knows.", None),
        ("The opinion is not novel.", None),
        ("It doesn't say that it entails this.", None),
        ('{"verdict": "irrelevant"}', None),
        ('{"verdict": "entails|contradicts"}', None),
        ('{"verdict": ["entails"]}', None),
        ('{"verdict": null, "reason": "entails"}', None),
        ("{" * 5000, None),
    ],
)
def test_a_verdict_is_read_and_never_guessed(reply: str, verdict: str | None) -> None:
    judgement = read_verdict(reply)
    assert (judgement.verdict if judgement else None) == verdict


# --- words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rania thinks that her family comes first.", "I think that my family comes first."),
        ("She believes that she is right.", "I believe that I am right."),
        ("Rania strongly believes that elders eat first.", "I strongly believe that elders eat first."),
        ("Rania thinks that Rania's work is good.", "I think that my work is good."),
        ("She feels that people respect her.", "I feel that people respect me."),
        ("She says that she always wears what she likes.", "I say that I always wear what I like."),
        ("He hopes that he can feed his children.", "I hope that I can feed my children."),
        ("Rania thinks that her father is right.", "I think that my father is right."),
        ("I think that my mother is right.", "I think that my mother is right."),
        ("My brother thinks that he is right.", "My brother thinks that he is right."),
        ("Rania Khalil once lived here.", "Rania Khalil once lived here."),
    ],
)
def test_first_person(text: str, expected: str) -> None:
    assert first_person(text, "Rania") == expected


@pytest.mark.parametrize(
    "text",
    [
        "Rania thinks that her father is right and that he should decide what she wears.",
        "Rania thinks that her mother is right and that she should decide.",
        "Rania thinks that a judge has to keep his word.",
        "Rania thinks that God gives his own.",
        "She thinks that he is wrong.",
        "She thinks that I am wrong.",
        "Rania thinks that she works hard and earns little.",
        "Rania thinks that family is everything and believes that elders are wise.",
        "Rania thinks that she sings well.",
        "Rania thinks that people let her work.",
        "Rania thinks that she's free.",
        "The speaker says that they like it.",
        "The speaker says they like it.",
    ],
)
def test_what_might_change_in_meaning_stays_in_the_third_person(text: str) -> None:
    assert first_person(text, "Rania") == text


@pytest.mark.parametrize(
    ("text", "empty"),
    [
        ("There is no clear opinion in this message.", True),
        ("As an AI, I hold no views.", True),
        ("What do you think about your family?", True),
        ('"Do you agree?"', True),
        ("\u4f60\u89c9\u5f97\u5462\uff1f", True),
        ("Thank you for telling me about your town.", True),
        ("Hello Omar, how good to meet you here today.", True),
        ("I'm glad that we could talk about this.", True),
        ("Elders are to be heard before the young speak.", False),
        ("People here hold that guests come first.", False),
        ("Thankfulness is taught to children early.", False),
        ("Thank you for being here.", True),
        ("I'm glad you're on board and listening to my insights.", True),
        ("I\u2019m glad you\u2019re on board.", True),
        ("Well, that's wonderful.", True),
        ("If there's anything else I can do to help, please let me know.", True),
        ("Well, I'm glad we've reached a mutual understanding here.", True),
        ("I appreciate your kindness towards me.", True),
        ("You see?", True),
        ("Hello Noor!", True),
        ("You're welcome.", True),
        ("I am happy when children respect their parents because it keeps the family together.", False),
        ("I am glad that women can work and I think every husband should share the housework.", False),
        ("Please God, a child must honour his father.", False),
        ("Hi Omar, I strongly believe parents come first.", False),
        ("Thank you for coming. In our home elders eat first.", False),
        ("I'm glad you came, but elders eat first in our home.", False),
        ("Thanks to my parents I learned that honest work matters.", False),
        ("It is good to be honest.", False),
        ("It is great that women can vote.", False),
        ("It is good to help your neighbours.", False),
        ("Please respect your parents at all times.", False),
        ("It was a pleasure talking with you today.", True),
        ("Nice to meet you, Omar.", True),
        ("If there is any quarrel, the elders settle it.", False),
        ("Welcome guests bring blessings to a house.", False),
        ("All the best in life comes from family.", False),
        ("Until we meet the needs of the poor we are not free.", False),
        ("Thank you, Emma. For sharing with neighbours is what God wants.", False),
        ("Gracias. Las madres mandan en casa.", False),
        ("Muchas gracias, Emma. Hasta luego.", True),
        ("Goodbye and take care.", True),
    ],
)
def test_what_holds_no_opinion(text: str, empty: bool) -> None:
    assert holds_no_opinion(text) is empty


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("one, two - three", 3), ("1 2 3", 0), ("\u6211\u7231\u6211\u5bb6", 2)]
)
def test_words(text: str, count: int) -> None:
    assert words(text) == count


# --- the whole of it


class Office:
    """One model for all three roles, which answers by what it is asked for."""

    def __init__(self) -> None:
        self.extracted: Any = ["Elders should always eat before the young."]
        self.verdicts: dict[str, Any] = {}
        self.rewritten: Any = "Elders really must be served before anybody else."
        self.calls: Counter[str] = Counter()

    def __call__(self, prompt: Prompt, schema: dict[str, Any] | None) -> Any:
        properties = (schema or {}).get("properties", {})
        if "opinions" in properties:
            self.calls["extractor"] += 1
            return self.extracted(prompt) if callable(self.extracted) else json.dumps(self.extracted)
        if "verdict" in properties:
            self.calls["verifier"] += 1
            asked = next(m["content"] for m in prompt.messages() if m["role"] == "user")
            said = self.verdicts.get(json.loads(asked)["opinion"], "entails")
            return json.dumps({"reason": f"{said}, I say", "verdict": said}) if said in VERDICTS else said
        self.calls["rewriter"] += 1
        return self.rewritten


VERDICTS = ("entails", "contradicts", "novel")
CROSS = builders.small_plan(kinds=["cross"])


def delegate_turns(brief: Brief, *texts: str) -> list[Turn]:
    """A transcript in which the delegate says these things, and the contact others."""
    turns: list[Turn] = []
    for text in texts:
        for voice in range(len(brief.speakers)):
            said = text if voice in brief.delegates else "I hold the very opposite of all that you hold."
            turns.append(Turn(len(turns) + 1, voice, said))
    return turns


async def refine(
    office: Any,
    *texts: str,
    brief: Brief | None = None,
    embedder: Any = None,
    profile: Any = "full",
    **settings: Any,
) -> Refinement:
    brief = brief or CROSS.brief(0)
    role = RoleModel(builders.FakeChat(office), profile_named(profile), Sampling())
    refiner = Refiner(
        RefineSettings(**settings),
        dict.fromkeys(("extractor", "verifier", "rewriter"), role),
        embedder or builders.CountingEmbedder(),
    )
    refined = await refiner.refine(brief, delegate_turns(brief, *(texts or (TURN,))))
    for opinion in refined.opinions:
        # Every opinion has a fate: a reason, or a verdict and a vector.
        assert bool(opinion.rejected) == (not opinion.vector)
        assert opinion.rejected or opinion.verdict in ("entails", "novel")
        assert opinion.detail or not opinion.rejected
        assert opinion.speaker in brief.delegates
    assert len({opinion.id for opinion in refined.opinions}) == len(refined.opinions)
    return refined


async def one(office: Any, **settings: Any) -> Opinion:
    (opinion,) = (await refine(office, **settings)).opinions
    return opinion


async def test_an_opinion_that_agrees_is_kept_with_its_vector() -> None:
    office = Office()
    opinion = await one(office)
    assert (opinion.text, opinion.first_verdict, opinion.verdict) == (
        office.extracted[0],
        "entails",
        "entails",
    )
    assert not opinion.rewritten
    assert np.linalg.norm(np.frombuffer(opinion.vector, np.float32)) == pytest.approx(1, abs=1e-5)
    assert office.calls == {"extractor": 1, "verifier": 1}


async def test_only_delegates_are_listened_to() -> None:
    in_culture = builders.small_plan(kinds=["in-culture"]).brief(0)
    for brief, expected in ((CROSS.brief(0), 2), (in_culture, 4)):
        office = Office()
        refined = await refine(office, TURN, TURN, brief=brief)
        assert office.calls["extractor"] == len(refined.opinions) == expected
        assert {o.speaker for o in refined.opinions} == set(brief.delegates)


async def test_a_reply_that_cannot_be_read_is_asked_for_once_more() -> None:
    office = Office()
    replies = iter(["I am not sure what you mean.", json.dumps(["Bread is a gift that nobody wastes."])])
    office.extracted = lambda prompt: next(replies)
    refined = await refine(office)
    assert [o.text for o in refined.opinions] == ["Bread is a gift that nobody wastes."]
    assert refined.usage["extractor"].calls == 2
    assert not refined.notes


async def test_twice_unreadable_is_noted_and_loses_only_that_turn() -> None:
    office = Office()
    office.extracted = lambda prompt: (
        json.dumps(LISTED) if "Bread" in prompt.messages()[1]["content"] else "?"
    )
    refined = await refine(office, "Family is everything.", "Bread is holy.")
    assert len(refined.opinions) == 2
    assert len(refined.notes) == 1
    assert refined.usage["extractor"].calls == 3
    assert "turn" in refined.notes[0]


async def test_a_verdict_that_cannot_be_read_is_no_verdict() -> None:
    office = Office()
    office.verdicts = {office.extracted[0]: "maybe"}
    opinion = await one(office)
    assert (opinion.rejected, opinion.verdict, office.calls["verifier"]) == ("unreadable_verdict", None, 2)


async def test_a_contradiction_is_rewritten_and_the_new_text_is_what_is_verified() -> None:
    office = Office()
    office.verdicts = {office.extracted[0]: "contradicts", office.rewritten: "entails"}
    opinion = await one(office)
    assert (opinion.text, opinion.extracted) == (office.rewritten, office.extracted[0])
    assert (opinion.first_verdict, opinion.verdict, opinion.rewritten) == ("contradicts", "entails", True)
    assert not opinion.rejected
    assert office.calls == {"extractor": 1, "verifier": 2, "rewriter": 1}


async def test_the_papers_fault_verifies_the_old_text() -> None:
    office = Office()
    office.verdicts = {office.extracted[0]: "contradicts", office.rewritten: "entails"}
    opinion = await one(office, faults=PaperFaults(verify_old_text=True))
    assert (opinion.rejected, opinion.verdict) == ("contradicts_after_rewrite", "contradicts")


@pytest.mark.parametrize(
    ("rewritten", "verdict", "reason"),
    [
        ("Elders really must be served before anybody.", "contradicts", "contradicts_after_rewrite"),
        ("The weather is very fine today in town.", "novel", "off_topic_after_rewrite"),
        ("Elders really must be served before anybody.", "well", "unreadable_verdict"),
        ("Elders first.", "entails", "too_short"),
        ("There is no opinion in what I was given.", "entails", "no_opinion"),
    ],
)
async def test_a_rewrite_is_judged_like_any_opinion(rewritten: str, verdict: str, reason: str) -> None:
    office = Office()
    office.rewritten = rewritten
    office.verdicts = {office.extracted[0]: "contradicts", rewritten: verdict}
    opinion = await one(office)
    assert (opinion.rejected, opinion.text, opinion.rewritten) == (reason, rewritten, True)
    assert opinion.first_verdict == "contradicts"
    assert opinion.verdict == (verdict if verdict in VERDICTS else None)


async def test_an_empty_rewrite_leaves_the_opinion_as_it_was() -> None:
    office, embedder = Office(), builders.CountingEmbedder()
    office.rewritten = "<|im_end|>"
    office.verdicts = {office.extracted[0]: "contradicts"}
    opinion = await one(office, embedder=embedder)
    assert (opinion.rejected, opinion.text, opinion.rewritten) == ("contradicts", office.extracted[0], False)
    assert office.calls["verifier"] == 1
    assert not embedder.batches


async def test_without_rewriting_a_contradiction_goes() -> None:
    office = Office()
    office.verdicts = {office.extracted[0]: "contradicts"}
    assert (await one(office, rewrite=False)).rejected == "contradicts"
    assert not office.calls["rewriter"]


@pytest.mark.parametrize(
    ("settings", "rejected"),
    [
        ({}, ""),
        ({"train_on_novel": False}, ""),
        ({"faults": PaperFaults(drop_novel=True)}, "novel"),
    ],
)
async def test_novel_opinions_are_kept_unless_settings_say_otherwise(settings: Any, rejected: str) -> None:
    office = Office()
    office.verdicts = {office.extracted[0]: "novel"}
    opinion = await one(office, **settings)
    assert (opinion.rejected, opinion.verdict) == (rejected, "novel")


async def test_nothing_is_spent_on_what_is_no_opinion() -> None:
    office, embedder = Office(), builders.CountingEmbedder()
    office.extracted = [
        "Too short.",
        "What do you think about that, my friend?",
        "Guests are always fed before us.",
    ]
    refined = await refine(office, embedder=embedder)
    assert [o.rejected for o in refined.opinions] == ["too_short", "no_opinion", ""]
    assert office.calls["verifier"] == 1
    assert embedder.batches == [["Guests are always fed before us."]]
    assert refined.usage["embedder"] == Usage(calls=1, unreported=1)


async def test_the_third_person_becomes_the_first() -> None:
    office, brief = Office(), CROSS.brief(0)
    name = brief.speakers[brief.delegates[0]].name
    office.extracted = [f"{name} thinks that her children should be free."]
    assert (await one(office)).text == "I think that my children should be free."


@pytest.mark.parametrize("role", ["extractor", "verifier", "rewriter", "embedder"])
async def test_a_failing_model_fails_the_dialogue_with_all_that_was_spent(role: str) -> None:
    broken = ModelError("server", "down", usage=Usage(calls=1, prompt_tokens=100))
    office, embedder = Office(), builders.CountingEmbedder()
    office.verdicts = {office.extracted[0]: "contradicts"}
    if role == "extractor":
        # One turn fails, the other is paid for: both are counted.
        office.extracted = lambda p: broken if "Bread" in p.messages()[1]["content"] else json.dumps(LISTED)
    elif role == "verifier":
        office.verdicts = {office.extracted[0]: broken}
    elif role == "rewriter":
        office.rewritten = broken
    else:
        office.verdicts = {}

        async def fail(texts: Any) -> Any:
            raise broken

        embedder.embed = fail  # type: ignore[method-assign]
    with pytest.raises(RefineError) as caught:
        await refine(office, "Family is everything.", "Bread is holy.", embedder=embedder)
    assert caught.value.cause.kind == "server"
    usage = caught.value.usage
    failing = 2 if role in ("verifier", "rewriter") else 1
    assert usage[role].prompt_tokens >= 100 * failing
    assert usage["extractor"].calls == 2


class Book:
    """A journal's disk."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    async def keep(self, step: Step) -> None:
        self.steps.append(step)

    def usage(self) -> dict[str, Usage]:
        """What all that is on it took."""
        total: dict[str, Usage] = {}
        for step in self.steps:
            total[step.role] = total.get(step.role, Usage()) + step.usage
        return total


class PaidEmbedder(builders.CountingEmbedder):
    """Tells what it took."""

    async def embed(self, texts: Sequence[str]) -> Embedding:
        embedding = await super().embed(texts)
        return Embedding(embedding.vectors, Usage(calls=1, prompt_tokens=len(texts)))


async def test_vectors_that_no_record_can_hold_are_counted_and_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal, "RECORD_BYTES", 100)
    book = Book()
    kept = Journal(0, (), book.keep)
    embedding = await kept.embedding(b"asked", 1, lambda: PaidEmbedder().embed(["bread"]))
    assert embedding.vectors.shape[0] == 1
    assert [(step.only_usage, step.vectors) for step in book.steps] == [(True, b"")]
    assert book.usage() == {"embedder": embedding.usage} == {"embedder": Usage(1, 1)}


@pytest.mark.parametrize("profile", ["full", "small"])
async def test_all_that_a_refinement_took_is_on_disk_and_counted_once(profile: str) -> None:
    """Also what failed calls and the positions of the question took, over an attempt that came to nothing."""
    office, book = Office(), Book()
    down = ModelError("server", "down", usage=Usage(calls=2, prompt_tokens=7, unreported=1))
    listed = json.dumps(office.extracted)
    office.extracted = lambda p: down if "Bread" in p.messages()[1]["content"] else listed
    embedder = PaidEmbedder()
    role = RoleModel(builders.FakeChat(office), profile_named(profile), Sampling())
    roles = dict.fromkeys(("extractor", "verifier", "rewriter"), role)
    refiner = Refiner(RefineSettings(), roles, embedder, paid_vectors=True)
    brief = CROSS.brief(0)
    turns = delegate_turns(brief, "My whole family eats together at home.", "Bread is holy to my old mother.")
    if profile == "full":
        with pytest.raises(RefineError) as caught:
            await refiner.refine(brief, turns, Journal(0, (), book.keep))
        assert caught.value.usage == book.usage()
        office.extracted = lambda p: listed
    done = await refiner.refine(brief, turns, Journal(0, tuple(book.steps), book.keep))
    assert done.usage == book.usage()
    paid = sum(len(batch) for batch in embedder.batches)
    assert done.usage["embedder"] == Usage(calls=len(embedder.batches), prompt_tokens=paid)
    if profile == "full":
        assert done.usage["extractor"] == Usage(calls=4, prompt_tokens=27, completion_tokens=10, unreported=1)


@pytest.mark.parametrize("kind", ["forbidden", "too_large"])
async def test_what_may_be_the_keys_fault_costs_no_opinion_unseen(kind: Any) -> None:
    office = Office()
    office.verdicts = {office.extracted[0]: ModelError(kind, "no")}
    with pytest.raises(RefineError):
        await refine(office, "Family is everything.")


@pytest.mark.parametrize("role", ["extractor", "verifier", "rewriter"])
async def test_a_refusal_costs_the_opinion_and_not_the_dialogue(role: str) -> None:
    refused = ModelError("refused", "a content filter", usage=Usage(calls=1, prompt_tokens=100))
    office = Office()
    office.verdicts = {office.extracted[0]: "contradicts"}
    if role == "extractor":
        office.extracted = lambda p: refused if "Bread" in p.messages()[1]["content"] else json.dumps(LISTED)
    elif role == "verifier":
        office.verdicts = {office.extracted[0]: refused}
    else:
        office.rewritten = refused
    refined = await refine(office, "Family is everything.", "Bread is holy.")
    assert refined.opinions
    assert refined.usage[role].prompt_tokens >= 100
    rejected = {o.rejected for o in refined.opinions if o.rejected}
    if role == "extractor":
        assert any("a content filter" in note for note in refined.notes)
    elif role == "verifier":
        assert "unreadable_verdict" in rejected
        assert any("a content filter" in o.detail for o in refined.opinions)
    else:
        assert "contradicts" in rejected


async def test_where_there_is_no_opinion_nothing_is_embedded() -> None:
    embedder = builders.CountingEmbedder()
    refined = await refine(AssertionError, "Shall we have tea?", profile="small", embedder=embedder)
    assert [o.rejected for o in refined.opinions] == ["no_opinion"]
    assert not embedder.batches


async def test_a_small_models_opinions_are_its_own_sentences() -> None:
    """No model is asked: sentences are taken word for word, and the embedder judges."""
    embedder = builders.CountingEmbedder()
    said = "My mother and father are the centre of my life. Shall we have tea?"
    refined = await refine(AssertionError, said, profile="small", embedder=embedder, rewrite=False)
    assert [o.extracted for o in refined.opinions] == [said[:-19], "Shall we have tea?"]
    for opinion in refined.opinions:
        assert said[opinion.start : opinion.end] == opinion.extracted
    assert refined.opinions[1].rejected == "no_opinion"
    assert refined.opinions[0].first_verdict in VERDICTS
    embedded = [text for batch in embedder.batches for text in batch]
    assert embedded.count(refined.opinions[0].text) == 1  # judged and kept by one vector
