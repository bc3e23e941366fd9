"""Prompts for models of under about a billion parameters.

What holds such a model to a stance is the opening of its answer, which is given to it (`prefill`);
what it adds is how it goes on. These settings were found by trial on SmolLM2-135M. They are no part
of the method: larger models get `full`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from culturepark.cultures import Culture, describe
from culturepark.plan import Brief
from culturepark.ports import Prompt, Sampling
from culturepark.prompts.profile import Cue, script_step
from culturepark.text import tidy, unquoted, whole_sentences, without_name

# How each step of the script begins, for somebody with a stance: the paper's cues (give reasons;
# agree or not; more of your culture; more ideas; something to introduce; what it inspires) as the
# first words of the answer. Two people of one culture begin differently, or they echo each other.
_DELEGATE = (
    (
        "{opening}",
        "I hear you, but {opening_low}",
        "In {country}, many people would say that",
        "Another reason why I see it that way is that",
        "One custom we keep in {country} is that",
        "In my own family,",
        "After this talk, {opening_low}",
    ),
    (
        "For my part, {opening_low}",
        "What I see around me in {country} is that",
        "When I was a child, my parents",
        "To add something new, {opening_low}",
        "People who live near me",
        "A thing we often do in {country} is",
        "To sum up, {opening_low}",
    ),
)
# The same for the contact, who holds no drawn stance.
_CONTACT = (
    'Hello {other}! I would like to hear what you think about this: "{statement}" In {country},',
    "I see what you mean. Where I live,",
    "That is not quite how I grew up. In {country},",
    "I am not so sure about that, because",
    "Something people often do in {country} is that",
    "In my own family,",
    "Thank you, {other}. What I take from this is that",
)
_CONTACT_ANSWERS = "Where I come from in {country},"
"""How the contact begins when the other spoke first: the question is on the table already."""
# Free chat gives no cues but for the stance itself, which somebody who holds one comes back to.
_FREE_DELEGATE = (
    ("{opening}", "I understand, but for me", "I still say so: {opening_low}", "My family and I"),
    ("For my part, {opening_low}", "Where I live,", "As I said, {opening_low}", "My neighbours"),
)
_FREE_CONTACT = (_CONTACT[0], "I see. My friends", "Well, here in {country}")


class SmallProfile:
    """Short prompts, given openings, short answers."""

    name: Literal["full", "small"] = "small"
    judges = False

    def sampling(self, role: str) -> Sampling:
        # llama.cpp's own names; other servers would not know them. DRY keeps the talk from going
        # round in circles: it makes long repetitions of anything said before unlikely.
        steady = {
            "min_p": 0.1,
            "repeat_penalty": 1.12,
            "dry_multiplier": 0.8,
            "dry_allowed_length": 3,
            "dry_penalty_last_n": 2048,
        }
        by_role = {
            "speaker": Sampling(temperature=0.6, max_tokens=56, stop=("\n",), extra=steady),
            "in-culture": Sampling(temperature=0.6, max_tokens=56, stop=("\n",), extra=steady),
            "direct": Sampling(temperature=0.6, max_tokens=360, extra=steady),
            "rewriter": Sampling(temperature=0.3, max_tokens=48, stop=("\n",), extra=steady),
        }
        return by_role.get(role, Sampling())  # a small model serves no other role

    def system(self, brief: Brief, speaker: int, cultures: Mapping[str, Culture]) -> str:
        me, stance = brief.speakers[speaker], brief.stances[speaker]
        home = cultures[me.culture]
        lines = [f"You are {describe(me, home)}."]
        if len(brief.speakers) > 1:
            other = brief.speakers[1 - speaker]
            lines.append(f"You are talking with {describe(other, cultures[other.culture])}.")
        if stance is not None:
            lines.append(f"{stance.summary} You firmly hold this view.")
        else:
            lines.append(f'You are talking about this: "{brief.seed.statement}"')
        lines.append(
            "Speak as yourself, in the first person, in one or two short sentences, about your own life, "
            f"family and customs in {home.country}."
        )
        return " ".join(lines)

    def cue(self, brief: Brief, turn: int, heard: str, cultures: Mapping[str, Culture]) -> Cue:
        speaker = (turn - 1) % len(brief.speakers)
        me, stance = brief.speakers[speaker], brief.stances[speaker]
        question = f"What do you think about this: {brief.seed.statement} What are your reasons?"
        opening = stance.opening if stance is not None else ""
        if brief.kind == "direct":
            return Cue(f"{question} Give several reasons, one sentence each.", opening)
        begin = self._begin(brief, turn, heard, stance is None, speaker)
        names = {
            "opening": opening,
            "opening_low": opening if opening.startswith("I ") else opening[:1].lower() + opening[1:],
            "country": cultures[me.culture].country,
            "other": brief.speakers[1 - speaker].name,
            "statement": brief.seed.statement,
        }
        return Cue(heard or question, begin.format_map(names))

    def _begin(self, brief: Brief, turn: int, heard: str, is_contact: bool, speaker: int) -> str:
        """The pattern of a turn's first words."""
        if is_contact and turn <= 2 and heard:
            return _CONTACT_ANSWERS
        # A delegate who talks with the contact follows the first script, whoever speaks first.
        which = speaker if len(brief.delegates) > 1 else 0
        if brief.style == "self-guided":
            script = _CONTACT if is_contact else _DELEGATE[which]
            return script[script_step(turn, brief.utterances, len(script))]
        script = _FREE_CONTACT if is_contact else _FREE_DELEGATE[which]
        own = (turn - 1) // 2
        return script[0] if own == 0 else script[1 + (own - 1) % (len(script) - 1)]

    def clean(self, reply: str, cue: Cue, name: str, cut: bool) -> str:
        text = unquoted(without_name(tidy(reply), name))
        if cue.prefill and not text.startswith(cue.prefill[:20]):
            # Some servers give back the whole answer, some only what follows the given words.
            text = f"{cue.prefill} {text}"
        if text.count('"') % 2:  # it began to narrate: "..." she said
            text = text[: text.rindex('"')].rstrip()
        return whole_sentences(text)

    def extraction(self, brief: Brief, speaker: int, text: str) -> tuple[Prompt, dict[str, Any] | None]:
        raise AssertionError("a small model's opinions are its sentences, word for word")

    def verification(self, brief: Brief, speaker: int, opinion: str) -> tuple[Prompt, dict[str, Any] | None]:
        raise AssertionError("a small model does not judge; the embedder does")

    def rewriting(self, brief: Brief, speaker: int, opinion: str) -> tuple[Prompt, Cue]:
        stance = brief.stances[speaker]
        assert stance is not None  # only delegates' opinions are rewritten
        prompt = Prompt().add(
            "system",
            f"You are {brief.speakers[speaker].name}. {stance.summary} Put what you said into other words so "
            "that it fits your view. Keep the subject. One sentence.",
        )
        # As JSON writes it: a quotation mark in it does not end it.
        prompt.add("user", f"You said: {msgspec.json.encode(opinion).decode()}")
        return prompt, Cue("", stance.opening)
