"""English wording of opinions: in the first person, without what only ties them to the talk, and whether
there is an opinion at all."""

from __future__ import annotations

import re

from culturepark.text import is_courtesy, sentences

_VERBS = "thinks|believes|feels|says|argues|holds|states|agrees|considers|finds|hopes|knows|mentions|explains"
_ADVERB = (
    r"(?:(?:also|always|never|often|still|really|truly|strongly|firmly|only|usually|sometimes|deeply)\s+)?"
)
_UNSPECIFIC = r"[Tt]he (?:speaker|person|author|delegate)"

# Forms after "I" of the verbs that may follow "she" or "he". What is not here is left to no guess.
_REGULAR = (
    f"{_VERBS}|wears|wants|needs|likes|loves|lives|works|learns|respects|trusts|prefers|cares|earns|helps|"
    "makes|takes|gives|keeps|comes|sees|hears|decides|chooses|speaks|eats|shares|raises|prays|remembers|"
    "understands|values|owes|obeys|thanks|expects|accepts"
)
_AFTER_I = {
    "is": "am", "isn't": "am not", "has": "have", "hasn't": "haven't", "does": "do", "doesn't": "don't",
    "goes": "go", "tries": "try", "teaches": "teach", "wishes": "wish", "carries": "carry",
    **{verb: verb[:-1] for verb in _REGULAR.split("|")},
    **{verb: verb for verb in (
        "was wasn't had hadn't did didn't can cannot can't could couldn't will won't would wouldn't shall "
        "should shouldn't must mustn't may might ought learned wanted needed lived worked grew"
    ).split()},
}  # fmt: skip
_GENDER = {
    **dict.fromkeys(("she", "her", "hers", "herself"), "she"),
    **dict.fromkeys(("he", "him", "his", "himself"), "he"),
}
# Whom else a pronoun may stand for: people, an article that may come before one, a name.
_SOMEBODY = re.compile(
    r"\b(?:(?:grand)?(?:father|mother|son|daughter)|brother|sister|husband|wife|man|woman|friend|"
    r"neighbour|neighbor|uncle|aunt|cousin|mum|mom|dad|parent|child|baby|girl|boy|bride|partner|person|"
    r"guest|elder|teacher|boss|leader|who|one|\w+(?:one|body)|a|an|the|every|each|any|another|no)\b|"
    r"\b(?!I\b)[A-Z]\w*",
)
# Words that no possessive stands before: after them "her" is "me", and "his" is "mine".
_NO_NOUN = re.compile(
    r"\s*(?:[.,;:!?]|$)|\s+(?:to|and|or|but|when|if|because|as|that|in|on|at|for|with|by|from|what|how|"
    r"where|so|than|a|an|the)\b"
)
# After these, "her" may be the one it is done to: "let her work", "gave her money".
_DONE_TO = re.compile(
    r"\b(?:let|lets|mak(?:e|es|ing)|made|help(?:s|ed)?|giv(?:e|es|ing)|gave|tell(?:s|ing)?|told|"
    r"ask(?:s|ed)?|teach(?:es)?|taught|allow(?:s|ed)?|want(?:s|ed)?|see(?:s|n)?|saw|hear(?:s|d)?|"
    r"show(?:s|ed)?|call(?:s|ed)?|expect(?:s|ed)?|keep(?:s)?|kept|leave(?:s)?|left|find(?:s)?|found|"
    r"send(?:s)?|sent|bring(?:s)?|brought|cost(?:s)?|offer(?:s|ed)?|pay(?:s)?|paid|buy(?:s)?|bought|"
    r"have|has|had|watch(?:es|ed)?)\s+$"
)


def first_person(text: str, name: str) -> str:
    """English in the first person: "Rania thinks that her family ..." becomes "I think that my
    family ...". Text is returned as it is if it does not begin so, and also if a pronoun in it may
    stand for somebody else or a verb's form is not known: better left than changed in meaning."""
    if not text.startswith((name, "She", "she", "He", "he", "The", "the")):
        return text  # nearly all are, and a pattern for each name is dear
    match = re.match(
        rf"^(?P<who>{re.escape(name)}|[Ss]he|[Hh]e|{_UNSPECIFIC})\s+(?P<how>{_ADVERB})(?P<verb>{_VERBS})"
        r"\s+(?=that\b)",
        text,
    )
    if not match:
        return text
    who, rest = match["who"], text[match.end() :].replace("\u2019", "'")
    if re.search(r"\b(?:I|[Mm]y|me|mine|myself)\b", rest):
        return text  # somebody else speaks of the speaker
    if re.fullmatch(_UNSPECIFIC, who) and re.search(r"\b(?:they|their|theirs|them|themselves)\b", rest, re.I):
        return text
    if re.search(rf"\b(?:and|but|or)\s+{_ADVERB}(?:{_VERBS}|wants|likes|loves|needs)\b", rest):
        return text  # a second verb of the same subject
    own = _own(rest, name, _GENDER.get(who.lower()))
    return text if own is None else f"I {match['how']}{match['verb'][:-1]} {own}"


