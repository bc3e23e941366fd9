"""The adapters that a run's trainings made, and how the embedded engine serves several at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from culturepark.errors import ConfigError, TrainingError
from culturepark.models.chat import HttpChatModel
from culturepark.models.local.engine import serve_here, with_adapter
from culturepark.models.local.weights import sha256_of
from culturepark.ports import ChatModel, Completion, Prompt, Sampling
from culturepark.settings import LimitSettings, ModelSettings
from culturepark.training.lora import GGUF_FILE
from culturepark.training.ports import Base, Outcome, Recipe
from culturepark.training.records import Records


class Adapter(Struct, frozen=True, kw_only=True):
    """A tuned model of a run.

    `name` is a culture's id or `joint`. `folder` holds the adapter; it is None for a model that a service
    keeps under the name `model`.
    """

    name: str
    backend: str
    key: str
    folder: Path | None
    model: str
    base: Base
    recipe: Recipe
    dataset: Path
    dataset_hash: str
    outcome: Outcome

    @property
    def gguf(self) -> Path | None:
        """The adapter for the embedded engine, if there is one."""
        path = self.folder / GGUF_FILE if self.folder else None
        return path if path and path.is_file() else None


def all_adapters(root: Path) -> list[Adapter]:
    """Every adapter of this run's finished trainings that still exists, oldest first."""
    records = Records(root)
    found: dict[str, Adapter] = {}
    for record in records.all():
        found.pop(record.key, None)
        if record.event != "finished" or record.outcome is None:
            continue
        job, outcome = records.job(record), record.outcome
        remote = job.backend == "openai"
        folder = None if remote else Path(job.output) / outcome.model
        if folder is None or folder.is_dir():
            found[record.key] = Adapter(
                name=job.name,
                backend=job.backend,
                key=record.key,
                folder=folder,
                model=outcome.model if remote else "",
                base=job.base,
                recipe=job.recipe,
                dataset=Path(job.dataset),
                dataset_hash=job.dataset_hash,
                outcome=outcome,
            )
    return list(found.values())


def adapters_of(root: Path) -> dict[str, Adapter]:
    """The newest adapter of each name."""
    return {adapter.name: adapter for adapter in all_adapters(root)}


def adapter_named(root: Path, name: str) -> Adapter:
    """The newest adapter of this name, or the one whose key begins with it. Raises TrainingError."""
    adapters = all_adapters(root)
    matching = [one for one in adapters if one.name == name] or [
        one for one in adapters if len(name) >= 8 and one.key.startswith(name)
    ]
    if not matching:
        there = ", ".join(sorted({one.name for one in adapters})) or "none"
        what = f"this run has no adapter {name!r} (there is: {there})."
        fix = f"Train it: `culturepark finetune {root} --culture {name}`."
        raise TrainingError(str(root), what, fix)
    return matching[-1]


class AdapterChat:
    """A chat model that answers with one adapter of a server. Implements ports.ChatModel."""

    def __init__(self, chat: ChatModel, place: int) -> None:
        self._chat = chat
        self._extra: dict[str, Any] = with_adapter(place)
        self._last: tuple[Sampling, Sampling] | None = None

    async def complete(
        self, prompt: Prompt, sampling: Sampling, *, affinity: str, schema: dict[str, Any] | None = None
    ) -> Completion:
        """Answer `prompt`; see ports.ChatModel."""
        if self._last is None or self._last[0] is not sampling:
            with_extra = msgspec.structs.replace(sampling, extra=sampling.extra | self._extra)
            self._last = sampling, with_extra
        return await self._chat.complete(prompt, self._last[1], affinity=affinity, schema=schema)


@asynccontextmanager
async def served_adapters(
    adapters: Sequence[Adapter], model: ModelSettings, limits: LimitSettings | None = None
) -> AsyncGenerator[dict[str, ChatModel]]:
    """Serve adapters of a model from this process until the block ends: chat models by the adapters' names.

    The same servers answer for all of them, each request with its own adapter (multi-LoRA serving). `model`
    are the settings of the embedded model that the adapters were trained on. Raises ConfigError if it is
    another one, TrainingError if an adapter cannot be served here.
    """
    from culturepark.models.local.weights import weights_of

    if model.engine != "embedded":
        what = "adapters are served here on the embedded engine, and this model is served elsewhere."
        raise ConfigError("adapters", what, "Serve it with vLLM instead: see docs/training.md.")
    digest = sha256_of(weights_of(model))
    files: list[Path] = []
    for adapter in adapters:
        path = adapter.gguf
        if path is None:
            what = "it has no GGUF file, so the embedded engine cannot serve it."
            raise TrainingError(f"adapter {adapter.name}", what, "Serve it with vLLM: see docs/training.md.")
        if adapter.base.digest != digest:
            what = f"it was trained on {adapter.base.name}, and the model here is another one."
            raise ConfigError(f"adapter {adapter.name}", what, "Name the model that it was trained on.")
        files.append(path)
    _servers, ready = await asyncio.to_thread(serve_here, model, files)
    chat = HttpChatModel(ready, limits or LimitSettings())
    try:
        yield {adapter.name: AdapterChat(chat, place) for place, adapter in enumerate(adapters)}
    finally:
        await chat.close()
