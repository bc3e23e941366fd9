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

# English greetings and thanks, up to the comma or stop after them.
_VIEW = r"\b(?:because|should|must|ought|believe|think|when|whenever)\b"
_FILLERS = r"(?:(?:well|oh|yes|so|and|but|ah)\b[,!]?\s+)*"
_GREETING = re.compile(
    rf"{_FILLERS}(?:"
    r"(?:hello|hi|hey|goodbye|bye|welcome|good (?:morning|afternoon|evening))"
    r"(?: there| again| everyone| my (?:dear )?friend)?(?:,? (?-i:[A-Z])[\w'-]*)?|welcome to [^,.;!]*|"
    rf"(?:many )?thank(?:s| you)\b(?! to\b)(?:(?!{_VIEW})[^,.;!])*|"
    r"you(?:'re| are) (?:very |most )?welcome)\s*(?:[,.;!]+\s*|$)",
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
    r"i (?:really |truly |do |also )?appreciate|"
    r"(?:that|it)(?:'s| was| is|'s been| has been) (?:very |really |so |been )?"
    r"(?:a (?:great |real )?pleasure|lovely|nice|great|good|wonderful|kind|interesting)"
    r"(?= (?:to (?:meet|hear|see|talk|know|speak)|of you|that (?:you|we)(?:'ve|'re| have| are)|"
    r"(?:meeting|talking|speaking|chatting|hearing|getting)))|"
    r"how (?:good|nice|lovely|kind|wonderful|great)|(?:good|nice|lovely|great) to (?:meet|hear|see|talk)|"
    r"i look forward|please (?:share|tell|come|accept|take|have|sit|ask|continue)|"
    r"peace be)\b",
    re.IGNORECASE,
)
_SET_PHRASE = re.compile(
    r"(?:i(?:'m| am) (?:so |very |really )?(?:glad|happy|grateful|pleased|sorry)"
    r"(?: to (?:hear (?:that|it|this)|help|listen))?|"
    r"(?:that|it)(?:'s| is| was) (?:very |really |so |a )?"
    r"(?:kind|wonderful|great|interesting|lovely|good|nice|true)(?: (?:to (?:hear|know)|point|idea|indeed))?|"
    r"i look forward to (?:it|that|hearing more|learning more))\W*$|"
    r"(?:please )?(?:let me know|feel free|(?:do not|don't) hesitate|tell me|go on|come (?:in|and visit))\b|"
    r"if (?:there(?:'s| is)|you (?:have|need)) any.*\b(?:let me know|tell me|ask me|feel free|hesitate|"
    r"i can (?:do|help)|i(?:'m| am) here)\b",
    re.IGNORECASE,
)
_STATES_VIEW = re.compile(_VIEW, re.IGNORECASE)
_LEADING_FILLERS = re.compile(rf"^{_FILLERS}", re.IGNORECASE)
_FEW_WORDS = 2
"""At most this many words after a greeting or thanks, such as a name, belong to it."""

