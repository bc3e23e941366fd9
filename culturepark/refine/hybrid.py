"""A verifier for models too small to judge: the embedder compares, two thresholds decide.

A small chat model labels opinions no better than chance. Here an opinion is compared with what each
side of the question would say (the statement and its negation, in several wordings); what is near to
neither is novel, and otherwise the nearer side is taken to be the opinion's. What this reaches on
held-out questions is in `data/calibration.json`: it tells well whether an opinion is on the question,
and only fairly which side it takes, because embeddings of opposite opinions are alike. A large chat
model judges better.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from msgspec import Struct

from culturepark.models.errors import ModelError
from culturepark.ports import Embedder, Vectors
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
"""GlobalOpinionQA has 2,556 questions. Two positions of 3,072 numbers are 24 KB a question."""
_SIDES = 2
"""Positions of an ordered scale before that of its middle answers."""


class Position(Struct, frozen=True):
    """One thing that people could hold on a question: its texts, and the codes of the answers that do."""

    texts: tuple[str, ...]
    codes: tuple[int, ...]


def positions_of(seed: Seed) -> tuple[Position, ...]:
    """The positions on a seed's question, at least two.

    An ordered scale has two: for (the statement) and against (the negation), and a third for its
    middle answers, if it has any, which only counts for stances that hold it: what most people say
    in the middle of a scale is near to everything. Without a negation the labels of the answers of
    each side stand in, which tells the sides apart less well. A nominal scale has one position an
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


async def embed_positions(
    embedder: Embedder, positions: Sequence[Position], told: list[Usage] | None = None
) -> Vectors:
    """One row a position: the mean of its wordings' vectors, so its length is a little below 1.

    A dot product with it is the mean cosine similarity with the wordings. What it took is added to `told`.
    Raises ModelError.
    """
    texts = [[form.format(text) for text in one.texts for form in WORDINGS] for one in positions]
    vectors = await embedder.embed([text for group in texts for text in group], told)
    ends = np.cumsum([len(group) for group in texts])
    return np.stack([group.mean(axis=0) for group in np.split(vectors, ends[:-1])]).astype(np.float32)


class _Known(Struct):
    """One seed's positions: their vectors, or the one call that is to bring them, and what of its cost
    nobody has counted yet."""

    positions: tuple[Position, ...]
    vectors: asyncio.Task[Vectors]
    told: list[Usage]


class HybridVerifier:
    """Judges opinions with an embedder; the vectors of the last few thousand seeds' positions are kept.

    `thresholds` must have been fitted on this embedder (scripts/calibrate_verifier.py); without them
    those of the embedder that ships with culturepark are taken.
    """

    def __init__(self, embedder: Embedder, thresholds: Thresholds | None = None) -> None:
        self._embedder = embedder
        self._thresholds = thresholds or shipped_calibration().thresholds
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def verify(self, seed: Seed, stance_code: int, opinion: str) -> Judgement:
        """Judge one opinion against an answer. Raises ModelError; KeyError for an unknown answer."""
        return (await self.verify_many(seed, stance_code, [opinion]))[0]

    async def verify_many(
        self,
        seed: Seed,
        stance_code: int,
        opinions: Sequence[str],
        embed: Callable[[Sequence[str]], Awaitable[Vectors]] | None = None,
        told: list[Usage] | None = None,
    ) -> list[Judgement]:
        """Judge opinions against one answer, in order, with one call of the embedder for all of them.

        `embed` makes that call if it is given. What embedding the seed's positions took, which is done
        once for all who ask, is added to one caller's `told`. Raises ModelError.
        """
        if not opinions:
            return []
        positions, anchors = await self._positions(seed, [] if told is None else told)
        stated = stated_position(seed, positions, stance_code)
        if seed.scale != "nominal" and stated < _SIDES:
            anchors = anchors[:_SIDES]  # the middle counts only for those who hold it
        sims = (await (embed or self._embedder.embed)(opinions)) @ anchors.T
        return [judge([float(sim) for sim in row], stated, self._thresholds) for row in sims]

    async def _positions(self, seed: Seed, told: list[Usage]) -> tuple[tuple[Position, ...], Vectors]:
        positions = positions_of(seed)
        known = self._known.get(seed.id)
        # Two runs' seeds may share an id and differ in wording.
        if known is None or known.positions != positions:
            known = self._begun(seed.id, positions)
        self._known.move_to_end(seed.id)
        try:
            # Who is cancelled leaves the call to the others.
            return positions, await asyncio.shield(known.vectors)
        except ModelError as error:
            # One for each who waits, and none with a cost: that is counted once, below.
            raise ModelError(error.kind, error.reason, status=error.status) from None
        finally:
            told += known.told
            known.told.clear()

    def _begun(self, seed_id: str, positions: tuple[Position, ...]) -> _Known:
        told: list[Usage] = []
        embedding = asyncio.create_task(self._embedded(positions, told))
        known = self._known[seed_id] = _Known(positions, embedding, told)
        embedding.add_done_callback(lambda done: self._forget_failed(seed_id, done))
        if len(self._known) > _CACHED_SEEDS:
            self._known.popitem(last=False)
        return known

    async def _embedded(self, positions: tuple[Position, ...], told: list[Usage]) -> Vectors:
        try:
            return await embed_positions(self._embedder, positions, told)
        except ModelError as error:
            told.append(error.usage)
            raise

    def _forget_failed(self, seed_id: str, done: asyncio.Task[Vectors]) -> None:
        failed = done.cancelled() or done.exception() is not None
        if failed and (known := self._known.get(seed_id)) is not None and known.vectors is done:
            del self._known[seed_id]


def _answered(seed: Seed, label: str) -> str:
    return f"{seed.statement} {label}"
