"""Processes, addresses and restarts for the domain, on Ray.

What Ray reads from the environment when it is imported is set here, ahead of any module that
imports it.
"""

from __future__ import annotations

import os

METRICS_INTERVAL, METRICS_SELDOM = "RAY_metrics_report_interval_ms", "60000"

# A user's own values stand.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
os.environ.setdefault("RAY_worker_niceness", "0")  # the default of 15 starves agents beside an engine
os.environ.setdefault("RAY_task_events_report_interval_ms", "0")  # a quarter of a call's cost
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # or workers start in a second environment
# Ray prints the end of a dead node's log, state dump and all; the driver explains what follows from it.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Raylet is terminated")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
if not os.environ.get("RAY_ADDRESS"):
    # Or Ray turns loopback back into the machine's own address, and listens on it.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads spin, and there are processes enough
os.environ.setdefault(METRICS_INTERVAL, METRICS_SELDOM)  # Ray's own metrics, which are not read here
