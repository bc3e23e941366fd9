"""Which prompt profile a model gets."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from culturepark.prompts.profile import Profile


@lru_cache(maxsize=4)
def profile_named(name: Literal["full", "small"]) -> Profile:
    """The profile with this name."""
    from culturepark.prompts.full import FullProfile
    from culturepark.prompts.small import SmallProfile

    return SmallProfile() if name == "small" else FullProfile()
