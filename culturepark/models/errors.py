"""The error of a model call, classified."""

from __future__ import annotations

from culturepark.messages import RUN_STOPPERS, FailureKind
from culturepark.usage import Usage

PASSING: frozenset[FailureKind] = frozenset(
    {"rate_limited", "server", "timeout", "connection", "invalid_reply", "empty_reply", "too_large"}
)
"""Kinds of failure that may be gone at the next attempt (transient errors)."""
DOUBTFUL: frozenset[FailureKind] = frozenset({*PASSING, "forbidden"})
"""Kinds of failure that may be due to an outage or a key as well as to the request itself."""


class ModelError(Exception):
    """A model call gave no usable reply; with its kind, and the usage that it cost all the same."""

    def __init__(
        self,
        kind: FailureKind,
        reason: str,
        *,
        usage: Usage | None = None,
        status: int = 0,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind: FailureKind = kind
        self.reason = reason
        self.usage = usage or Usage()
        self.status = status
        """The HTTP status, 0 when there was none."""
        self.wait_s = wait_s
        """Seconds the endpoint asked to wait."""
        self.attempts = 0
        """Requests that were sent for the call."""

    @property
    def passing(self) -> bool:
        """Whether another attempt may succeed."""
        return self.kind in PASSING

    @property
    def is_its_own(self) -> bool:
        """Whether the failure is due to this very request: others may be answered."""
        return self.kind not in DOUBTFUL and not self.stops_run and self.kind != "internal"

    @property
    def stops_run(self) -> bool:
        """Whether every later call would fail alike."""
        return self.kind in RUN_STOPPERS
