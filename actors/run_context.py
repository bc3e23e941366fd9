"""What every actor is given when it is made: all that a plan follows from, as bytes."""

from __future__ import annotations

import contextlib
import logging
import sys
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import ray
import structlog
from msgspec import Struct

from culturepark.cultures import Culture
from culturepark.models.endpoint import HttpEndpoint, OnRetry
from culturepark.models.errors import ModelError
from culturepark.models.open import open_chat, open_embedder
from culturepark.plan import Plan
from culturepark.ports import ChatModel, Embedder
from culturepark.prompts.profile import Profile
from culturepark.prompts.registry import profile_named
from culturepark.seeds import Seed
from culturepark.settings import ModelSettings, Role, Settings
from culturepark.store.rundir import Run, RunFile

PackedContext = bytes | list[Any]
"""A run context as bytes, or, where it is large, a list with a reference to them in Ray's object store: Ray
would put a large argument there by itself, forget it once the actor is made, and have nothing to restart the
actor with."""
_LARGE_BYTES = 90_000
"""A context of more bytes goes to the object store: Ray keeps an argument of up to 100 KB with its actor."""


class RunContext(Struct, frozen=True, dict=True):
    """A run, as it is sent to other processes. `settings` already name where embedded models listen."""

    root: str
    file: RunFile
    settings: Settings
    seeds: tuple[Seed, ...]
    cultures: dict[str, Culture]

    @classmethod
    def of(cls, run: Run, settings: Settings) -> RunContext:
        """The context of a run."""
        return cls(str(run.root), run.file, settings, run.plan.seeds, run.plan.cultures)

    def packed(self) -> PackedContext:
        """As actors are given it. The caller has to keep it for as long as actors may restart."""
        data = zlib.compress(msgspec.msgpack.encode(self))
        return data if len(data) <= _LARGE_BYTES else [ray.put(data)]

    @classmethod
    def unpacked(cls, packed: PackedContext) -> RunContext:
        """The inverse of `packed`, in an actor's constructor."""
        data: bytes = packed if isinstance(packed, bytes) else ray.get(packed[0])
        return msgspec.msgpack.decode(zlib.decompress(data), type=cls)

    @cached_property
    def plan(self) -> Plan:
        """The plan, computed in this process."""
        return Plan(self.settings, self.seeds, self.cultures)

    @property
    def run(self) -> Run:
        """The run."""
        return Run(Path(self.root), self.file, self.settings, self.plan)

    def chat(self, role: Role, log: structlog.stdlib.BoundLogger) -> ChatModel:
        """The chat model of a role; retries are written to `log`."""
        model = self.settings.model_of(role)
        return open_chat(model, self.settings.limits, endpoint=self._endpoint(model, log))

    def embedder(self, log: structlog.stdlib.BoundLogger) -> Embedder:
        """The embedder; retries are written to `log`."""
        model = self.settings.model_of("embedder")
        return open_embedder(model, self.settings.limits, endpoint=self._endpoint(model, log))

    @cached_property
    def endpoints(self) -> list[HttpEndpoint]:
        """The endpoints that were opened in this process, one for all roles that call the same."""
        return []

    @cached_property
    def _opened(self) -> dict[bytes, HttpEndpoint]:
        return {}

    def _endpoint(self, model: ModelSettings, log: structlog.stdlib.BoundLogger) -> HttpEndpoint | None:
        if model.engine == "scripted":
            return None
        # Models that differ only in other settings are one endpoint, and share its limits.
        headers = sorted(model.headers.items())
        key = msgspec.msgpack.encode((model.engine, model.model, model.base_urls, model.api_key_env, headers))
        if key not in self._opened:
            self._opened[key] = HttpEndpoint(model, self.settings.limits, on_retry=_log_retries_to(log))
            self.endpoints.append(self._opened[key])
        return self._opened[key]

    def profile(self, role: Role) -> Profile:
        """The prompts of a role."""
        return profile_named(self.settings.model_of(role).profile)

    def logger(self, actor: str) -> structlog.stdlib.BoundLogger:
        """A log of one JSON object a line, in the run directory, one file for each actor."""
        return open_logger(Path(self.root), actor)


def _log_retries_to(log: structlog.stdlib.BoundLogger) -> OnRetry:
    def on_retry(affinity: str, url: str, error: ModelError, wait_s: float) -> None:
        log.warning(
            "call_retried",
            dialogue=affinity.rpartition(".")[2],
            url=url,
            kind=error.kind,
            reason=error.reason,
            wait_s=round(wait_s, 2),
        )

    return on_retry


def open_logger(root: Path, actor: str) -> structlog.stdlib.BoundLogger:
    """A log of one JSON object a line at `logs/<actor>.jsonl`."""
    folder = root / "logs"
    try:
        folder.mkdir(exist_ok=True)
        file = (folder / f"{actor}.jsonl").open("ab", buffering=0)
    except OSError:  # a node that does not share the run directory keeps its log to itself
        file = sys.stderr.buffer
    return structlog.wrap_logger(
        structlog.WriteLogger(_BestEffortFile(file)),  # pyright: ignore[reportArgumentType]
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            # In ASCII, so that no model's reply can control a terminal that shows the file.
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
        actor=actor,
    )


class _BestEffortFile:
    """A file whose write errors are ignored: a full disk costs lines of a log, never a dialogue."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, line: str) -> None:
        """Write a line, if it can be written."""
        with contextlib.suppress(OSError):
            self._file.write(line.encode("ascii", "backslashreplace"))

    def flush(self) -> None:
        """Flush, if it can be done."""
        with contextlib.suppress(OSError):
            self._file.flush()
