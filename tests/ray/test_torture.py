"""A bounded number of kills; `make torture` is the long one."""

from __future__ import annotations

from pathlib import Path

from tests.torture import torture

KILLS, SEED = 50, 20240515


def test_fifty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    found = torture(tmp_path, KILLS, SEED)
    assert found.kills.total() == KILLS
    assert len(found.kills) == 5  # each kind of process was killed
    assert found.samples
    assert (found.lost, found.doubled) == (0, 0)
    assert 0 < found.repeated <= found.allowed
