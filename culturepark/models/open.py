"""Models by their settings: the one that answers chat prompts and the one that embeds texts.

Modules that agents do not need are imported late, so that agents start soon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from culturepark.models.chat import HttpChatModel
from culturepark.models.endpoint import HttpEndpoint, OnRetry
from culturepark.settings import LimitSettings, ModelSettings

if TYPE_CHECKING:
    from culturepark.models.embeddings import HttpEmbedder
    from culturepark.models.scripted import ScriptedChat, ScriptedEmbedder


def open_chat(
    model: ModelSettings,
    limits: LimitSettings,
    on_retry: OnRetry | None = None,
    endpoint: HttpEndpoint | None = None,
) -> HttpChatModel | ScriptedChat:
    """A chat model by its settings. An embedded one must be served already, at `base_urls`.

    `endpoint` carries its calls; it is made here if it is not given.
    """
    if model.engine == "scripted":
        from culturepark.models.scripted import ScriptedChat

        return ScriptedChat(model.model)
    return HttpChatModel(model, limits, endpoint, on_retry)


def open_embedder(
    model: ModelSettings,
    limits: LimitSettings,
    on_retry: OnRetry | None = None,
    endpoint: HttpEndpoint | None = None,
) -> HttpEmbedder | ScriptedEmbedder:
    """An embedder by its settings, as `open_chat`."""
    if model.engine == "scripted":
        from culturepark.models.scripted import ScriptedEmbedder

        return ScriptedEmbedder()
    from culturepark.models.embeddings import HttpEmbedder

    return HttpEmbedder(model, limits, endpoint, on_retry)
