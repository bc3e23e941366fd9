"""How a model call fails."""

from __future__ import annotations

from culturepark.messages import RUN_STOPPERS, FailureKind
from culturepark.usage import Usage

PASSING: frozenset[FailureKind] = frozenset(
    {"rate_limited", "server", "timeout", "connection", "invalid_reply", "empty_reply", "too_large"}
)
"""Failures that another attempt may not meet."""
DOUBTFUL: frozenset[FailureKind] = frozenset({*PASSING, "forbidden"})
"""Failures that may be an outage's, or a key's, as well as the request's own."""


class ModelError(Exception):
    """A model call that gave no usable reply, classified, with the tokens it cost all the same."""

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
        """Whether it is this very request that will not be answered: others may be."""
        return self.kind not in DOUBTFUL and not self.stops_run and self.kind != "internal"

    @property
    def stops_run(self) -> bool:
        """Whether every later call would fail alike."""
        return self.kind in RUN_STOPPERS