# Whole phrases that say nothing else, in the languages of the shipped cultures. A phrase has no open end:
# "all the best" is one, and "all the best in life comes from family" is none.
_WHOLE = (
    # English
    r"(?:hello|hi|good ?bye|bye|farewell|good (?:morning|afternoon|evening|night))(?: all| for now)?|"
    r"(?:no,? )?(?:i (?:just )?want(?:ed)? to say )?thank(?:s| you)(?: (?:so|very) much)?(?: again)?|"
    r"take care(?: of yoursel(?:f|ves))?|see you(?: (?:soon|later|again|then|tomorrow|next (?:time|week)))*|"
    r"(?:until|till) (?:next time|we (?:meet|talk|speak) again)|"
    r"(?:(?:i|we) )?wish(?:ing)? you (?:and your family )?(?:all the best|well|peace|happiness|success)|"
    r"(?:all the best|best wishes)(?: (?:to|for) you(?: all)?(?: and your family)?)?|"
    r"god bless you(?: all)?(?: and your family)?|peace be (?:up)?on you|same to you|likewise|"
    r"have an? (?:good|great|nice|lovely|wonderful|blessed|safe) (?:day|evening|night|week|trip|time)|"
    r"it (?:was|has been) (?:such )?an? (?:great |real )?(?:pleasure|honou?r|joy)|"
    r"i(?:'ve)? (?:really |truly )?enjoyed (?:our|this) (?:talk|conversation|discussion|chat)|"
    # Spanish
    r"hola|buen[oa]s (?:días|tardes|noches)|(?:(?:muchas|muchísimas|mil) )?gracias(?: a (?:ti|usted|todos))?"
    r"(?: por (?:todo|compartir|escuchar(?:me)?|(?:tu|su) tiempo|(?:la|esta) (?:charla|conversación)))?|"
    r"(?:te|le|os|les) (?:lo )?agradezco(?: mucho)?|adiós|hasta (?:luego|pronto|la vista|mañana|la próxima)|"
    r"nos vemos(?: pronto)?|cuídate(?: mucho)?|igualmente|(?:te|le|os|les) deseo (?:todo )?lo mejor|"
    r"que tengas? un buen día|(?:ha sido|fue) un (?:gran )?placer|mucho gusto|encantad[oa](?: de conocerte)?|"
    # Portuguese
    r"olá|bom dia|boa (?:tarde|noite|sorte)|tudo de bom|tchau|adeus|até (?:logo|breve|mais|amanhã|a próxima)|"
    r"(?:muit[oa] )?obrigad[oa](?: a (?:você|todos))?(?: (?:por (?:tudo|compartilhar|ouvir)|pela conversa))?|"
    r"(?:eu )?agradeço(?: muito)?|foi um (?:grande )?prazer|prazer em conhecê-l[oa]|"
    # German
    r"hallo|guten (?:tag|morgen|abend)|gute nacht|ich danke (?:dir|euch|ihnen)(?: sehr)?|"
    r"(?:danke(?: (?:sehr|schön|vielmals|dir|euch|ihnen))?|(?:(?:vielen|herzlichen|besten|lieben) )+dank)"
    r"(?: für (?:das gespräch|alles))?|auf wiedersehen|tschüss?|bis (?:bald|dann|später|morgen)|mach'?s gut|"
    r"(?:ich wünsche (?:dir|euch|ihnen) )?alles gute|(?:einen )?schönen (?:tag|abend) noch|(?:es )?"
    r"freut mich|es war (?:mir )?(?:eine freude|schön),? mit (?:dir|euch|ihnen) zu (?:sprechen|reden)|"
    # Turkish
    r"merhaba|selam|günaydın|(?:çok )?sağ ?ol(?:un)?|hoşça ?kal(?:ın)?|görüşürüz|görüşmek üzere|güle güle|"
    r"(?:(?:anlattığın|paylaştığın|her şey) için )?(?:çok )?teşekkür(?:ler| eder[ıi][mz])|"
    r"kendine iyi bak|iyi (?:günler|akşamlar|geceler)|(?:çok )?memnun oldum|"
    # Arabic
    r"مرحبا|أهلا(?: وسهلا)?|السلام عليكم|صباح الخير|مساء الخير|مع السلامة|إلى اللقاء|وداعا|بالتوفيق|"
    r"تشرفت بك|"
    r"(?:شكرا|شكرًا|أشكركم?)(?: جزيلا| جزيلًا)?(?: لكم?)?(?: على (?:هذا الحديث|كل شيء|وقتك))?|"
    # Bengali
    r"নমস্কার|(?:আপনাকে |তোমাকে )?(?:অনেক |অসংখ্য )?ধন্যবাদ|বিদায়|আবার দেখা হবে|শুভকামনা|শুভ রাত্রি|"
    r"ভালো থাকবেন|"
    # Chinese
    r"(?:你|您|大家|早上|晚上)好|再见|回头见|下次见|保重|很高兴(?:认识|见到)[你您]|"
    r"(?:我|也|非常|很|真的|太|十分|衷心|再次){0,3}(?:谢谢|感谢|多谢)(?:你们?|您|大家|各位)?(?:了|的分享)?|"
    r"祝(?:你|您|大家)(?:一切顺利|好运|幸福|健康|平安)|"
    # Korean
    r"안녕하세요|안녕히 (?:계세요|가세요)|만나서 반가(?:워요|웠어요|웠습니다)|(?:만나서 )?반갑습니다|"
    r"(?:(?:이야기해|말씀해|들어|시간 내) ?주셔서 )?(?:정말 |너무 |대단히 )?"
    r"(?:감사(?:합니다|드립니다|해요)|고마(?:워|워요|웠어요)|고맙습니다)|좋은 하루 (?:보내세요|되세요)"
)
_VOCATIVE = r"(?-i:[A-ZÀ-ÖØ-Þ])[\w'-]*|(?:frau|herr|señora?|senhora?) [\w'-]+|يا \w+|\w{1,4} ?[씨님]"
_BETWEEN = r"(?:\s*[,.;!\u2014\u3002\uff0c\uff01\u3001\u060c\u061b\u0964]+\s*|\s+)(?:(?:and|y|e|und|ve)\s+)?"
_PHRASE = rf"(?:{_WHOLE})(?:{_BETWEEN}(?:{_VOCATIVE}))?"
_NOTHING_ELSE = re.compile(rf"[¡\"'\u201c*\s]*{_PHRASE}(?:{_BETWEEN}{_PHRASE}){{0,4}}\W*", re.IGNORECASE)

