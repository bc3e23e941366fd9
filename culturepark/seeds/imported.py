"""What an import of somebody else's survey file gives back."""

from __future__ import annotations

from msgspec import Struct

from culturepark.seeds.model import Seed


class ImportResult(Struct, frozen=True):
    """Seeds from a survey file, and an account of what was left out and why.

    `rows` counts data rows read. `countries` counts, by country key, the interviews (WVS) or the
    questions with a usable distribution (GlobalOpinionQA). `skipped_items` lists seed ids whose
    column the file lacks. `left_out` counts what was dropped, by reason. `overlaps` lists seed ids
    that may ask the same thing as a built-in WVS item, and so are not held out from it.
    """

    seeds: tuple[Seed, ...]
    rows: int
    countries: dict[str, int]
    skipped_items: tuple[str, ...] = ()
    left_out: dict[str, int] = {}
    overlaps: tuple[str, ...] = ()
