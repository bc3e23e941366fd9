"""What a judge of made data reads. It changes nothing in how data is made."""

from __future__ import annotations

from collections.abc import Sequence

from culturepark.prompts.training_rows import judged_of_several

SYSTEM = "You label texts for a study of culture. You go by what a text says, not by whether you agree."

KINDS: dict[str, str] = {
    "belief": "A belief: what the speaker holds to be true or to be good",
    "norm": "A norm: what people should do, or should not do",
    "custom": "A custom: what people there do, year in, year out",
}
SUBTYPES: dict[str, dict[str, str]] = {
    "belief": {
        "faith": "On God, fate, the soul or what comes after death",
        "worth": "On what is worth striving for in a life",
        "people": "On what people, women, men or children are like",
        "society": "On how society, the state, the economy or science work",
    },
    "norm": {
        "duty": "A duty towards family, neighbours or country",
        "manners": "Good manners and respect",
        "ban": "Something forbidden or not done",
        "fairness": "Fair shares, the same rule for all, a word kept",
    },
    "custom": {
        "everyday": "The habits of an ordinary day or week",
        "feast": "A festival or a season's celebration",
        "passage": "Birth, growing up, marriage or death",
        "table": "Food, drink and guests",
    },
}
VERDICTS: dict[str, str] = {
    "entails": "It supports that answer, or follows from it",
    "contradicts": "It speaks against that answer",
    "novel": "It is about something else",
}
EXTENDS: dict[str, str] = {
    "yes": "Yes, it says something that was not said before",
    "no": "No, it repeats, agrees or thanks",
}
UNDERSTANDS: dict[str, str] = {
    "yes": "Yes, it takes up the other's way of life and makes sense of it",
    "no": "No, it leaves the other's way of life aside",
}

_REMEMBERED = 6
"""A judge is shown at most this many earlier turns, the latest ones."""
_LONGEST = 600
"""A judge is shown at most this many characters of a text, its first ones."""


def kind_question(text: str) -> str:
    """Asks for the kind of an opinion."""
    return _about("Somebody said this. What is it above all?", [("Text", text)])


def subtype_question(text: str, kind: str) -> str:
    """Asks for the subtype of an opinion of a kind."""
    return _about(f"Somebody told of this {kind}. What is it about above all?", [("Text", text)])


def verdict_question(statement: str, stance: str, text: str) -> str:
    """Asks how an opinion stands to the answer that its speaker gave."""
    return _about(
        "Somebody answered a survey, and gave an opinion. How does the opinion stand to that answer?",
        [("The survey's statement", statement), ("The answer", stance), ("The opinion", text)],
    )


def extends_question(statement: str, before: Sequence[str], text: str) -> str:
    """Asks whether a turn brings anything new. `before` holds what was said until then, oldest first, by
    two speakers in turn."""
    return _about("Does the latest turn of this talk extend the topic?", _talk(statement, before, text))


def understands_question(statement: str, before: Sequence[str], text: str, mine: str, other: str) -> str:
    """Asks whether a turn shows understanding of the other speaker's culture; both as adjectives."""
    return _about(
        f"The latest speaker's culture is {mine}, the other's {other}. Does the latest turn of this talk "
        "show understanding of the other's culture?",
        _talk(statement, before, text),
    )


def _about(question: str, texts: Sequence[tuple[str, str]]) -> str:
    return judged_of_several(question, texts, _LONGEST)


def _talk(statement: str, before: Sequence[str], text: str) -> list[tuple[str, str]]:
    said = [
        ("Before, by the other" if back % 2 else "Before, by the latest speaker", one)
        for back, one in zip(range(len(before), 0, -1), before, strict=True)
    ]
    return [("The topic", statement), *said[-_REMEMBERED:], ("The latest turn", text)]
