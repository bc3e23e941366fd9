"""The health of a dialogue: what is wrong with a turn, and what is done about it.

    found = symptoms(brief, earlier, turn)
    verdict(found, settings.health, retried=False, late=is_late(turn.number, brief.utterances))

Pure, and cheap enough for every turn. These are heuristics: nothing here is certain, but each symptom is
found by words that are hardly ever said by chance (precision before recall), and a turn that is merely dull
has none. English is always looked for, and beside it the language of the dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from culturepark.dialogue.repetition import Earlier
from culturepark.messages import Turn
from culturepark.plan import Brief
from culturepark.seeds.model import Answers, Seed
from culturepark.seeds.stance import Stance, stance_of
from culturepark.settings import HealthSettings, Symptom
from culturepark.text import is_only_thanks

Verdict = Literal["accept", "retry", "end"]

RETRIED = "retried:"
"""Prefix of the label of a symptom of an attempt at the turn that was discarded and made again."""


def symptoms(brief: Brief, earlier: Earlier, turn: Turn) -> tuple[Symptom, ...]:
    """What is wrong with `turn`, which follows `earlier` ones of the same dialogue.

    - `empty`: there is no letter and no digit in it.
    - `role_flip`: it begins with the other's name, or a role, as a label (or a line of it does), says
      "I am" with the other's name, or speaks as moderator.
    - `assistant_phrase`: it speaks as an assistant does ("as an AI", "how can I help you").
    - `left_stance`: a delegate argues for another side of the question in the very words of the survey ("I
      do not agree that ..."). A stance that is left in other words is found by the verifier, which reads each
      opinion; so is one in a dialogue in another language than the questions'.
    - `repeated`, `looping`: it says again what was said; see `Earlier.again`.
    - `dies_in_thanks`: thanks, a farewell and good wishes, and nothing else.
    """
    text = turn.text
    if len(text) < _TINY and not any(map(str.isalnum, text)):
        return ("empty",)
    low = text.lower()
    if not low.isascii():
        low = low.replace("\u2019", "'")
    found: list[Symptom] = []
    if _flips_role(brief, turn.speaker, text, low):
        found.append("role_flip")
    if _speaks_as_assistant(brief.language, low):
        found.append("assistant_phrase")
    stance = brief.stances[turn.speaker]
    if stance is not None and _leaves_stance(brief.seed, stance, low):
        found.append("left_stance")
    if (again := earlier.again(text, turn.number)) is not None:
        found.append(again)
    if len(text) < _BRIEF and is_only_thanks(low):
        found.append("dies_in_thanks")
    return tuple(found)


def verdict(found: Iterable[str], policy: HealthSettings, *, retried: bool, late: bool) -> Verdict:
    """What to do about a turn with these symptoms, or labels.

    `retry` goes before `end`, and is asked for only while the turn has not been `retried`. A dialogue
    ends (with this turn as its last) only when it is `late`; before that the turn is kept.
    """
    if policy.off:
        return "accept"
    answers = {getattr(policy, symptom, "keep") for symptom in found}
    if "retry" in answers and not retried:
        return "retry"
    return "end" if "end" in answers and late else "accept"


def is_late(number: int, utterances: int) -> bool:
    """Whether at least half of a dialogue's turns are said once turn `number` is."""
    return 2 * number >= utterances


def ends(number: int, labelled: Iterable[str], policy: HealthSettings, utterances: int) -> bool:
    """Whether turn `number`, kept with these labels, is its dialogue's last."""
    return verdict(labelled, policy, retried=True, late=is_late(number, utterances)) == "end"


def labels(found: Iterable[str], dropped: Iterable[str] = ()) -> tuple[str, ...]:
    """The labels stored with a turn: its symptoms, and those of the attempt that was discarded for it."""
    return (*(RETRIED + symptom for symptom in dropped), *found)


# --- speaking as another person --------------------------------------------------------------------

_TINY = 40
"""Characters: a shorter text may hold no word at all, and a place before this is at the beginning."""
_ROLE_LABEL = re.compile(
    r"(?:^|\n)[\s*_#\[(<\"']{0,4}(?:system|assistant|user|human|moderator|interviewer|narrator|ai|bot|chatbot|tool)"
    r"\s?[\]*_)>\"']{0,3}\s?[:\uff1a]"
)
_ROLE_LABEL_CHARS = 24
"""Characters at the beginning of a turn in which a role's label is looked for."""
_MODERATES = re.compile(r"\bas (?:your|the|today's) moderator\b|\bi am (?:your|the|today's) moderator\b")

# What comes before one's own name, after a space or at the beginning.
_I_AM = {
    "English": ("i am ", "i'm ", "my name is ", "my name's "),
    "Arabic": ("أنا ", "اسمي "),
    "Bengali": (
        "আমি ",
        "আমার নাম ",
    ),
    "Chinese": ("我是", "我叫"),
    "German": ("ich bin ", "ich heiße ", "mein name ist "),
    "Korean": ("나는 ", "저는 ", "제 이름은 ", "내 이름은 "),
    "Portuguese": ("sou ", "sou o ", "sou a ", "me chamo ", "meu nome é "),
    "Spanish": ("soy ", "me llamo ", "mi nombre es "),
    "Turkish": ("ben ", "benim adım "),
}
_SUFFIXES = {"Korean", "Chinese"}
"""Languages whose names are followed by further letters without a space."""


def _flips_role(brief: Brief, speaker: int, text: str, low: str) -> bool:
    if (":" in text or "\uff1a" in text) and (
        _ROLE_LABEL.match(low[:_ROLE_LABEL_CHARS]) or ("\n" in low and _ROLE_LABEL.search(low))
    ):
        return True
    if "moderator" in low and _MODERATES.search(low):
        return True
    if len(brief.speakers) < 2:
        return False
    other = brief.speakers[1 - speaker].name.lower()
    return other in low and any(_speaks_as(brief.language, low, at, other) for at in _places(low, other))


def _places(low: str, name: str) -> Iterator[int]:
    at = low.find(name)
    while at >= 0:
        yield at
        at = low.find(name, at + len(name))


def _speaks_as(language: str, low: str, at: int, name: str) -> bool:
    """Whether the name at this place is a label, or what the speaker says of itself."""
    before, after = low[max(0, at - 20) : at], low[at + len(name) : at + len(name) + 50]
    if not before.rpartition("\n")[2].strip(" *_#[(\"'") and (at < _TINY or "\n" in before):
        label = re.match(r"(?: \([^)\n]{1,40}\))?[\]*_)\"' ]{0,4}[:\uff1a]", after)
        if label:
            return True
    if after.startswith("'s") or (after[:1].isalnum() and language not in _SUFFIXES):
        return False
    says = (*_I_AM["English"], *(_I_AM.get(language, ()) if language != "English" else ()))
    start = " " + before if at <= len(before) else before
    return any(
        start.endswith(how) and (language in _SUFFIXES or not start[: -len(how)][-1:].isalnum())
        for how in says
    )


# --- speaking as an assistant ------------------------------------------------------------------------

# Finding a few plain words is many times faster than any pattern, and most turns hold none of them.
_ASSISTANT_WORDS = (
    "an ai", "language model", "assist", "may i help", "can i help", "have personal", "training data",
    "i was programmed", "chatbot",
)  # fmt: skip
_MODEL = r"(?:ai|artificial intelligence|(?:large )?language model|(?:ai|virtual|digital) assistant|chatbot)"
_ASSISTANT = re.compile(
    rf"\bas an? {_MODEL}\b|\bi(?:'m| am) (?:just |only |merely |actually )?an? {_MODEL}\b|"
    r"\bas (?:your|a helpful) assistant\b|\bi(?:'m| am) (?:your|a helpful) assistant\b|"
    r"\bi (?:cannot|can't|am unable to|am not able to|'m unable to) assist\b|"
    r"\bhow (?:can|may) i (?:help|assist) you\b|\banything else (?:that )?i can (?:help|assist)\b|"
    r"\bi(?:'m| am) here to assist\b|\b(?:happy|glad) to assist\b|"
    r"\bi (?:do not|don't) have personal (?:opinions?|beliefs?|feelings?|experiences?|views?)\b|"
    r"\bmy training data\b|\bi was programmed (?:to|by)\b"
)
_ASSISTANT_ELSEWHERE = {
    "Arabic": (
        "كنموذج لغوي",
        "نموذج لغة",
        "كذكاء اصطناعي",
        "بصفتي ذكاء",
        "كيف يمكنني مساعدتك",
    ),
    "Bengali": (
        "ভাষা মডেল",
        "এআই হিসেবে",
        "কৃত্রিম বুদ্ধিমত্তা হিসেবে",
        "সাহায্য করতে পারি?",
    ),
    "Chinese": (
        "语言模型",
        "作为ai",
        "作为一个ai",
        "作为人工智能",
        "作为一个人工智能",
        "我是ai",
        "我是一个ai",
        "有什么可以帮",
    ),
    "German": (
        "sprachmodell", "als ki ", "als eine ki ", "als künstliche intelligenz", "als ki-assistent",
        "ich bin eine ki", "wie kann ich dir helfen", "wie kann ich ihnen helfen",
    ),
    "Korean": (
        "언어 모델",
        "ai로서",
        "인공지능으로서",
        "인공지능입니다",
        "무엇을 도와",
    ),
    "Portuguese": (
        "modelo de linguagem", "como uma ia", "como ia,", "sou uma ia", "assistente virtual",
        "como posso ajudar", "em que posso ajudar", "como inteligência artificial",
    ),
    "Spanish": (
        "modelo de lenguaje", "como una ia", "como ia,", "soy una ia", "asistente virtual",
        "puedo ayudarte?", "puedo ayudarle?", "como inteligencia artificial",
    ),
    "Turkish": (
        "dil modeli", "yapay zeka olarak", "bir yapay zeka", "yardımcı olabilirim?",
    ),
}  # fmt: skip


def _speaks_as_assistant(language: str, low: str) -> bool:
    for word in _ASSISTANT_WORDS:
        if word in low and _ASSISTANT.search(low):
            return True
    elsewhere = _ASSISTANT_ELSEWHERE.get(language)
    return elsewhere is not None and any(phrase in low for phrase in elsewhere)


# --- arguing for another side ------------------------------------------------------------------------

_YES = (
    "i agree that", "i strongly agree that", "i believe that", "i strongly believe that", "i think that",
    "it is true that", "it is clear to me that", "on balance i think that",
)  # fmt: skip
_NO = (
    "i do not agree that", "i don't agree that", "i disagree that", "i strongly disagree that",
    "i do not believe that", "i don't believe that", "i do not think that", "i don't think that",
    "it is not true that",
)  # fmt: skip
_BEGINS = (".", "!", "?", ";", ",", "\n", " but", " and", " so", " yes", " no", " now")
"""What may stand before the words that argue for a side, so that they are no quotation and no supposition."""


def _leaves_stance(seed: Seed, stance: Stance, low: str) -> bool:
    key = (seed.id, seed.statement, stance.code)
    others = _others.get(key)
    if others is None:
        if len(_others) >= _SIDES_KNOWN:
            _others.clear()
        others = _others[key] = _other_sides(seed, stance)
    return any(clause in low and _argues_for(low, clause, leads) for clause, leads in others)


_others: dict[tuple[str, str, int], tuple[tuple[str, tuple[str, ...]], ...]] = {}
_SIDES_KNOWN = 4096
"""Stances whose other sides are cached in this process; the cache is emptied when it is full."""


def _other_sides(seed: Seed, stance: Stance) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Clauses, each with the words before it that make it argue for another side than this stance."""
    if seed.scale == "nominal":
        labels = [option.label for option in seed.options if option.code != stance.code]
        return tuple((f'my answer is "{label.lower()}"', ("",)) for label in labels)
    if stance.side == "between":
        return ()  # a persona that sees both sides may speak for either
    if seed.scale in ("frequency4", "often4"):
        answers = Answers("", {})
        openings = [
            stance_of(seed, answers, option.code).opening.removesuffix(", because").lower()
            for option in seed.options
            if seed.side(option.code) != stance.side
        ]
        return tuple((opening, ("",)) for opening in openings)
    statement, negation = (_clause(sentence) for sentence in (seed.statement, seed.negation or ""))
    yes, no = (_NO, _YES) if stance.side == "for" else (_YES, _NO)
    return ((statement, yes), *([(negation, no)] if negation else []))


def _clause(sentence: str) -> str:
    return sentence.strip().rstrip(".!").lower()


def _argues_for(low: str, clause: str, leads: tuple[str, ...]) -> bool:
    """Whether one of these words, where a clause may begin, leads up to this clause."""
    for at in _places(low, clause):
        if low[at + len(clause) : at + len(clause) + 1].isalnum():
            continue
        before = low[max(0, at - _LEAD_CHARS) : at].rstrip(" ,") if leads != ("",) else low[:at].rstrip(" ")
        for lead in leads:
            if before.endswith(lead):
                rest = before[: len(before) - len(lead)].rstrip(" ")
                if not rest or rest.endswith(_BEGINS):
                    return True
    return False


_LEAD_CHARS = 60
"""Characters before a clause in which the words that lead into it are looked for."""


# --- nothing but thanks --------------------------------------------------------------------------------

_BRIEF = 240
"""Characters from which a turn is too long to be nothing but thanks."""
