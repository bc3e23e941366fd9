"""Batches: items that are worked on together, of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T", bound=Sequence[Any])


def batches(items: Iterable[T], most_size: int, most_items: int | None = None) -> Iterator[list[T]]:
    """Items in their order, as lists of at most `most_items`, whose lengths add up to at most `most_size`
    unless one alone is longer."""
    batch: list[T] = []
    size = 0
    for item in items:
        if batch and (len(batch) == most_items or size + len(item) > most_size):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item)
    if batch:
        yield batch
