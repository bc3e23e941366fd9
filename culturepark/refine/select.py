"""Diversity without verbosity: near-duplicates out, one medoid of each cluster kept.

Deterministic: the same opinions in the same order give the same choice, whatever the number of
processes. Embeddings of opposite opinions are alike, so opinions are split by the stance's side
and by verdict before they are clustered.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from msgspec import Struct

from culturepark.ports import Vectors


class Candidate(Struct, frozen=True):
    """An opinion that may be kept. `group` says which opinions it may be clustered with."""

    id: str
    text: str
    group: Hashable


class Choice(Struct, frozen=True):
    """What became of a candidate: kept, or rejected for a reason, and which one stands for it."""

    kept: bool
    reason: str = ""
    instead: str = ""
    cluster: int = -1


class KeptVectors:
    """Vectors of the opinions that a culture has kept so far, for finding near-duplicates."""

    def __init__(self) -> None:
        self._rows: Vectors = np.zeros((0, 0), dtype=np.float32)
        self._n = 0
        self.ids: list[str] = []

    def add(self, opinion_id: str, vector: Vectors) -> None:
        """Remember one kept opinion; `vector` has shape (dimensions,)."""
        if self._n == len(self._rows):
            grown = np.zeros((max(64, 2 * self._n), vector.shape[0]), dtype=np.float32)
            if self._n:
                grown[: self._n] = self._rows
            self._rows = grown
        self._rows[self._n] = vector
        self._n += 1
        self.ids.append(opinion_id)

    def nearest(self, vectors: Vectors) -> tuple[Vectors, list[str]]:
        """For each row the highest cosine similarity to a kept opinion, and that opinion's id."""
        if not self._n:
            return np.full(len(vectors), -1.0, dtype=np.float32), [""] * len(vectors)
        similar = vectors @ self._rows[: self._n].T
        best = similar.argmax(axis=1)
        return similar[np.arange(len(vectors)), best], [self.ids[i] for i in best]


def select(
    candidates: Sequence[Candidate],
    vectors: Vectors,
    kept_before: KeptVectors,
    *,
    near_duplicate: float,
    clusters: int,
    keep_longest: bool = False,
) -> list[Choice]:
    """Choose among the candidates of one cell.

    `vectors` has one row for each candidate. First, candidates within `near_duplicate` of one that the
    culture kept before, or of an earlier one here, go. Of the rest, `clusters` are kept (0: all):
    groups share that number in proportion to their size, k-means++ splits each group, and of each
    cluster the medoid stays, or its longest member with `keep_longest` (a fault of the published
    reference). What is kept is added to `kept_before`. Returns one choice for each, in order.
    """
    choices: list[Choice | None] = [None] * len(candidates)
    if not candidates:
        return []
    similar, nearest = kept_before.nearest(vectors)
    unique: list[int] = []
    for i in range(len(candidates)):
        if similar[i] >= near_duplicate:
            choices[i] = Choice(False, "near_duplicate", nearest[i])
            continue
        if unique:
            here = vectors[unique] @ vectors[i]
            best = int(here.argmax())
            if here[best] >= near_duplicate:
                choices[i] = Choice(False, "near_duplicate", candidates[unique[best]].id)
                continue
        unique.append(i)
    groups: dict[Hashable, list[int]] = {}
    for i in unique:
        groups.setdefault(candidates[i].group, []).append(i)
    sizes = [len(group) for group in groups.values()]
    offset = 0
    for group, share in zip(groups.values(), _shares(sizes, clusters), strict=True):
        for label, members in enumerate(_clusters(vectors[group], share)):
            rows = [group[m] for m in members]
            if keep_longest:
                winner = max(rows, key=lambda i: (len(candidates[i].text), -i))
            else:
                winner = rows[_medoid(vectors[rows])]
            for i in rows:
                if i == winner:
                    choices[i] = Choice(True, cluster=offset + label)
                else:
                    choices[i] = Choice(False, "cluster", candidates[winner].id, offset + label)
        if not share:
            for i in group:
                choices[i] = Choice(False, "cluster")
        offset += share
    done = [choice for choice in choices if choice is not None]
    assert len(done) == len(candidates)  # every candidate has a fate
    for i, choice in enumerate(done):
        if choice.kept:
            kept_before.add(candidates[i].id, vectors[i])
    return done


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """Split `total` clusters over groups in proportion to their size; every group gets one while
    there are any, none gets more than it has members; `total` 0 means as many as members."""
    if total == 0 or total >= sum(sizes):
        return list(sizes)
    shares = [0] * len(sizes)
    for _ in range(total):
        # The next one goes to the group that is furthest below its due (D'Hondt's method).
        open_groups = [g for g in range(len(sizes)) if shares[g] < sizes[g]]
        best = max(open_groups, key=lambda g: (shares[g] == 0, sizes[g] / (shares[g] + 1), -g))
        shares[best] += 1
    return shares


def _clusters(vectors: Vectors, k: int) -> list[list[int]]:
    """k-means++ on the sphere with a fixed seed; the rows of each cluster that is not empty."""
    n = len(vectors)
    if k <= 0:
        return []
    if k >= n:
        return [[i] for i in range(n)]
    rng = np.random.default_rng(n * 7919 + k)
    centres = [int(rng.integers(n))]
    distance = np.maximum(1 - vectors @ vectors[centres[0]], 0)
    while len(centres) < k:
        weights = distance.astype(np.float64)
        if weights.sum() > 0:
            nxt = int(rng.choice(n, p=weights / weights.sum()))
        else:  # all that is left lies on a centre
            nxt = next(i for i in range(n) if i not in centres)
        centres.append(nxt)
        distance = np.minimum(distance, np.maximum(1 - vectors @ vectors[nxt], 0))
        distance[centres] = 0
    means = vectors[centres]
    labels = np.full(n, -1)
    for _ in range(25):
        updated = (vectors @ means.T).argmax(axis=1)
        if (updated == labels).all():
            break
        labels = updated
        for c in range(k):
            members = vectors[labels == c]
            if len(members):
                mean = members.mean(axis=0)
                means[c] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return [rows for c in range(k) if (rows := np.flatnonzero(labels == c).tolist())]


def _medoid(vectors: Vectors) -> int:
    """The row with the highest mean similarity to the others; the first of equals."""
    nearness = (vectors @ vectors.T).sum(axis=1).round(5).tolist()
    return nearness.index(max(nearness))
