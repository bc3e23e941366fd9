"""A Ray cluster of several nodes on loopback: as many raylets, in this process's care.

    python -m tests.ray.cluster NODES TEMP_DIR

It prints one line of JSON (`address`, `jobs`) when it stands, and ends when its input is closed. The
command `ray start` would do for one node, but refuses a second one on loopback.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from typing import Any

from ray.cluster_utils import Cluster

_STORE_BYTES = 80 << 20


def main() -> None:
    """Start, tell where it is, wait, end."""
    nodes, temp_dir = int(sys.argv[1]), sys.argv[2]
    port = _free_port()
    common: dict[str, Any] = {
        "num_cpus": 1,
        "object_store_memory": _STORE_BYTES,
        "node_ip_address": "127.0.0.1",
        "temp_dir": temp_dir,
    }
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args={**common, **head, **_agent()})
    for _ in range(nodes - 1):
        cluster.add_node(**common, **_agent())
    # A raylet that was killed must not stay behind as a zombie: its workers would believe it alive.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(json.dumps({"address": cluster.address, "jobs": f"http://{cluster.webui_url}"}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


def _agent() -> dict[str, Any]:
    """A port of its own for a node's agent: one that finds Ray's usual port in use, by another cluster on
    this machine, accepts no jobs."""
    return {"dashboard_agent_listen_port": _free_port()}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    main()
