"""Every word a model reads. Change one and `PROMPT_VERSION` goes up.

A profile is a set of prompts for one size of model: `full` for models that follow instructions,
`small` for models of under about a billion parameters, which need the first words of their answer
put into their mouth. The profile decides the words, never the method.
"""

from __future__ import annotations

PROMPT_VERSION = "2"
"""Part of a run's fingerprint and of each sample's provenance."""
