"""The table of metrics as Ray's: Ray collects them on each node and serves them to Prometheus."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from culturepark.monitor.metrics import METRICS, PREFIX, Labels, values
from culturepark.monitor.status import Status


class Metrics:
    """Registers the table, and gives Ray the values of each status."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[str, Histogram] = {}
        for one in METRICS:
            name, says = PREFIX + one.name, f"{one.help} ({one.unit})"
            if one.kind == "gauge":
                self._gauges[one.name] = Gauge(name, says, one.labels)
            elif one.kind == "counter":
                self._counters[one.name] = Counter(name, says, one.labels)
            else:
                self._histograms[one.name] = Histogram(name, says, list(one.buckets), one.labels)

    def report(self, status: Status) -> None:
        """Give Ray what this status tells."""
        for one in values(status):
            if gauge := self._gauges.get(one.name):
                gauge.set(one.value, dict(one.labels))
                continue
            before = self._counted.get((one.name, one.labels), 0.0)
            self._counted[one.name, one.labels] = one.value
            # Ray's counters are incremented. A count that fell belongs to a process that restarted.
            more = one.value - before if one.value >= before else one.value
            if more > 0:
                self._counters[one.name].inc(more, dict(one.labels))

    def polled(self, answered_in_s: float) -> None:
        """Observe how long the actors needed to answer."""
        self._histograms["poll_seconds"].observe(answered_in_s)
