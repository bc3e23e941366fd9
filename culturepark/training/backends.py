"""Which backend a setting names."""

from __future__ import annotations

from collections.abc import Mapping

from culturepark.errors import ConfigError
from culturepark.settings import Settings
from culturepark.training.child import COMMAND, LOCAL, ChildBackend
from culturepark.training.ports import Backend


def open_backend(settings: Settings, others: Mapping[str, Backend] | None = None) -> Backend:
    """The backend that `training.backend` names; `others` are those of outer layers (`ray-train`).

    Raises ConfigError if it cannot be had here, EndpointError if a service has no key.
    """
    name = settings.training.backend
    if others and name in others:
        return others[name]
    match name:
        case "local":
            return ChildBackend(LOCAL)
        case "command":
            return ChildBackend(COMMAND)
        case "openai":
            from culturepark.training.openai_jobs import OpenAIBackend

            return OpenAIBackend(settings.models[settings.training.model or settings.roles.speaker])
        case "ray-train":
            what = "training over Ray needs Ray, which was not found here."
            raise ConfigError("training.backend", what, "Install culturepark with Ray, or use `local`.")
