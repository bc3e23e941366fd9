"""Which backend a setting names."""

from __future__ import annotations

from culturepark.settings import Settings
from culturepark.training.ports import Backend
from culturepark.training.subprocess_backend import COMMAND, LOCAL, RAY_TRAIN, SubprocessBackend


def open_backend(settings: Settings) -> Backend:
    """The backend that `training.backend` names. Raises EndpointError if a service has no key."""
    match settings.training.backend:
        case "local":
            return SubprocessBackend(LOCAL)
        case "command":
            return SubprocessBackend(COMMAND)
        case "openai":
            from culturepark.training.openai_jobs import OpenAIBackend

            return OpenAIBackend(settings.models[settings.training.model or settings.roles.speaker])
        case "ray-train":
            return SubprocessBackend(RAY_TRAIN)
