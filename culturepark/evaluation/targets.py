"""What is evaluated: the model of a run, one behind an endpoint, or the one on this machine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from culturepark.errors import ConfigError
from culturepark.evaluation.asking import culture_of
from culturepark.models.local.engine import embedded_name, require_engine
from culturepark.models.local.serving import served
from culturepark.models.open import open_chat
from culturepark.ports import ChatModel, Completion, Prompt, Sampling
from culturepark.settings import ADDRESS_FIX, LimitSettings, ModelSettings, is_address, shown_address
from culturepark.store.rundir import Run, load_run
from culturepark.training.adapters import Adapter, adapter_named, adapters_of, served_adapters
from culturepark.training.datasets import read_dataset
from culturepark.training.split import held_out_questions

EMBEDDED = "embedded"
OWN = "own"
"""The name for all adapters of a run as one target: each culture's questions go to its own adapter."""


class Target(Struct, frozen=True):
    """A model under test. `trained_on` are ids of questions it may have learned answers to.

    `adapters` are by the culture whose questions they answer; one that answers all questions has the key "".
    """

    name: str
    model: ModelSettings
    limits: LimitSettings
    trained_on: frozenset[str] = frozenset()
    adapters: dict[str, Adapter] = {}

    @property
    def cultures(self) -> frozenset[str] | None:
        """The cultures that it can be asked about; None: any."""
        return frozenset(self.adapters) if self.adapters and "" not in self.adapters else None


def target_of(words: str, model: str = "", api_key_env: str = "OPENAI_API_KEY") -> Target:
    """The target that a command line names: `embedded`, an address, or the directory of a run.

    Of a run it is the base model of its trainings, and the run's questions count as trained on, but for those
    held out: the base model and its adapters are asked what neither has seen. Raises ConfigError or
    RunDirError.
    """
    limits = LimitSettings()
    if words == EMBEDDED:
        settings = ModelSettings(engine=EMBEDDED, profile="small")
        require_engine(settings, embedder=False)
        return Target(model or embedded_name(settings, embedder=False), settings, limits)
    if "://" in words:
        if not is_address(words):
            raise ConfigError("TARGET", f"{shown_address(words)!r} is not an http(s) address.", ADDRESS_FIX)
        if not model:
            raise ConfigError("--model", "the endpoint's model has no name.", "Name it: `--model NAME`.")
        settings = ModelSettings(engine="openai", model=model, base_urls=(words,), api_key_env=api_key_env)
        return Target(model, settings, limits)
    if not Path(words).is_dir():
        what = f"{words} is no directory, no address, and not `{EMBEDDED}`."
        raise ConfigError(
            "TARGET", what, "Name a run's directory, or an address such as http://host:8000/v1."
        )
    if model:
        what = f"{words} is a run, whose model is known."
        fix = "For what was tuned on it name `--adapter NAME`, or leave --model and --against-model out."
        raise ConfigError("--model", what, fix)
    run = load_run(Path(words))
    base = _base_model(run)
    name = embedded_name(base, False) if base.engine == EMBEDDED else base.model or base.engine
    return Target(name, base, run.settings.limits, trained_on(run))


def trained_on(run: Run) -> frozenset[str]:
    """The run's questions but for those held out: what a model that is tuned on it has seen."""
    planned = frozenset(seed.id for seed in run.plan.seeds)
    return planned - held_out_questions(planned, run.settings.plan.seed, run.settings.training.held_out)


def adapter_target(directory: Path, name: str) -> Target:
    """An adapter of a run, by a culture's id, `joint` or the beginning of its key; or OWN.

    Raises TrainingError if there is none, RunDirError.
    """
    run = load_run(directory)
    base = _base_model(run)
    if name == OWN:
        planned = run.plan.planned()
        adapters = {one: adapter for one, adapter in adapters_of(run.root).items() if one in planned}
        if not adapters:
            adapter_named(run.root, next(iter(planned)))  # says what there is instead
    else:
        adapters = {"": adapter_named(run.root, name)}
    seen: set[str] = set()
    for adapter in adapters.values():
        seen |= {seed.id for seed in run.plan.seeds} - set(read_dataset(adapter.dataset).held_out)
    if (only := adapters.get("")) and only.folder is None:  # a service keeps it and serves it
        return Target(name, replace(base, model=only.model), run.settings.limits, frozenset(seen))
    return Target(name, base, run.settings.limits, frozenset(seen), adapters)


def _base_model(run: Run) -> ModelSettings:
    return run.settings.models[run.settings.training.model or run.settings.roles.speaker]


@asynccontextmanager
async def target_models(targets: Sequence[Target]) -> AsyncGenerator[list[ChatModel]]:
    """The targets' models, ready to be asked until the block ends, in order."""
    async with AsyncExitStack() as stack:
        models: list[ChatModel] = []
        for target in targets:
            if target.adapters:
                serving = served_adapters(tuple(target.adapters.values()), target.model, target.limits)
                chats = await stack.enter_async_context(serving)
                models.append(
                    _CultureRouter({culture: chats[one.name] for culture, one in target.adapters.items()})
                )
                continue
            ready = await stack.enter_async_context(served(target.model))
            chat = open_chat(ready, target.limits)
            stack.push_async_callback(chat.close)
            models.append(chat)
        yield models


class _CultureRouter:
    """Sends each call to the model of the culture that its affinity begins with. Implements
    ports.ChatModel."""

    def __init__(self, chats: Mapping[str, ChatModel]) -> None:
        self._chats = chats

    async def complete(
        self, prompt: Prompt, sampling: Sampling, *, affinity: str, schema: dict[str, Any] | None = None
    ) -> Completion:
        """Answer `prompt`; see ports.ChatModel."""
        chat = self._chats.get("") or self._chats[culture_of(affinity)]
        return await chat.complete(prompt, sampling, affinity=affinity, schema=schema)

    async def close(self) -> None:
        """Nothing to close: the server of the adapters closes them."""
