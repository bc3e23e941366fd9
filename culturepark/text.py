"""What models say: cleaning it, its sentences and words, and which of it is mere courtesy."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Control and direction characters, and invisible ones: zero-width marks, and the tags and variation
# selectors of the supplementary planes, in which whole instructions can be hidden. Joiners stay: emoji and
# several scripts need them.
_UNSEEN = (
    r"\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e0fff"
)
_CONTROL = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{_UNSEEN}]")
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f\u061f\u06d4\u0964]+[\"'\u201d\u2019)\]]*")
_QUOTES = ('""', "''", "\u201c\u201d", "\u2018\u2019", "\u00ab\u00bb")
# How chat templates mark roles, turns and tools: ChatML, Llama, Gemma, Mistral, DeepSeek and their kin.
_MARKUP = re.compile(
    r"<[|\uff5c][^|>\uff5c]{0,40}[|\uff5c]>|<</?SYS>>|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]|"
    r"</?(?:s|bos|eos|pad|unk|mask|think|tool_calls?|tool_response|tools|function_call|"
    r"start_of_turn|end_of_turn|start_of_image|file_sep|repo_name|jupyter_\w{1,20}|issue_\w{1,20})>"
)
_MARKUP_ROUNDS = 8
"""Template tokens that are nested deeper than this are undone by removing all brackets."""
_UNTIDY = re.compile(rf"[\x00-\x1f\x7f-\xa0\u2028\u2029\ud800-\udfff<\[{_UNSEEN}]|  ")
"""Characters that `tidy` may have to change."""


def tidy(text: str) -> str:
    """Text as it may be kept: no control or direction characters, nothing invisible, no lone
    surrogates, no template tokens, spaces single, newlines kept single."""
    # Most replies need nothing, and this runs on every one; plain English is told by cheaper means.
    if text.isascii() and text.isprintable() and "<" not in text and "[" not in text and "  " not in text:
        return text.strip()
    if not _UNTIDY.search(text):
        return (text if text.isascii() else unicodedata.normalize("NFC", text)).strip()
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
    text = _CONTROL.sub("", text.replace("\u2028", "\n").replace("\u2029", "\n"))
    # Without a token, the text around it may make another; a text that nests them deeply loses all brackets.
    for _ in range(_MARKUP_ROUNDS):
        if (bare := _MARKUP.sub("", text)) == text:
            break
        text = bare
    else:
        text = text.replace("<", "").replace("[", "")
    lines = (re.sub(r"[ \u00a0]{2,}", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


_TOKEN_BEGINS = re.compile(r"<(?=\S)|\[(?=/?[A-Za-z_]+\])")


def without_tokens(text: str) -> str:
    """Text in which a model's tokenizer finds none of the marks of its chat template.

    Servers turn `<|im_end|>` or `[INST]` within a message into the very tokens that end it or begin
    another, so words could make themselves a message of another role. A space after the first bracket
    keeps the words and prevents that.
    """
    if "<" not in text and "[" not in text:
        return text
    return _TOKEN_BEGINS.sub(lambda match: f"{match[0]} ", text)


def unquoted(text: str) -> str:
    """Text without one pair of quotation marks around the whole of it."""
    for pair in _QUOTES:
        if len(text) > 2 and text[0] == pair[0] and text[-1] == pair[1] and pair[1] not in text[1:-1]:
            return text[1:-1].strip()
    return text


def without_name(text: str, name: str) -> str:
    """Text without the speaker's own name as a label before it, as in a play."""
    if name not in text[: len(name) + 3]:
        return text
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
    if text.isascii():
        return len(spaced)
    wide = sum(1 for c in text if "\u3040" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff")
    return len(spaced) if not wide else max(len(spaced), wide // 2)


def _sentence_ends(text: str, start: int = 0, end: int | None = None) -> Iterator[re.Match[str]]:
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


# --- courtesies ---------------------------------------------------------------------------------------

# Words that state a view: a clause with one of them is no courtesy.
_VIEW = re.compile(
    r"\b(?:because|should|must|ought|believe|think|agree|when|whenever|"
    r"aber|denn|weil|muss|müssen|soll|sollte|sollten|glaube|finde|pero|porque|creo|pienso|debe|deben|debemos|"
    r"mas|acho|penso|deve|devem|ama|çünkü|bence|gerek|inanıyorum)\b|"
    r"لكن|لأن|يجب|أعتقد|কিন্তু|কারণ|উচিত|মনে করি|因为|但是|应该|必须|认为|觉得|"
    r"왜냐하면|하지만|해야|생각",
    re.IGNORECASE,
)
_STOPS = r",.;!\n\u2014\u3002\uff0c\uff01\u3001\u060c\u061b\u0964"
_NAME = r"(?:,? (?-i:[A-Z])[\w'-]*)?"
# Words that tell of one's own life, or of how things are done, in thanks that run on without a comma.
_TELLS = (
    r"\b(?:my(?! (?:dear )?(?:friend|brother|sister|dear)\b)|our|always|never|"
    r"siempre|nunca|sempre|immer|nie|hep)\b|her zaman|دائما|সবসময়|总是|항상|언제나"
)
_TAIL = rf"(?:(?!{_TELLS})[^{_STOPS}]){{0,60}}"
_THANKS = (
    r"(?:muchas |muchísimas |mil )?gracias\b(?! a (?!ti\b|vos\b|usted|tod[oa]s\b))|"
    r"(?:te|le|os|les) agradezco\b|(?:muit[oa] )?obrigad[oa]s?\b(?! a\b)|agradeço\b|"
    r"danke\b(?! (?:zu|sagen)\b)|(?:(?:vielen|herzlichen|besten|lieben|schönen|tausend) )+dank\b|"
    r"ich danke (?:dir|euch|ihnen)\b|"
    r"(?:çok )?teşekkür(?:ler| ederi[mz])\b|(?:çok )?sağ ?ol|"
    r"(?:ألف )?(?:شكر(?:ا|ًا)|أشكرك|نشكرك)|(?:আপনাকে |তোমাকে |অনেক |অসংখ্য )*ধন্যবাদ(?! দেওয়া)|"
    r"(?:我|也|非常|很|真的|真|太|十分|衷心|再次)*(?:谢谢|感谢|多谢)"
    rf"(?=你|您|大家|各位|分享|邀请|今天|这次|\s*(?:$|[{_STOPS}]))|"
    r"감사(?:합니다|드립니다|해요)|고마(?:워|웠)|고맙(?:습니다|네)"
)
# Where the verb comes last, so do thanks.
_THANKS_AT_END = (
    r"(?:감사(?:합니다|드립니다|해요)|고마워요?|고마웠어요?|고맙습니다|teşekkür(?:ler)?(?: ederim)?|"
    r"ধন্যবাদ(?: জানাই)?)"
)
_FAREWELL = (
    r"see you\b|adiós\b|hasta (?:luego|pronto|la vista|mañana|la próxima)\b|nos vemos\b|tchau\b|adeus\b|"
    r"até (?:logo|breve|mais|amanhã|[aà] próxima)\b|auf wiedersehen\b|tschüss?\b|"
    r"bis (?:bald|dann|später|zum nächsten mal)\b|hoşça ?kal|görüş(?:ürüz|mek üzere)|güle güle\b|"
    r"مع السلامة|إلى اللقاء|وداعا|বিদায়|আবার দেখা হবে|再见|回头见|下次见|保重|"
    r"안녕히|잘 가|다음에 (?:또 )?(?:봐|만나|뵙)"
)
_WISH = (
    r"wish(?:ing)? you\b(?! (?:could|would|had|were|knew)\b)|"
    r"all the best\b(?= (?:to|for|in|with|from)\b|\W*$)|best wishes\b|god bless(?: you| your| us| and|\W*$)|"
    r"(?:until|till) (?:next time|we (?:meet|talk|speak|see))\b|have an? (?:(?:very |really )?"
    r"(?:good|great|nice|lovely|wonderful|safe|blessed|pleasant|peaceful|beautiful) )+"
    r"(?:day|evening|night|week|weekend|journey|trip|time|year)\b|same to you\b|likewise\b(?=\W*$)|"
    r"(?:te|le|os|les) deseo\b|que teng\w+ (?:una?|buen[oa]?)\b|igualmente\b|"
    r"tudo de bom\b|boa sorte\b|alles gute\b|ich wünsche (?:dir|euch|ihnen)\b|schönen (?:tag|abend) noch\b|"
    r"kendine iyi bak|iyi (?:günler|akşamlar|geceler)\b|"
    r"أتمنى لك|مع تمنياتي|بالتوفيق|শুভকামনা|শুভ (?:কামনা|রাত্রি)|ভালো থাক|祝(?:你|您|大家|愿|福)|"
    r"좋은 하루|행복하세요|건강하세요|잘 지내"
)
_PLEASED = (
    r"(?:ha sido|fue) un (?:gran |verdadero )?placer\b|encantad[oa] de (?:conocer|hablar)|mucho gusto\b|"
    r"foi um (?:grande )?prazer\b|prazer em (?:conhec|falar)|freut mich\b|"
    r"es war (?:mir )?(?:eine (?:große )?freude|schön),? (?:mit|dich|sie)\b|memnun oldum|"
    r"سعدت (?:ب|بال)?(?:الحديث|لقائك|التحدث)|تشرفت ب|很高兴(?:认识|见到|[和与跟])|만나서 반가|반갑습니다"
)
_FOR = (
    r"for (?:(?:the|this|our|a|such a) (?:(?:very |so )?"
    r"(?:lovely|nice|good|great|warm|wonderful|kind|interesting|pleasant|open|honest|long|delightful) )*"
    r"(?:talk|conversation|discussion|chat|exchange)\b|"
    r"your (?:\w+ ){0,3}(?:time|help|words|thoughts|story|stories|insights?|kindness|hospitality|patience|"
    r"company|openness|honesty|perspective|answers?|views?)\b(?=\W*$)|"
    r"(?:sharing|telling|listening)(?: (?:that|this|it|all|with|to|me|us|your|so)\b|\W*$)|"
    r"(?:having me|inviting|taking the time|being here|coming)\b|everything(?: you\b|\W*$))"
)
_LEAD = (
    r"(?:(?:well|oh|yes|no|so|and|but|ah|ok|okay|again|once again|many|"
    r"(?:i|we)(?: also| really| just)?(?: want(?:ed)? to| would like to|'d like to)?(?: say)?)"
    r"\b[,!]?\s+){0,8}"
)
# What begins a clause and is courtesy whatever follows the comma or stop after it.
_OPENER = re.compile(
    rf"[¡\"'\u201c*]{{0,3}}{_LEAD}(?:"
    r"(?:hello|hi|hey|good ?bye|bye|farewell|welcome|good (?:morning|afternoon|evening)|"
    r"take care(?: of yoursel(?:f|ves))?)"
    r"(?: there| again| everyone| all| both| for now| then| dear| my (?:dear )?friend)*"
    rf"{_NAME}|welcome to [^{_STOPS}]*|"
    rf"thank(?:s| you)\b(?! to\b)(?:(?! for\b|{_TELLS})[^{_STOPS}])*(?: for\b[^{_STOPS}]*)?|"
    r"you(?:'re| are) (?:very |most |always )?welcome(?: any ?time| too)?|"
    r"(?:(?:hola|buen[oa]s (?:días|tardes|noches)|olá|oi|bom dia|boa (?:tarde|noite)|hallo|"
    r"guten (?:tag|morgen|abend)|merhaba|selam|günaydın)\b|مرحبا|أهلا|السلام عليكم|صباح الخير|مساء الخير|"
    r"নমস্কার|হ্যালো|你好|您好|大家好|早上好|안녕하세요|안녕)(?:[,\s]\s*[^\W\d_]+){0,2}|"
    rf"(?:{_THANKS}|{_FAREWELL}|{_WISH}|{_PLEASED}|{_FOR}){_TAIL}|{_TAIL}{_THANKS_AT_END}"
    rf")\s*(?:[{_STOPS}]+\s*|$|(?=\band\b))",
    re.IGNORECASE,
)
_ABOUT_THE_TALK = re.compile(
    r"\b(?:you|your|yours)\b|\bwe(?:'ve| have)\b|\b(?:our|this) (?:talk|conversation|discussion|chat)\b|"
    r"\bwe (?:could|can|got to|were able to) (?:talk|meet|speak|share)\b",
    re.IGNORECASE,
)
# What is courtesy only when it is about the other person or the talk, and states no view.
_WARM = re.compile(
    r"(?:i(?:'m| am|'d be| was) (?:so |very |really |also )?(?:glad|happy|grateful|thankful|pleased|sorry)|"
    r"i (?:really |truly |do |also )?(?:appreciate|enjoyed)|"
    r"(?:that|it)(?:'s| was| is|'s been| has been) (?:very |really |so |been )?"
    r"(?:a (?:great |real )?pleasure|lovely|nice|great|good|wonderful|kind|interesting)"
    r"(?= (?:to (?:meet|hear|see|talk|know|speak)|of you|that (?:you|we)(?:'ve|'re| have| are)|"
    r"(?:meeting|talking|speaking|chatting|hearing|getting)))|"
    r"how (?:good|nice|lovely|kind|wonderful|great)|(?:good|nice|lovely|great) to (?:meet|hear|see|talk)|"
    r"(?:i(?:'m| am)? )?look(?:ing)? forward|please (?:share|tell|come|accept|take|have|sit|ask|continue)|"
    r"peace be)\b",
    re.IGNORECASE,
)
_SET_PHRASE = re.compile(
    r"(?:i(?:'m| am) (?:so |very |really )?(?:glad|happy|grateful|pleased|sorry)"
    r"(?: to (?:hear (?:that|it|this)|help|listen))?|"
    r"(?:that|it)(?:'s| is| was) (?:very |really |so |a )?"
    r"(?:kind|wonderful|great|interesting|lovely|good|nice|true)(?: (?:to (?:hear|know)|point|idea|indeed))?|"
    r"(?:that|it) (?:was|has been) (?:such )?an? (?:great |real )?(?:pleasure|honou?r|joy)|"
    r"i look forward to (?:it|that|hearing more|learning more))\W*$|"
    r"(?:please )?(?:let me know|feel free|(?:do not|don't) hesitate|tell me|go on|come (?:in|and visit))\b|"
    r"if (?:there(?:'s| is)|you (?:have|need)) any.*\b(?:let me know|tell me|ask me|feel free|hesitate|"
    r"i can (?:do|help)|i(?:'m| am) here)\b",
    re.IGNORECASE,
)
_FILLERS = re.compile(r"(?:(?:well|oh|yes|so|and|but|ah)\b[,!]?\s+)+", re.IGNORECASE)
_FEW_WORDS = 2
"""At most this many words after a greeting or thanks, such as a name, belong to it."""


def is_courtesy(clause: str) -> bool:
    """Whether a clause only greets, thanks, says farewell, wishes well or is kind to the other person, in
    any language of the shipped cultures.

    A clause that states a view ("because", "should", "I think") is never a courtesy. Apostrophes are plain.
    """
    if _VIEW.search(clause):
        return False
    left = clause
    while match := _OPENER.match(left):
        left = left[match.end() :]
    if left != clause and words(left) <= _FEW_WORDS:
        return True
    if fillers := _FILLERS.match(left):
        left = left[fillers.end() :]
    warm = _WARM.match(left) and _ABOUT_THE_TALK.search(left)
    return bool(warm or _SET_PHRASE.match(left))
