"""Versions that a run's identity and a sample's provenance name. They change with what they stand for."""

from __future__ import annotations

PROMPT_VERSION = "2"
"""Of every word a model reads (`prompts/`): part of a run's fingerprint and of a sample's provenance."""

PLAN_VERSION = 1
"""Of the plan: changes when the same settings would give other dialogues."""
