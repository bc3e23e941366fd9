"""Selection: near-duplicates go, one of each cluster stays, and everybody learns why."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from culturepark.ports import Vectors
from culturepark.refine.select import Candidate, Choice, KeptVectors, select

BEFORE = 5
"""Opinions that the culture kept already."""


def world(seed: int, n: int, spread: float, groups: int) -> tuple[list[Candidate], Vectors, Vectors]:
    """Candidates around a few centres, and what was kept before."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, 8))
    rows = centres[rng.integers(4, size=n + BEFORE)] + spread * rng.normal(size=(n + BEFORE, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if n > 2:
        rows[1] = rows[0]  # an exact duplicate
    candidates = [
        Candidate(f"o{i}", "word " * int(rng.integers(1, 9)), int(rng.integers(groups))) for i in range(n)
    ]
    return candidates, rows[:n].astype(np.float32), rows[n:].astype(np.float32)


def kept_before(vectors: Vectors) -> KeptVectors:
    kept = KeptVectors()
    for i, vector in enumerate(vectors):
        kept.add(f"b{i}", vector)
    return kept


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    n=st.integers(0, 30),
    spread=st.sampled_from([0.0, 0.05, 0.3, 2.0]),
    groups=st.integers(1, 4),
    clusters=st.integers(0, 12),
    near=st.sampled_from([0.8, 0.97, 1.01]),
    longest=st.booleans(),
)
def test_what_is_kept(
    seed: int, n: int, spread: float, groups: int, clusters: int, near: float, longest: bool
) -> None:
    candidates, vectors, before = world(seed, n, spread, groups)
    kept = kept_before(before)
    choices = select(candidates, vectors, kept, near_duplicate=near, clusters=clusters, keep_longest=longest)
    again = select(
        candidates, vectors, kept_before(before), near_duplicate=near, clusters=clusters, keep_longest=longest
    )
    assert choices == again
    assert len(choices) == n
    winners = [i for i, choice in enumerate(choices) if choice.kept]
    assert kept.ids == [f"b{i}" for i in range(BEFORE)] + [candidates[i].id for i in winners]
    if clusters:
        assert len(winners) <= clusters
    # What is kept is far from all else that is kept, now and before.
    for a in winners:
        assert near > 1 or all(vectors[a] @ vectors[b] < near + 1e-5 for b in winners if a != b)
        assert near > 1 or (before @ vectors[a]).max() < near + 1e-5
    index = {candidate.id: i for i, candidate in enumerate(candidates)}
    of_cluster = {choices[i].cluster: i for i in winners}
    assert len(of_cluster) == len(winners)
    for i, choice in enumerate(choices):
        check_fate(i, choice, candidates, vectors, before, index, near, longest, of_cluster)
    unique = [c for c in choices if c.reason != "near_duplicate"]
    if unique:
        assert winners  # a cell that has something new gives something
        if not clusters or clusters >= len(unique):
            assert len(winners) == len(unique)


def check_fate(
    i: int,
    choice: Choice,
    candidates: list[Candidate],
    vectors: Vectors,
    before: Vectors,
    index: dict[str, int],
    near: float,
    longest: bool,
    of_cluster: dict[int, int],
) -> None:
    if choice.kept:
        assert (choice.reason, choice.instead) == ("", "")
    elif choice.reason == "near_duplicate":
        assert near <= 1
        other = (
            before[int(choice.instead[1:])] if choice.instead[0] == "b" else vectors[index[choice.instead]]
        )
        assert vectors[i] @ other >= near - 1e-5
        assert choice.instead[0] == "b" or index[choice.instead] < i
    else:
        assert choice.reason == "cluster"
        if choice.cluster < 0:
            return  # more groups than clusters: this one got none
        winner = of_cluster[choice.cluster]
        assert choice.instead == candidates[winner].id
        assert candidates[winner].group == candidates[i].group
        if longest:
            assert len(candidates[winner].text) >= len(candidates[i].text)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(2, 20))
def test_every_side_is_heard_while_there_is_room(seed: int, n: int) -> None:
    candidates, vectors, _ = world(seed, n, 2.0, 3)
    choices = select(candidates, vectors, KeptVectors(), near_duplicate=1.01, clusters=3)
    heard = {c.group for c, choice in zip(candidates, choices, strict=True) if choice.kept}
    assert heard == {c.group for c in candidates}


def cluster_of(*texts: str) -> tuple[list[Candidate], Vectors]:
    """One cluster; the second of its members lies in the middle."""
    angles = np.array([-0.3, 0.0, 0.25, 0.5][: len(texts)])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return [Candidate(f"o{i}", text, "g") for i, text in enumerate(texts)], vectors


def test_the_middle_one_stays_and_not_the_longest() -> None:
    candidates, vectors = cluster_of("a b", "a b c", "the longest of all of these by far")
    kept = [c.kept for c in select(candidates, vectors, KeptVectors(), near_duplicate=1.01, clusters=1)]
    assert kept == [False, True, False]
    paper = select(candidates, vectors, KeptVectors(), near_duplicate=1.01, clusters=1, keep_longest=True)
    assert [c.kept for c in paper] == [False, False, True]


def test_equal_vectors_and_zero_vectors_do_no_harm() -> None:
    candidates = [Candidate(f"o{i}", "x", "g") for i in range(6)]
    for vectors in (np.zeros((6, 4), np.float32), np.tile(np.float32([1, 0, 0, 0]), (6, 1))):
        choices = select(candidates, vectors, KeptVectors(), near_duplicate=1.01, clusters=3)
        assert 1 <= sum(c.kept for c in choices) <= 3
