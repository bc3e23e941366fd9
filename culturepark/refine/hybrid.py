"""A verifier for models too small to judge: the embedder compares, two thresholds decide.

A small chat model labels opinions no better than chance. Here an opinion is compared with what each
side of the question would say (the statement and its negation, in several wordings); what is near to
neither is novel, and otherwise the nearer side counts as the opinion's. What this reaches on
held-out questions is in `data/calibration.json`: it finds well whether an opinion is on the question,
and only fairly on which side it is, because embeddings of opposite opinions are alike. A large chat
model judges better.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from culturepark.models.errors import ModelError
from culturepark.ports import Embedder, Embedding, Vectors
from culturepark.refine.calibration import Thresholds, shipped_calibration
from culturepark.refine.verify import Judgement
from culturepark.seeds.model import Seed
from culturepark.usage import Usage

# Survey wording is terse and talk is not: said like talk, a position is nearer to opinions on it than
# to remarks that only share its words. Of all subsets of these four, this one was the best on the
# training questions; against the bare sentence it raises three-way accuracy on the held-out ones from
# 0.67 to 0.73. The wordings fit any sentence, so options of a question too.
WORDINGS = (
    "{}",
    "This is my opinion: {}",
    "From what I have seen in my family and my town: {}",
    "My neighbours and I say the same: {}",
)
"""How a position is worded; its similarity is the mean over these."""

_CACHED_SEEDS = 4096
"""The positions of at most this many seeds are cached (LRU): all 2,556 questions of GlobalOpinionQA and more.
Two positions of 3,072 numbers are 24 KB a question."""
_SIDES = 2
"""An ordered scale has this many positions before that of its middle answers."""


class Position(Struct, frozen=True):
    """One thing that people could hold on a question: its texts, and the codes of the answers that do."""

    texts: tuple[str, ...]
    codes: tuple[int, ...]


def positions_of(seed: Seed) -> tuple[Position, ...]:
    """The positions on a seed's question, at least two.

    An ordered scale has two: for (the statement) and against (the negation), and a third for its
    middle answers, if it has any, which only counts for stances that hold it: what most people say
    in the middle of a scale is near to everything. Without a negation the labels of the answers of
    each side stand in, which separates the sides less well. A nominal scale has one position an
    option.
    """
    if seed.scale == "nominal":
        return tuple(Position((_answered(seed, o.label),), (o.code,)) for o in seed.options)
    positions: list[Position] = []
    for side, sentence in (("for", seed.statement), ("against", seed.negation)):
        options = [option for option in seed.options if seed.side(option.code) == side]
        texts = (
            (sentence,) if seed.negation and sentence else tuple(_answered(seed, o.label) for o in options)
        )
        positions.append(Position(texts, tuple(option.code for option in options)))
    middle = tuple(option.code for option in seed.options if seed.side(option.code) == "between")
    if middle:
        positions.append(Position((f"I am in two minds, yes and no: {seed.statement}",), middle))
    return tuple(positions)


def stated_position(seed: Seed, positions: Sequence[Position], stance_code: int) -> int:
    """The index of the position that an answer holds. Raises KeyError if there is no such answer."""
    code = seed.option(stance_code).code
    return next(index for index, position in enumerate(positions) if code in position.codes)


def judge(sims: Sequence[float], stated: int, thresholds: Thresholds) -> Judgement:
    """Judge an opinion by its cosine similarity with each position, two or more.

    `stated` is the index of the position that the stance holds. Below the relevance threshold an
    opinion is novel. Otherwise it entails the stance when the stance's position is the nearest.
    """
    best = max(sims)
    if best < thresholds.relevance:
        return Judgement(
            "novel",
            f"It is about something else: best similarity {best:.3f}, threshold {thresholds.relevance:.3f}.",
            thresholds.relevance - best,
        )
    other = max(sim for index, sim in enumerate(sims) if index != stated)
    gap = sims[stated] - other
    entails = gap >= 0
    return Judgement(
        "entails" if entails else "contradicts",
        f"It is nearer to {'the stance' if entails else 'another position'}: "
        f"similarity {sims[stated]:.3f} with the stance, {other:.3f} with the best other.",
        abs(gap),
    )


async def embed_positions(embedder: Embedder, positions: Sequence[Position]) -> Embedding:
    """One row for each position: the mean of its wordings' vectors, so its length is a little below 1.

    A dot product with it is the mean cosine similarity with the wordings. Raises ModelError.
    """
    texts = [[form.format(text) for text in one.texts for form in WORDINGS] for one in positions]
    embedding = await embedder.embed([text for group in texts for text in group])
    ends = np.cumsum([len(group) for group in texts])
    means = [group.mean(axis=0) for group in np.split(embedding.vectors, ends[:-1])]
    return Embedding(np.stack(means).astype(np.float32), embedding.usage)


class _Known(Struct):
    """One seed's positions, and the one call that embeds them for all callers (single flight)."""

    positions: tuple[Position, ...]
    embedding: asyncio.Task[Embedding]
    counted: bool = False
    """Whether a caller was given the call's usage."""


