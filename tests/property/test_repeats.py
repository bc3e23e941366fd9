"""What is said again is found without comparing every pair of turns, and as it would be by that."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from culturepark.dialogue import repetition as repeats
from culturepark.dialogue.repetition import ALIKE, SENTENCE_CHARS, Earlier

WORDS = (
    "bread guest elder harvest river wedding morning teacher silence promise garden winter market cousin "
    "letter bridge mountain window ladder kettle orchard saddle lantern village shepherd blanket"
).split()
SENTENCES = [
    f"In our house the {a} comes before the {b}" for a, b in zip(WORDS, reversed(WORDS), strict=True)
]

joints = st.sampled_from([". ", "! ", "? ", ".\n", ", ", " - ", '." "'])


@st.composite
def turns(draw: st.DrawFn) -> str:
    said = draw(st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6))
    return "".join(sentence + draw(joints) for sentence in said).strip(' "-,')


def parts(text: str) -> list[str]:
    return [*repeats._sentences(text), *repeats._ends(text)]


def plainly(earlier: list[str], text: str) -> str | None:
    """The rule between turns, read aloud: every earlier turn is looked at, word by word."""
    own = repeats._sentences(text)
    if repeats._goes_round(text, own):
        return "looping"
    if any(len(one) >= SENTENCE_CHARS and sum(one in parts(turn) for turn in earlier) >= 2 for one in own):
        return "looping"
    alike = 0
    for turn in earlier:
        common = set(parts(text)) & set(parts(turn))
        half = 2 * sum(map(len, common)) >= len(text)
        if common and (half or common & set(repeats._ends(text))):
            alike += repeats._resemblance(text, turn) >= ALIKE
    return "looping" if alike >= 2 else "repeated" if alike else None


@settings(deadline=None)
@given(earlier=st.lists(turns(), max_size=8), text=turns())
def test_what_is_found_by_hashes_and_places_is_what_is_there(earlier: list[str], text: str) -> None:
    assert Earlier(earlier).again(text, len(earlier) + 1) == plainly(earlier, text)


@settings(deadline=None)
@given(earlier=st.lists(st.text(max_size=200), max_size=6), text=st.text(max_size=200))
def test_a_turn_that_is_told_twice_counts_once(earlier: list[str], text: str) -> None:
    once, twice = Earlier(), Earlier()
    for number, turn in enumerate(earlier, 1):
        once.add(turn, number)
        twice.add(turn, number)
        twice.add(turn, number)
    number = len(earlier) + 1
    assert once.again(text, number) == twice.again(text, number)
    twice.add(text, number)  # what was said meanwhile in the same place is nothing before it
    assert once.again(text, number) == twice.again(text, number)


@settings(deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=24, max_size=80),
    exchanged=st.sets(st.integers(0, 79), max_size=6),
)
def test_an_english_turn_with_a_few_words_exchanged_is_never_passed_over(
    words: list[str], exchanged: set[int]
) -> None:
    said = " ".join(words)
    again = " ".join(
        "elsewhere" if i in exchanged and 4 < i < len(words) - 4 else w for i, w in enumerate(words)
    )
    if repeats._resemblance(again, said) >= ALIKE and len(exchanged) <= len(words) // 12:
        assert Earlier([said]).again(again, 2) in ("repeated", "looping")
