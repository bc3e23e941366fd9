"""What a judge of made data reads. It changes nothing in how data is made."""

from __future__ import annotations

from collections.abc import Sequence

from culturepark.prompts.text import tidy

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
"""Earlier turns that a judge is shown, the latest ones."""
_LONGEST = 600
"""Characters of a turn or an opinion that a judge is shown."""


def kind_question(text: str) -> str:
    """Asks for the kind of an opinion."""
    return f'Somebody said: "{_shown(text)}"\nWhat is this above all?'


def subtype_question(text: str, kind: str) -> str:
    """Asks for the subtype of an opinion of a kind."""
    return f'Somebody told of a {kind}: "{_shown(text)}"\nWhat is it about above all?'


def verdict_question(statement: str, stance: str, text: str) -> str:
    """Asks how an opinion stands to the answer that its speaker gave."""
    return (
        f'In a survey on "{statement}" somebody answered: {stance}.\nAn opinion: "{_shown(text)}"\n'
        "How does the opinion stand to that answer?"
    )


def extends_question(statement: str, before: Sequence[str], text: str) -> str:
    """Asks whether a turn brings anything new."""
    return f"{_talk(statement, before, text)}\nDoes the latest turn extend the topic?"


def understands_question(statement: str, before: Sequence[str], text: str, mine: str, other: str) -> str:
    """Asks whether a turn shows understanding of the other speaker's culture; both as adjectives."""
    return (
        f"{_talk(statement, before, text)}\nThe latest speaker's culture is {mine}, the other's {other}. "
        "Does the latest turn show understanding of the other's culture?"
    )


def _talk(statement: str, before: Sequence[str], text: str) -> str:
    lines = "\n".join(f"- {_shown(one)}" for one in before[-_REMEMBERED:])
    return f'A talk on "{statement}". Said before:\n{lines}\nThe latest turn: "{_shown(text)}"'


def _shown(text: str) -> str:
    return tidy(text).replace("\n", " ")[:_LONGEST]