class HybridVerifier:
    """Judges opinions with an embedder; the vectors of the last few thousand seeds' positions are cached.

    `thresholds` must have been fitted on this embedder (scripts/calibrate_verifier.py); the default is
    those of the embedder that ships with culturepark.
    """

    def __init__(self, embedder: Embedder, thresholds: Thresholds | None = None) -> None:
        self._embedder = embedder
        self._thresholds = thresholds or shipped_calibration().thresholds
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def verify(self, seed: Seed, stance_code: int, opinion: str) -> Judgement:
        """Judge one opinion against an answer. Raises ModelError; KeyError for an unknown answer."""
        anchors = await self.positions(seed)
        opinions = await self._embedder.embed([opinion])
        return self.judge_all(seed, stance_code, anchors.vectors, opinions.vectors)[0]

    def judge_all(self, seed: Seed, stance_code: int, anchors: Vectors, opinions: Vectors) -> list[Judgement]:
        """Judge embedded opinions against one answer, in order.

        `anchors` has one row for each position of the seed, as `positions` gives them, `opinions` one row
        for each opinion. Raises KeyError for an unknown answer.
        """
        stated = stated_position(seed, positions_of(seed), stance_code)
        if seed.scale != "nominal" and stated < _SIDES:
            anchors = anchors[:_SIDES]  # the middle counts only for a stance that holds it
        sims = opinions @ anchors.T
        return [judge([float(sim) for sim in row], stated, self._thresholds) for row in sims]

    async def positions(self, seed: Seed) -> Embedding:
        """One row for each position of the seed, embedded once for all callers.

        The first caller gets the usage of that call, be it in the result or in the ModelError that is
        raised; the others get none, so that it is counted once.
        """
        positions = positions_of(seed)
        known = self._known.get(seed.id)
        # Two runs' seeds may share an id and differ in wording.
        if known is None or known.positions != positions:
            known = self._begin(seed.id, positions)
        self._known.move_to_end(seed.id)
        try:
            # A caller that is cancelled leaves the call to the others.
            embedding = await asyncio.shield(known.embedding)
        except ModelError as error:
            # Each caller raises one of its own: a traceback belongs to one.
            usage = _counted_once(known, error.usage)
            raise ModelError(error.kind, error.reason, usage=usage, status=error.status) from None
        return Embedding(embedding.vectors, _counted_once(known, embedding.usage))

    def _begin(self, seed_id: str, positions: tuple[Position, ...]) -> _Known:
        embedding = asyncio.create_task(embed_positions(self._embedder, positions))
        known = self._known[seed_id] = _Known(positions, embedding)
        embedding.add_done_callback(lambda done: self._forget_failed(seed_id, done))
        if len(self._known) > _CACHED_SEEDS:
            self._known.popitem(last=False)
        return known

    def _forget_failed(self, seed_id: str, done: asyncio.Task[Embedding]) -> None:
        failed = done.cancelled() or done.exception() is not None
        if failed and (known := self._known.get(seed_id)) is not None and known.embedding is done:
            del self._known[seed_id]


def _counted_once(known: _Known, usage: Usage) -> Usage:
    counted, known.counted = known.counted, True
    return Usage() if counted else usage


def _answered(seed: Seed, label: str) -> str:
    return f"{seed.statement} {label}"
