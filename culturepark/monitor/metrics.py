"""The one table of metrics: what a run exports to Prometheus, and how each value follows from its status.

Pure: `actors.metrics` registers the table with Ray and gives it the values. Labels are few and small:
no dialogue ids, and of an address its host and port alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from msgspec import Struct

from culturepark.monitor.status import Status, host_and_port

PREFIX = "culturepark_"
Labels = tuple[tuple[str, str], ...]


class Metric(Struct, frozen=True):
    """One metric. `name` is without prefix; `buckets` are a histogram's upper bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_WHERE = ("model", "endpoint")

METRICS = (
    Metric("dialogues_planned", "gauge", "dialogues", "in the plan of this run"),
    Metric("dialogues_in_flight", "gauge", "dialogues", "begun and not on disk yet"),
    Metric("dialogues_refining", "gauge", "dialogues", "of those in flight: past their last turn"),
    Metric("dialogues_finished_total", "counter", "dialogues", "on disk, finished"),
    Metric("dialogues_failed_total", "counter", "dialogues", "on disk, failed; by kind", ("kind",)),
    Metric("turns_total", "counter", "turns", "said, those of dialogues in flight included"),
    Metric(
        "tokens_total", "counter", "tokens",
        "of ended dialogues; `prompt` includes `cached`, which the endpoint read from its cache",
        ("role", "kind"),
    ),
    Metric("calls_total", "counter", "calls", "to models, of ended dialogues", ("role",)),
    Metric("cost_so_far", "gauge", "money", "of ended dialogues; absent while a price or usage is unknown"),
    Metric("cost_to_come", "gauge", "money", "of dialogues still owed, at the mean so far; absent likewise"),
    Metric("time_left_seconds", "gauge", "seconds", "a guess by the last 30 s; absent without one"),
    Metric("opinions_found_total", "counter", "opinions", "extracted from dialogues"),
    Metric("opinions_kept_total", "counter", "opinions", "kept as samples"),
    Metric("opinions_rejected_total", "counter", "opinions", "not kept, by reason", ("reason",)),
    Metric("samples", "gauge", "samples", "kept so far, by culture", ("culture",)),
    Metric("retries_total", "counter", "requests", "that were further attempts at one call"),
    Metric("endpoint_limit", "gauge", "requests", "allowed at once, all processes together", _WHERE),
    Metric("endpoint_in_flight", "gauge", "requests", "under way", _WHERE),
    Metric("endpoint_waiting", "gauge", "requests", "held back by the limit", _WHERE),
    Metric("endpoint_requests_per_second", "gauge", "1/s", "answered, over the last 5 s", _WHERE),
    Metric("endpoint_latency_seconds", "gauge", "seconds", "of a request, running mean", _WHERE),
    Metric("endpoint_weight", "gauge", "0 to 1", "share of load beside other replicas", _WHERE),
    Metric("endpoint_refused_total", "counter", "requests", "refused with status 429", _WHERE),
    Metric(
        "endpoint_broken_total", "counter", "requests",
        "that met a 5xx, a lost connection or a time-out", _WHERE,
    ),
    Metric(
        "poll_seconds", "histogram", "seconds",
        "until moderator and collector answered the driver: grows when they are short of CPU",
        (), (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    ),
)  # fmt: skip
"""Every metric there is."""


class Value(Struct, frozen=True):
    """The value of one time series now; a counter counts from the beginning of the run."""

    name: str
    labels: Labels
    value: float


def values(status: Status) -> Iterator[Value]:
    """The values of all gauges and counters; what is unknown is left out."""
    dialogues = status.dialogues
    plain: dict[str, float | None] = {
        "dialogues_planned": dialogues.planned,
        "dialogues_in_flight": dialogues.in_flight,
        "dialogues_refining": dialogues.refining,
        "dialogues_finished_total": dialogues.finished,
        "turns_total": status.turns,
        "cost_so_far": status.cost.so_far,
        "cost_to_come": status.cost.to_come,
        "time_left_seconds": status.left_s,
        "opinions_found_total": status.funnel.get("extracted"),
        "opinions_kept_total": status.funnel.get("kept"),
        "retries_total": status.retries,
    }
    for name, value in plain.items():
        if value is not None:
            yield Value(name, (), value)
    failures: dict[str, int] = status.funnel.get("failures", {})
    for kind, n in failures.items():
        yield Value("dialogues_failed_total", (("kind", kind),), n)
    rejections: dict[str, int] = status.funnel.get("rejections", {})
    for reason, n in rejections.items():
        yield Value("opinions_rejected_total", (("reason", reason),), n)
    for culture, seen in status.cultures.items():
        yield Value("samples", (("culture", culture),), seen["kept"])
    usage: dict[str, dict[str, Any]] = status.usage
    for role, used in usage.items():
        yield Value("calls_total", (("role", role),), used["calls"])
        for kind in ("prompt", "cached", "completion"):
            yield Value("tokens_total", (("role", role), ("kind", kind)), used[f"{kind}_tokens"])
    for one in status.endpoints:
        labels = (("model", one.model), ("endpoint", host_and_port(one.url)))
        for name, value in (
            ("limit", one.limit),
            ("in_flight", one.in_flight),
            ("waiting", one.waiting),
            ("requests_per_second", one.requests_s),
            ("latency_seconds", one.latency_s),
            ("weight", one.weight),
            ("refused_total", one.refused),
            ("broken_total", one.broken),
        ):
            yield Value(f"endpoint_{name}", labels, value)


def page_table() -> str:
    """The table in Markdown, as docs/metrics.md shows it."""
    rows = ["| metric | kind | unit | labels | |", "|---|---|---|---|---|"]
    for one in METRICS:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        rows.append(f"| `{PREFIX}{one.name}` | {one.kind} | {one.unit} | {labels} | {one.help} |")
    return "\n".join(rows) + "\n"
