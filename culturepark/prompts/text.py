"""Plain text work on what models say: cleaning, sentences, first person."""

from __future__ import annotations

import re
import unicodedata

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f\u061f\u06d4\u0964]+[\"'\u201d\u2019)\]]*")
_QUOTES = ('""', "''", "\u201c\u201d", "\u2018\u2019", "\u00ab\u00bb")
_MARKUP = re.compile(r"<\|[^|>]{0,40}\|>|</?think>")


def tidy(text: str) -> str:
    """Text as it may be kept: no control or direction characters, no lone surrogates, no template
    tokens, spaces single, newlines kept single."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
    text = _CONTROL.sub("", text)
    # What stood around a token may be one when it is gone.
    while (bare := _MARKUP.sub("", text)) != text:
        text = bare
    lines = (re.sub(r"[ \u00a0]{2,}", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def unquoted(text: str) -> str:
    """Text without one pair of quotation marks around the whole of it."""
    for pair in _QUOTES:
        if len(text) > 2 and text[0] == pair[0] and text[-1] == pair[1] and pair[1] not in text[1:-1]:
            return text[1:-1].strip()
    return text


def without_name(text: str, name: str) -> str:
    """Text without the speaker's own name as a label before it, as in a play."""
    return re.sub(rf"^\W{{0,2}}{re.escape(name)}\W{{0,2}}(?:says)?:\s*", "", text, count=1)


def whole_sentences(text: str) -> str:
    """Text up to the end of its last whole sentence; all of it, closed with a full stop, if it has
    none. For replies that ran into their limit."""
    last = None
    for match in _sentence_ends(text):
        last = match
    if last is not None:
        return text[: last.end()]
    return text.rstrip(" ,;:-") + "." if text else ""


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans of the sentences of a text, in order, without the spaces between them."""
    spans: list[tuple[int, int]] = []
    for line in re.finditer(r"[^\n]+", text):
        start = line.start()
        for match in _sentence_ends(text, line.start(), line.end()):
            spans.append((start, match.end()))
            start = match.end()
        spans.append((start, line.end()))
    trimmed = ((a + len(text[a:b]) - len(text[a:b].lstrip()), b) for a, b in spans)
    return [(a, b) for a, b in trimmed if text[a:b].strip(" .,;!?-\"'")]


def words(text: str) -> int:
    """How many words a text has; in scripts without spaces, two characters count as one word."""
    spaced = re.findall(r"[^\W\d_]+", text)
    wide = sum(1 for c in text if "\u3040" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff")
    return len(spaced) if not wide else max(len(spaced), wide // 2)


def _sentence_ends(text: str, start: int = 0, end: int | None = None):
    """Ends of sentences: a stop followed by a space or the end, but not after an initial or title."""
    end = len(text) if end is None else end
    for match in _SENTENCE_END.finditer(text, start, end):
        wide = text[match.start()] in "\u3002\uff01\uff1f"
        after = text[match.end() : match.end() + 3]
        if not wide and match.end() < end and (not after[0].isspace() or after.lstrip()[:1].islower()):
            continue
        before = text[max(start, match.start() - 5) : match.start()]
        if match.group() == "." and re.search(r"(?:^|[\s(])(?:[A-Z]|Mr|Mrs|Ms|Dr|St|e\.g|i\.e|vs)$", before):
            continue
        yield match


_VERBS = "thinks|believes|feels|says|argues|holds|states|agrees|considers|finds|hopes|knows|mentions|explains"
_PRONOUNS = {
    "she": "I", "he": "I", "her": "my", "his": "my", "hers": "mine", "him": "me",
    "herself": "myself", "himself": "myself", "they": "we", "their": "our", "them": "us",
    "theirs": "ours", "themselves": "ourselves",
}  # fmt: skip
_BASE = {"is": "am", "was": "was", "has": "have", "does": "do", "doesn't": "don't", "isn't": "am not"}


def first_person(text: str, name: str) -> str:
    """English in the first person: "Rania thinks that her family ..." becomes "I think that my
    family ...". Text that does not speak of the speaker in the third person is left alone."""
    subject = rf"(?:{re.escape(name)}|[Ss]he|[Hh]e|[Tt]he (?:speaker|person|author|delegate))"
    match = re.match(rf"^{subject}\s+(?:also\s+|strongly\s+)?({_VERBS})\b", text)
    if not match:
        return text
    verb = match.group(1)
    base = {"agrees": "agree", "says": "say", "states": "state", "argues": "argue", "hopes": "hope"}.get(
        verb, verb[:-1]
    )
    rest = re.sub(rf"\b{re.escape(name)}'s\b", "my", text[match.end() :])
    rest = re.sub(rf"\b{re.escape(name)}\b", "I", rest)
    gendered = {k: v for k, v in _PRONOUNS.items() if not k.startswith("the")}
    rest = re.sub(
        r"\b(" + "|".join(gendered) + r")\b(?:\s+(is|was|has|does|doesn't|isn't)\b)?",
        lambda m: gendered[m.group(1)] + (f" {_BASE[m.group(2)]}" if m.group(2) else ""),
        rest,
    )
    return f"I {base}{rest}"


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


_COURTESY = re.compile(
    r"^(?:(?:well|oh|yes|so|and|but|ah)\b[,!]?\s+)*(?:thank(?:s| you)\b|hello\b|hi\b|"
    r"goodbye|bye\b|welcome|please\b|"
    r"you(?:'re| are) (?:very )?welcome|i(?:'m| am) (?:so |very |really )?(?:glad|"
    r"happy|grateful|pleased|sorry)\b|"
    r"i (?:really )?appreciate|it(?:'s| was| is) (?:been )?(?:a pleasure|lovely|nice|great|wonderful)|"
    r"(?:that|it)(?:'s| is) (?:very |really |so |a )?(?:kind|wonderful|great|"
    r"interesting|lovely|good|nice|true)\b[^,;]{0,20}[.!]|"
    r"if (?:there is|there's|you have) any(?:thing|\s)|let me know|i look forward|feel free|don't hesitate)",
    re.IGNORECASE,
)


def holds_no_opinion(text: str) -> bool:
    """Whether a text says of itself that it holds no opinion, or is a question or mere courtesy."""
    if _NO_OPINION.search(text) or text.rstrip("\"' ").endswith(("?", "\uff1f", "\u061f")):
        return True
    return bool(_COURTESY.match(text))
