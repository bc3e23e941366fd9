"""The one way from `culturepark` up to `actors`: the driver of a run, found by name when it is needed.

Imports point from scripts to actors to culturepark. The command line lives in culturepark, and a run needs
actors; so `actors.driver` is imported here, when a run is launched, and everything else works with no Ray
installed. The one other module of actors that culturepark names is `actors.ray_train`, which
`training.subprocess_backend` runs as a program, in a process of its own (`tests/unit/test_layers.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast

from culturepark.monitor.figures import Snapshot
from culturepark.store.rundir import Run


class Driver(Protocol):
    """What `actors.driver` offers."""

    def generate(self, run: Run, show: Callable[[Snapshot], None]) -> Snapshot:
        """Hold the dialogues of a run; see `actors.driver.generate`."""
        ...


def generate(run: Run, show: Callable[[Snapshot], None]) -> Snapshot:
    """Run until every planned dialogue has ended; returns where it stands then.

    `show` is called about once a second. Raises Interrupted, EndpointError, RunDirError.
    """
    driver = cast(Driver, importlib.import_module("actors.driver"))
    return driver.generate(run, show)
