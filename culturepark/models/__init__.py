"""Models: who answers chat prompts and who embeds."""

from __future__ import annotations

from culturepark.models.chat import HttpChatModel
from culturepark.models.embeddings import HttpEmbedder
from culturepark.models.errors import ModelError
from culturepark.models.scripted import ScriptedChat, ScriptedEmbedder
from culturepark.settings import LimitSettings, ModelSettings

__all__ = ["ModelError", "open_chat", "open_embedder"]


def open_chat(model: ModelSettings, limits: LimitSettings) -> HttpChatModel | ScriptedChat:
    """A chat model by its settings. An embedded one must be served already, at `base_urls`."""
    return ScriptedChat(model.model) if model.engine == "scripted" else HttpChatModel(model, limits)


def open_embedder(model: ModelSettings, limits: LimitSettings) -> HttpEmbedder | ScriptedEmbedder:
    """An embedder by its settings. An embedded one must be served already, at `base_urls`."""
    return ScriptedEmbedder() if model.engine == "scripted" else HttpEmbedder(model, limits)