def _own(rest: str, name: str, gender: str | None) -> str | None:
    """What follows "I think", with the speaker's name and pronouns in the first person; None when
    that is not sure."""
    lowered = re.sub(r"\b(?:She|He|Her|His)\b", lambda m: m[0].lower(), rest)
    found = list(re.finditer(rf"\b(?:{re.escape(name)}(?:'s)?|{'|'.join(_GENDER)})(?!\w)", lowered))
    genders = {_GENDER[m[0]] for m in found if m[0] in _GENDER}
    if len(genders) > 1 or (gender and genders - {gender}):
        return None
    out, end = "", 0
    for m in found:
        token, before, after = m[0], rest[: m.start()], rest[m.end() :]
        if token in _GENDER and _SOMEBODY.search(before.replace(name, "")):
            return None
        word = _as_own(token, before, after)
        if word is None:
            return None
        if rest[m.start()].isupper() and token in _GENDER:
            word = word[0].upper() + word[1:]
        out, end = out + rest[end : m.start()] + word, m.end()
        if word == "I":
            verb = re.match(rf"(\s+{_ADVERB})([a-z]+(?:'t)?)(?![\w'])", after)
            known = _AFTER_I.get(verb[2]) if verb else None
            inverted = re.search(r"\b(?:is|was|has|does|isn't|wasn't|hasn't|doesn't)\s+$", before)
            second = re.search(rf"\b(?:and|or|but|nor|then)\s+{_ADVERB}[a-z]+s\b", after)
            if verb is None or known is None or inverted or second:
                return None
            out, end = out + verb[1] + known, m.end() + verb.end()
    return out + rest[end:]


def _as_own(said: str, before: str, after: str) -> str | None:
    """The word of the first person for a name or pronoun of the speaker; None when not sure."""
    alone = bool(_NO_NOUN.match(after))
    if said.endswith("'s"):
        return None if alone or re.match(r"\s+(?:not|been|right|wrong|sure)\b", after) else "my"
    if said in ("herself", "himself"):
        return "myself"
    if said == "hers":
        return "mine"
    if said == "him":
        return "me"
    if said == "his":
        return "mine" if alone else "my"
    if said == "her":
        if alone:
            return "me"
        return None if _DONE_TO.search(before) else "my"
    if said in _GENDER:
        return "I"
    return "me" if re.match(r"\s*(?:[.,;:!?]|$)", after) else "I"


_LEAD_IN = re.compile(
    r"^(?:(?:i hear you|i understand|i see)(?: what you mean)?, but (?!for )|"
    r"(?:for my part|after this talk|to sum up|"
    r"to add something new|as i said|i still say so|well|yes|no|you know|you see)[,:] )+",
    re.IGNORECASE,
)


def without_lead_in(text: str) -> str:
    """An opinion without the words that only tie it to the talk around it ("I hear you, but ...")."""
    bare = _LEAD_IN.sub("", text)
    return bare[:1].upper() + bare[1:] if bare else text


_NO_OPINION = re.compile(
    r"\b(?:no|not any|without(?: any)?|does not (?:contain|express|state)|doesn't (?:contain|express|state))"
    r"(?: clear| explicit| specific| particular)? opinions?\b|\bas an ai\b|\blanguage model\b",
    re.IGNORECASE,
)
_CLAUSE_ENDS = re.compile(r";\s+|,\s+(?:but|yet|though|and(?! for\b))\s+")


def holds_no_opinion(text: str) -> bool:
    """Whether a text says of itself that it holds no opinion, or is a question or mere courtesy."""
    if _NO_OPINION.search(text) or text.rstrip("\"' ").endswith(("?", "\uff1f", "\u061f")):
        return True
    text = text.replace("\u2019", "'")
    spans = sentences(text)
    return bool(spans) and all(
        is_courtesy(clause) for start, end in spans for clause in _CLAUSE_ENDS.split(text[start:end])
    )
