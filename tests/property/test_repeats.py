"""What is said again is found from hashes alone as it would be by comparing every pair of turns."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from culturepark import repeats
from culturepark.repeats import ALIKE, Said

WORDS = (
    "bread guest elder harvest river wedding morning teacher silence promise garden winter market cousin "
    "letter bridge mountain window ladder kettle orchard saddle lantern village shepherd blanket"
).split()
SENTENCES = [
    f"In our house the {a} comes before the {b}" for a, b in zip(WORDS, reversed(WORDS), strict=True)
]

texts = st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6).map(lambda some: ". ".join(some) + ".")


def parts(text: str) -> list[str]:
    return [*repeats._sentences(text), *repeats._ends(text)]


def plainly(earlier: list[str], text: str) -> str | None:
    """The rule, read aloud: every earlier turn is looked at."""
    own = repeats._sentences(text)
    if any(own.count(one) >= 3 for one in own):
        return "looping"
    if any(sum(one in parts(turn) for turn in earlier) >= 2 for one in own):
        return "looping"
    common = [[part for part in dict.fromkeys(parts(text)) if part in parts(turn)] for turn in earlier]
    alike = sum(
        repeats._alike(text, turn, shared) for turn, shared in zip(earlier, common, strict=True) if shared
    )
    return "looping" if alike >= 2 else "repeated" if alike else None


@settings(deadline=None)
@given(earlier=st.lists(texts, max_size=8), text=texts)
def test_no_turn_has_to_be_looked_at_to_know_what_is_said_again(earlier: list[str], text: str) -> None:
    assert Said(earlier).again(text) == plainly(earlier, text)


@settings(deadline=None)
@given(earlier=st.lists(st.text(max_size=200), max_size=6), text=st.text(max_size=200))
def test_a_turn_that_is_told_twice_counts_once(earlier: list[str], text: str) -> None:
    once, twice = Said(), Said()
    for number, turn in enumerate(earlier, 1):
        once.add(turn, number)
        twice.add(turn, number)
        twice.add(turn, number)
    assert once.again(text) == twice.again(text)


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
        assert Said([said]).again(again) in ("repeated", "looping")
