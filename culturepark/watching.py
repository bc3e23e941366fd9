"""What is known of a run while it goes on."""

from __future__ import annotations

from msgspec import Struct

from culturepark.conductor import Progress


class Snapshot(Struct):
    """One look at a run. `funnels` holds counts by culture; `replayed` outcomes read back on resume."""

    progress: Progress
    funnels: dict[str, dict[str, int]]
    set_aside: tuple[str, ...]
    replayed: int
    elapsed_s: float
    draining: bool = False
