"""The seeds of a run, from all its sources."""

from __future__ import annotations

from collections.abc import Sequence

from culturepark.errors import SeedError
from culturepark.seeds.builtin import builtin_seeds
from culturepark.seeds.jsonl import read_seeds
from culturepark.seeds.model import Seed


def load_seeds(sources: Sequence[str]) -> tuple[Seed, ...]:
    """The seeds of each source in turn; a source is `builtin` or the path of a JSONL file.

    Raises SeedError if there is no source, a file is at fault, or two seeds share an id.
    """
    if not sources:
        raise SeedError("seeds", "no source is named.", 'Name a JSONL file, or "builtin".')
    seeds: list[Seed] = []
    owners: dict[str, str] = {}
    for source in sources:
        for seed in builtin_seeds() if source == "builtin" else read_seeds(source):
            if seed.id in owners:
                raise SeedError(
                    source,
                    f"the seed {seed.id} is also in {owners[seed.id]}.",
                    "Ids are unique across sources: remove one of the two, or rename it.",
                )
            owners[seed.id] = source
            seeds.append(seed)
    return tuple(seeds)
