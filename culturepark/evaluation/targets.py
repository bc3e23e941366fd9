"""Who is evaluated: the model of a run, one behind an endpoint, or the one on this machine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from msgspec import Struct

from culturepark.errors import ConfigError
from culturepark.models import open_chat
from culturepark.models.embedded import WEIGHTS_NAME, embedded_name
from culturepark.models.serving import served
from culturepark.ports import ChatModel
from culturepark.settings import ADDRESS_FIX, LimitSettings, ModelSettings, is_address, shown_address
from culturepark.store.rundir import load_run

EMBEDDED = "embedded"


class Target(Struct, frozen=True):
    """A model under test. `trained_on` are ids of questions it may have learned answers to."""

    name: str
    model: ModelSettings
    limits: LimitSettings
    trained_on: frozenset[str] = frozenset()


def target_of(words: str, model: str = "", api_key_env: str = "OPENAI_API_KEY") -> Target:
    """The target that a command line names: `embedded`, an address, or the directory of a run.

    Of a run it is the model that speaks in it, and its questions count as trained on: what is tuned on
    the run is compared with this model on the questions that neither has seen. Raises ConfigError or
    RunDirError.
    """
    limits = LimitSettings()
    if words == EMBEDDED:
        return Target(model or WEIGHTS_NAME, ModelSettings(engine="embedded", profile="small"), limits)
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
    run = load_run(Path(words))
    speaker = run.settings.model_of("speaker")
    name = embedded_name(speaker, False) if speaker.engine == EMBEDDED else speaker.model or speaker.engine
    seen = frozenset(seed.id for seed in run.plan.seeds)
    return Target(name, speaker, run.settings.limits, seen)


@asynccontextmanager
async def target_models(targets: Sequence[Target]) -> AsyncGenerator[list[ChatModel]]:
    """The targets' models, ready to be asked until the block ends, in order."""
    async with AsyncExitStack() as stack:
        models: list[ChatModel] = []
        for target in targets:
            ready = await stack.enter_async_context(served(target.model))
            chat = open_chat(ready, target.limits)
            stack.push_async_callback(chat.close)
            models.append(chat)
        yield models
