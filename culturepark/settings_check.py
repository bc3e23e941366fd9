"""What must hold of settings beyond their types: one function for each table, nothing is called or opened."""

from __future__ import annotations

import os
import re

from culturepark.errors import ConfigError
from culturepark.settings import (
    ADDRESS_FIX,
    ROLES,
    ModelSettings,
    PlanSettings,
    Settings,
    is_address,
    part_of,
    shown_address,
)
from culturepark.words import did_you_mean

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_HUB_FILE = re.compile(r"[\w.-]+/[\w.-]+:[\w./-]+\.gguf")
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")
_SECRET_HEADER = re.compile(r"auth|cookie|credential|key|passw|secret|token", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bsk-|\bBearer\b")


def check_settings(settings: Settings, where: str) -> None:
    """Raise ConfigError at the first key that cannot serve; `where` names the settings' origin in it."""
    for name, model in settings.models.items():
        _check_model(name, model, f"{where}: $.models.{name}")
    _check_roles(settings, where)
    _check_embedder(settings, where)
    _check_sampling(settings, where)
    _check_budget(settings, where)
    _check_training(settings, where)
    _check_plan(settings.plan, where)
    if settings.plan.language == "native" and settings.model_of("speaker").profile == "small":
        what = "the small prompt profile speaks English only."
        fix = 'Set `plan.language = "english"`, or use a larger model with `profile = "full"`.'
        raise ConfigError(f"{where}: $.plan.language", what, fix)


def _check_model(name: str, model: ModelSettings, at: str) -> None:
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(at, "a model's name is lower-case letters, digits and hyphens.", "Rename it.")
    if model.engine == "openai" and not model.model:
        fix = f"Name it: `--set models.{name}.model=NAME`."
        raise ConfigError(f"{at}.model", "the endpoint's model has no name.", fix)
    for url in model.base_urls:
        if not is_address(url):
            what = f"{shown_address(url)!r} is not an http(s) address."
            raise ConfigError(f"{at}.base_urls", what, ADDRESS_FIX)
    if not _names_variable(model.api_key_env):
        what = "this is not the name of an environment variable (its value is not shown here)."
        fix = 'Put the key into a variable and name it: `api_key_env = "MY_KEY"`.'
        raise ConfigError(f"{at}.api_key_env", what, fix)
    for header, value in model.headers.items():
        if _SECRET_HEADER.search(header) or _SECRET_VALUE.search(value):
            what = f"`{header}` looks like a secret, and settings are saved with the results."
            raise ConfigError(f"{at}.headers", what, "Name a variable in `api_key_env` instead.")
        if not _HEADER_NAME.fullmatch(header) or not value.isprintable():
            what = f"{header!r} cannot be sent as a header."
            raise ConfigError(f"{at}.headers", what, "Use letters, digits and hyphens, and one line of text.")
    if model.path and model.hub:
        raise ConfigError(at, "both `path` and `hub` are set.", "Keep one of them.")
    if model.hub and not _HUB_FILE.fullmatch(model.hub):
        fix = "Write it like `owner/name:file.gguf`."
        raise ConfigError(f"{at}.hub", f"{model.hub!r} names no GGUF file on a hub.", fix)


def _names_variable(text: str) -> bool:
    """Whether this can be the name of an environment variable, and does not look like a key itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        return False
    looks_like_key = len(text) >= 20 and re.search(r"[a-z]", text) and re.search(r"[0-9]", text)
    return not looks_like_key or text in os.environ


def _check_roles(settings: Settings, where: str) -> None:
    if not settings.roles.speaker:
        raise ConfigError(f"{where}: $.roles.speaker", "no model speaks.", "Name one of [models].")
    if settings.refine.enabled and not settings.roles.embedder:
        fix = "Name one of [models], or set `refine.enabled = false`."
        raise ConfigError(f"{where}: $.roles.embedder", "refinement needs an embedder.", fix)
    for role in ROLES:
        name = settings.roles.of(role)
        if name and name not in settings.models:
            raise _no_model(name, settings, f"{where}: $.roles.{role}")


def _no_model(name: str, settings: Settings, at: str) -> ConfigError:
    fix = did_you_mean(name, settings.models) + f"Models here: {', '.join(sorted(settings.models))}."
    return ConfigError(at, f"there is no model {name!r}.", fix)


def _check_embedder(settings: Settings, where: str) -> None:
    embedder = settings.models.get(settings.roles.embedder)
    if embedder is None or embedder.engine != "embedded":
        return
    for key in ("path", "hub", "dimensions", "gpu_layers"):
        if getattr(embedder, key):
            what = "the embedder on this machine is the packaged one."
            at = f"{where}: $.models.{settings.roles.embedder}.{key}"
            raise ConfigError(at, what, 'Remove it, or serve another with `engine = "openai"`.')


def _check_sampling(settings: Settings, where: str) -> None:
    for role in ("extractor", "verifier"):
        if role in settings.sampling and settings.model_of(role).profile == "small":
            what = "the small prompt profile calls no model for this role."
            raise ConfigError(f"{where}: $.sampling.{role}", what, "Remove it.")


def _check_budget(settings: Settings, where: str) -> None:
    if not settings.budget.money:
        return
    for role in settings.roles_used:
        if not settings.prices_of(role).known:
            name = settings.roles.of(role)
            what = f"what {role} costs is unknown: the model {name!r} has no prices."
            fix = f"Give models.{name} a price_prompt and a price_completion, or a budget of tokens."
            raise ConfigError(f"{where}: $.budget.money", what, fix)


def _check_training(settings: Settings, where: str) -> None:
    training = settings.training
    if training.model and training.model not in settings.models:
        raise _no_model(training.model, settings, f"{where}: $.training.model")
    if not training.samples and not training.survey_rows:
        fix = "Set training.survey_rows, or leave training.samples as it is."
        raise ConfigError(f"{where}: $.training.samples", "without samples there is nothing to tune on.", fix)
    if training.backend == "command" and not training.command:
        fix = 'For example `command = ["my-trainer", "--data", "{dataset}", "--out", "{output}"]`.'
        raise ConfigError(f"{where}: $.training.command", "the backend `command` has no command.", fix)
    if training.backend == "ray-train" and training.batch % training.workers:
        what = f"{training.batch} rows cannot be shared out among {training.workers} workers."
        raise ConfigError(f"{where}: $.training.batch", what, f"Use a multiple of {training.workers}.")


def _check_plan(plan: PlanSettings, where: str) -> None:
    for key in ("kinds", "styles", "pairings", "openers", "seeds"):
        if not getattr(plan, key):
            raise ConfigError(f"{where}: $.plan.{key}", "the list is empty.", "Name at least one.")
    for key in ("cultures", "questions"):
        values: tuple[str, ...] = getattr(plan, key)
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError(f"{where}: $.plan.{key}", f"named twice: {', '.join(twice)}.", "Name it once.")
    try:
        part_of(plan.shard)
    except ValueError:
        fix = "For example `2/4`: the second of four parts."
        raise ConfigError(f"{where}: $.plan.shard", f"{plan.shard!r} names no part.", fix) from None
    if plan.utterances % 2:
        what = f"{plan.utterances} turns cannot be shared evenly by two speakers."
        raise ConfigError(f"{where}: $.plan.utterances", what, "Use an even number.")