# Each turn of nothing but thanks has one of these; most other turns have none.
_THANKS_WORDS = (
    "thank", "bye", "farewell", "take care", "see you", "gracias", "hasta ",
    "obrigad", "tchau", "adeus", "dank", "wiederseh",
)  # fmt: skip
_THANKS_WORDS_ELSEWHERE = (
    *_THANKS_WORDS, "tschüs", "adiós", "até ", "teşekkür", "sağ ol", "sağol", "hoşça",
    "görüşürüz", "شكر", "السلامة", "اللقاء", "ধন্যবাদ", "বিদায়", "谢", "再见", "감사", "고마", "고맙", "안녕히",
)  # fmt: skip
_THANKS = re.compile(
    r"\bthank(?:s| you)\b|\bgood ?bye\b|\bbye\b|\bfarewell\b|\btake care\b|\bsee you\b|"
    r"\bgracias\b|\badiós\b|\bhasta (?:luego|pronto|la vista)\b|"
    r"\bobrigad[oa]s?\b|\btchau\b|\badeus\b|\baté (?:logo|breve|mais)\b|"
    r"\b(?:danke|(?:vielen|herzlichen|besten) dank)\b|\bauf wiedersehen\b|\btschüss?\b|"
    r"\bteşekkür|\bsağ ?ol|\bhoşça ?kal|\bgörüşürüz\b|شكرا|شكرًا|مع السلامة|إلى اللقاء|ধন্যবাদ|বিদায়|"
    r"谢谢|感谢|再见|감사(?:합니다|드립니다)|고마워|고맙습니다|안녕히"
)
# What may follow thanks, however it goes on.
_WISHES = re.compile(
    r"(?:and |so |well |oh )?(?:i wish you|(?:i )?wish(?:ing)? you|all the best|best wishes|have an? |"
    r"you(?:'re| are) (?:very |most )?welcome|(?:until|till) (?:next|we)|"
    r"it (?:was|has been) (?:a |so |very |really )?(?:pleasure|nice|lovely|good|great|honou?r)|"
    r"i(?:'m| am) (?:so |very )?(?:glad|grateful|thankful|happy) |i (?:really )?(?:appreciate|enjoyed) |"
    r"likewise|same to you|for (?:the|your|this|sharing|listening|everything|all|taking|having)\b|"
    r"(?:i )?look(?:ing)? forward|peace be|god bless|igualmente|que tenga|"
    r"alles gute|bis bald|tudo de bom|kendine iyi bak|祝)"
)
# A clause with one of these states something, whatever else it says: a view, one's own life, or thanks and
# farewells that are told of.
_STATES_MORE = re.compile(
    r"\b(?:because|should|must|ought|believe|think|agree|always|never|my|"
    r"our(?! (?:talk|conversation|discussion|chat)\b)|"
    r"aber|denn|pero|porque|creo|mas|acho|ama|çünkü)\b|لكن|لأن|因为|但是|왜냐하면|하지만|"
    r"\btake care of (?!you|each other|him|her|them)|"
    r"^thanks to (?!you|all\b|both|each|every)(?:(?!and )\S+ ){3}|"
    r"\b(?:they|s?he|people|guests|children) (?:says?|said) (?:good ?bye|farewell|thank)|"
    r"^gracias a (?:l[ao]s?|mis?|sus?|nuestr\w+) (?:(?!dos |por )\S+ ){2}|^danke (?:zu )?sagen\b|"
    r"\bteşekkür etmek (?!ist)|感谢(?:父母|长辈)"
)
_THANKS_CLAUSE_ENDS = re.compile(r"[.,;!\n\u2014\u3002\uff0c\uff01،।]+\s*")
_MANY_WORDS = 14
"""A clause of more words than this is more than thanks or a wish."""


def is_courtesy(clause: str, *, beside_thanks: bool = False) -> bool:
    """Whether a clause only greets, thanks, says farewell, wishes well or is kind to the other person.

    In English, kind words may go on ("I am glad that you told me so") unless they state a view ("because",
    "should", "I think"); whatever else counts, in the languages of the shipped cultures, is a set phrase
    from beginning to end. Apostrophes are plain.

    `beside_thanks`: the clause stands in a turn that thanks, in lower case. Then good wishes and kind words
    count whatever their end, and so does a name or another word or two.
    """
    if beside_thanks:
        count = words(clause)
        if count <= _FEW_WORDS:
            return True
        if count > _MANY_WORDS or _STATES_MORE.search(clause):
            return False
        if _THANKS.search(clause) or _WISHES.match(clause):
            return True
    left = clause
    while match := _GREETING.match(left):
        left = left[match.end() :]
    if left != clause and words(left) <= _FEW_WORDS:
        return True
    left = _LEADING_FILLERS.sub("", left)
    if not _STATES_VIEW.search(left):
        warm = _WARM.match(left) and _ABOUT_THE_TALK.search(left)
        if warm or _SET_PHRASE.match(left):
            return True
    return _NOTHING_ELSE.fullmatch(clause) is not None


def is_only_thanks(text: str) -> bool:
    """Whether a turn, in lower case, is thanks, farewells and good wishes, and nothing else."""
    known = _THANKS_WORDS if text.isascii() else _THANKS_WORDS_ELSEWHERE
    if not any(word in text for word in known) or text.rstrip("\"' ").endswith(("?", "\uff1f", "\u061f")):
        return False
    clauses = _THANKS_CLAUSE_ENDS.split(text)
    return _THANKS.search(text) is not None and all(is_courtesy(one, beside_thanks=True) for one in clauses)
