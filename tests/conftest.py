"""Tests below `unit` and `property` never start a cluster."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("this test must not start Ray: put it below tests/ray")


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, then takes `init` out of it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.init = _refuse  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "ray":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


@pytest.fixture(scope="session", autouse=True)
def temporary_directory() -> Iterator[None]:
    """A lane's own, for what goes beside the tests' paths: sessions of Ray clear up after those that died,
    and are not to do it for other lanes. Its path is short, since sockets live below it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        folder = tempfile.mkdtemp(prefix="")
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `ray.init` raise, whether ray is imported already or not. Ray itself is not imported."""
    if not {"unit", "property"} & set(request.path.parts):
        yield
        return
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "init", _refuse)
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    yield
    sys.meta_path.remove(finder)
    if "ray" in sys.modules:
        # It goes again, so that no later test meets a ray that cannot start.
        for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
            del sys.modules[name]
