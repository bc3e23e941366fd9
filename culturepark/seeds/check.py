"""What must hold for every seed, and for every file of seeds."""

from __future__ import annotations

import math
import os

from culturepark.errors import SeedError
from culturepark.seeds.model import SEED_ID, Scale, Seed

SUM_TOLERANCE = 0.001
"""The sum of a country's shares may differ from 1 by this much: published shares are rounded."""

_SCALE_SIZES: dict[Scale, int] = {
    "agree3": 3,
    "agree4": 4,
    "agree5": 5,
    "agree10": 10,
    "frequency4": 4,
    "often4": 4,
    "entitled4": 4,
}


def unreadable(path: str | os.PathLike[str], error: OSError) -> SeedError:
    """The error of a file that cannot be read."""
    return SeedError(
        str(path), f"it cannot be read: {error.strerror}.", "Check the path and that you may read the file."
    )


def check_seed(seed: Seed, where: str) -> None:
    """Raise SeedError, at `where`, unless the seed can be used as it stands.

    Its id is well formed and its statement not blank; its options are two or more, with distinct
    codes that are not negative, and as many and as consecutive as an ordered scale says; each
    country's shares name option codes, lie in [0, 1] and sum to 1 (or are empty: never asked
    there); counts are not negative.
    """
    if not SEED_ID.fullmatch(seed.id):
        raise SeedError(
            where,
            f"{seed.id!r} is not a seed id.",
            "Use lower-case letters, digits and hyphens, at most 64 of them, not beginning with a hyphen.",
        )
    where = f"{where}: {seed.id}"
    if not seed.statement.strip():
        raise SeedError(where, "the statement is blank.", "Write the question or statement people answered.")
    _check_options(seed, where)
    for key, answers in seed.answers.items():
        at = f"{where}: answers of {key or 'a nameless country'}"
        if not key.strip():
            raise SeedError(
                at, "the country's key is blank.", "Use a key that a culture's `survey_keys` name."
            )
        _check_shares(seed, answers.shares, at)
        if answers.weighted_shares is not None:
            if bool(answers.weighted_shares) != bool(answers.shares):
                raise SeedError(
                    at, "only one of shares and weighted shares is empty.", "Give both, or leave both empty."
                )
            _check_shares(seed, answers.weighted_shares, at)
        counts = (answers.n_valid or 0, answers.n_missing or 0, *answers.missing.values())
        if not all(math.isfinite(count) and count >= 0 for count in counts):
            raise SeedError(at, "a count is negative or not a number.", "Counts of answers start at 0.")


def _check_options(seed: Seed, where: str) -> None:
    codes = sorted(option.code for option in seed.options)
    if len(codes) < 2:
        raise SeedError(where, f"it has {len(codes)} options.", "A question needs two options or more.")
    if len(set(codes)) < len(codes):
        raise SeedError(where, "two options have the same code.", "Give each option its own code.")
    if codes[0] < 0:
        raise SeedError(
            where,
            f"option code {codes[0]} is negative.",
            "Surveys mark missing answers with negative codes; they are never options.",
        )
    if not all(option.label.strip() for option in seed.options):
        raise SeedError(where, "an option has a blank label.", "Give each option a label.")
    size = _SCALE_SIZES.get(seed.scale)
    if size is not None and codes != list(range(codes[0], codes[0] + size)):
        raise SeedError(
            where,
            f"scale {seed.scale} has {size} options with consecutive codes; these are {codes}.",
            'Correct the options, or set the scale to "nominal".',
        )


def _check_shares(seed: Seed, shares: dict[int, float], where: str) -> None:
    if not shares:
        return
    unknown = sorted(set(shares) - {option.code for option in seed.options})
    if unknown:
        raise SeedError(where, f"code {unknown[0]} has a share but is no option.", "Add the option.")
    for code, share in shares.items():
        if not 0 <= share <= 1:  # false for nan as well
            raise SeedError(where, f"the share of code {code} is {share}.", "Shares lie between 0 and 1.")
    total = math.fsum(shares.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise SeedError(
            where,
            f"the shares sum to {total:.4f}.",
            "They must sum to 1 over the valid answers; leave missing answers out of them.",
        )
