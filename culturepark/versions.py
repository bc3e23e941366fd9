"""Versions that a run's identity and a sample's provenance name. They change with what they stand for."""

from __future__ import annotations

PROMPT_VERSION = "2"
"""The version of the words that models read (`prompts/`). It is part of a run's fingerprint and of a sample's
provenance."""

PLAN_VERSION = 1
"""The version of the plan. It changes when the same settings would give other dialogues."""
