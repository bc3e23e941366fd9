"""Runs that a scripted model made, for tests of what is done with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from culturepark.store.rundir import Run
from tests import runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run that nobody may change."""
    return runs.made(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run of one's own."""
    return runs.made(tmp_path / "run")
