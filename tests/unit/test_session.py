"""Ray that does not come up in time."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from actors import ray_patches, session
from culturepark.errors import CultureParkError


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What becomes of each start of Ray, in order."""
    plan: list[Exception | None] = []

    def init(**options: Any) -> None:
        if (error := plan.pop(0)) is not None:
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return plan


LATE = Exception("The current node timed out during startup. This could happen because ...")


def test_it_is_started_again(starts: list[Exception | None]) -> None:
    starts += [LATE, None]
    with session.ray_session():
        assert starts == []


def test_if_it_never_comes_up_there_is_one_clear_error(starts: list[Exception | None]) -> None:
    starts += [LATE, LATE]
    with pytest.raises(CultureParkError, match="did not come up"), session.ray_session():
        pass


def test_another_error_is_not_tried_again(starts: list[Exception | None]) -> None:
    starts += [ValueError("no such option")]
    with pytest.raises(ValueError, match="no such option"), session.ray_session():
        pass


def test_started_nodes_are_ended_and_an_unknown_ray_starts_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[str] = []

    class Node:
        def get_gcs_client(self) -> Any:
            return self

        def internal_kv_put(self, *_: object) -> None: ...

        def kill_all_processes(self, **_: object) -> None:
            ended.append("node")

    def init(**_: object) -> None:
        ray_patches._private("node").Node.start_api_server(Node(), include_dashboard=False)
        raise LATE

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(CultureParkError), session.ray_session():
        pass
    assert ended == ["node", "node"]

    nodes = ray_patches._private("node")
    served = nodes.Node.start_api_server
    monkeypatch.setattr(ray_patches, "_private", lambda name: object())
    monkeypatch.setattr(ray, "init", lambda **_: None)
    with session.ray_session():
        assert nodes.Node.start_api_server is served
