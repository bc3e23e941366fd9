"""How many processes a cluster gets and where: decisions alone, without Ray.

Agents and refiners share the cores half and half, at least one process each; more than `_MOST_CORES`
count as that many, since one moderator would not keep more of them busy.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from culturepark.models.local.engine import LOOPBACK
from culturepark.settings import ActorSettings

_MOST_CORES = 32


class Node(Struct, frozen=True):
    """A node of a cluster: Ray's id for it, its address, and the CPUs it offers."""

    id: str
    ip: str
    cpus: float


def staff(settings: ActorSettings, cultures: int, cpus: float) -> tuple[int, int]:
    """Agents of each culture, and refiners. What is set stands; the rest follows from `cpus`."""
    half = min(int(cpus), _MOST_CORES) // 2
    return settings.agents_per_culture or max(1, half // cultures), settings.refiners or max(1, half)


def engine_nodes(nodes: Sequence[Node], engines: int) -> list[Node]:
    """The nodes that serve an embedded model: `engines` of them, 0 for all that offer CPUs.

    The driver's node is the first in `nodes` and serves if no other can.
    """
    able = [node for node in nodes if node.cpus >= 1] or list(nodes[:1])
    return able[: engines or None]


def engine_host(nodes: Sequence[Node], node: Node) -> str:
    """Where a server on `node` listens: on loopback, unless other machines have to reach it."""
    return node.ip if len({one.ip for one in nodes}) > 1 else LOOPBACK
