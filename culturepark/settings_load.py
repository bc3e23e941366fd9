"""Reading settings: a TOML file with `key=value` overrides becomes checked Settings.

An unknown key is refused with its path and its neighbours, a value of the wrong type with what is allowed.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import msgspec
from msgspec import Struct

from culturepark.errors import ConfigError
from culturepark.paths import config_dir
from culturepark.settings import ModelSettings, SamplingSettings, Settings
from culturepark.settings_check import check_settings
from culturepark.words import decoder_in_words, did_you_mean

T = TypeVar("T")


def load_settings(path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Read a TOML file (None: the quickstart), apply `key=value` overrides, and check the whole.

    Paths in the file are relative to its folder, those of overrides to the working directory.
    Raises ConfigError naming the key by its path, the value and what is allowed.
    """
    path = path if path is not None else config_dir() / "quickstart.toml"
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), "there is no such file.", _config_hint()) from None
    except IsADirectoryError:
        raise ConfigError(str(path), "this is a folder, not a configuration file.", _config_hint()) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"it cannot be read: {error}.", _config_hint()) from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), f"this is not TOML: {error}.", "Mend that line.") from None
    for override in overrides:
        _override(raw, override)
    settings = decode_settings(raw, str(path))
    return _anchor(settings, path.parent)


def with_overrides(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Settings with `key=value` overrides of the command line. Raises ConfigError."""
    raw = msgspec.to_builtins(settings)
    for override in overrides:
        _override(raw, override)
    return decode_settings(raw, "--set")


def decode_settings(raw: dict[str, Any], where: str) -> Settings:
    """Typed settings of plain data; `where` names its origin in errors."""
    _refuse_unknown(raw, Settings, where, "$")
    # The decoder does not say which entry of a table it means, so these are tried one by one.
    for table, kind in (("models", ModelSettings), ("sampling", SamplingSettings)):
        if isinstance(entries := raw.get(table), dict):
            for name, entry in cast(dict[str, Any], entries).items():
                _converted(entry, kind, where, f"$.{table}.{name}")
    settings = _converted(raw, Settings, where, "$")
    check_settings(settings, where)
    return settings


def _converted(raw: Any, kind: type[T], where: str, at: str) -> T:
    """Plain data as `kind`. Raises ConfigError naming the key below `at`."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        what, _, inner = str(error).partition(" - at ")
        path = inner.strip("`").removeprefix("$")
        value = _lookup(raw, path)
        # Values of [models] are not shown: one of them might be a key that got into the wrong place.
        if isinstance(value, bool | int | float | str) and not at.startswith("$.models"):
            what += f" (it is {value!r})"
        fix = _choices(kind, path) or "Mend the value and run again."
        raise ConfigError(f"{where}: {at}{path}", f"{decoder_in_words(what)}.", fix) from None


def _choices(kind: Any, path: str) -> str:
    """What may stand at a key that takes one of a few words; empty for other keys."""
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(kind, type) and issubclass(kind, Struct):
            kind = next((f.type for f in msgspec.structs.fields(kind) if f.name == part), None)
        elif get_origin(kind) is tuple:
            kind = get_args(kind)[0]
    return f"Choices: {', '.join(get_args(kind))}." if get_origin(kind) is Literal else ""


def _lookup(raw: Any, path: str) -> Any:
    for part in re.findall(r"[^.\[\]$]+", path):
        if isinstance(raw, dict):
            raw = cast(dict[str, Any], raw).get(part)
        elif isinstance(raw, list) and part.isdigit() and int(part) < len(cast(list[Any], raw)):
            raw = cast(list[Any], raw)[int(part)]
        else:
            return None
    return raw


def _refuse_unknown(raw: Any, kind: Any, where: str, at: str) -> None:
    """Name an unknown key with its neighbours, which the decoder does not do."""
    if not isinstance(raw, dict):
        return
    table = cast(dict[str, Any], raw)
    if isinstance(kind, type) and issubclass(kind, Struct):
        known = {f.name: f.type for f in msgspec.structs.fields(kind)}
        for key, value in table.items():
            if key not in known:
                fix = did_you_mean(key, known) + f"Keys here: {', '.join(sorted(known))}."
                raise ConfigError(f"{where}: {at}.{key}", "there is no such key.", fix)
            _refuse_unknown(value, known[key], where, f"{at}.{key}")
    elif get_origin(kind) is dict:
        keys, values = get_args(kind)
        for key, value in table.items():
            if get_origin(keys) is Literal and key not in get_args(keys):
                fix = did_you_mean(key, get_args(keys)) + f"Keys here: {', '.join(get_args(keys))}."
                raise ConfigError(f"{where}: {at}.{key}", "there is no such key.", fix)
            _refuse_unknown(value, values, where, f"{at}.{key}")


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply `a.b=value`; the value is TOML where it parses as TOML, text otherwise."""
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        shown = repr(override) if re.fullmatch(r"[a-z_.]{1,60}", override) else "what follows it"
        what = f"{shown} is not of the form key=value."
        raise ConfigError("--set", what, "For example `--set plan.dialogues_per_question=2`.")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    here = raw
    for part in parts[:-1]:
        nested: Any = here.setdefault(part, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"--set {key}", f"`{part}` is a value, not a table.", "Check the path.")
        here = cast(dict[str, Any], nested)
    here[parts[-1]] = _from_here(tuple(parts), parsed)


def _from_here(key: tuple[str, ...], value: Any) -> Any:
    """An override's value with its paths made absolute: they start at the working directory."""
    if isinstance(value, dict):
        return {k: _from_here((*key, k), v) for k, v in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_from_here(key, one) for one in cast(list[Any], value)]
    is_path = key in (("plan", "seeds"), ("plan", "culture_files"), ("training", "base")) or (
        len(key) == 3 and key[0] == "models" and key[2] == "path"
    )
    if not is_path or not isinstance(value, str) or (key, value) == (("plan", "seeds"), "builtin"):
        return value
    return _absolute(value, Path.cwd())


def _anchor(settings: Settings, folder: Path) -> Settings:
    """Paths in a configuration are relative to the file they stand in."""
    plan = msgspec.structs.replace(
        settings.plan,
        seeds=tuple(s if s == "builtin" else _absolute(s, folder) for s in settings.plan.seeds),
        culture_files=tuple(_absolute(c, folder) for c in settings.plan.culture_files),
    )
    models = {
        n: msgspec.structs.replace(m, path=_absolute(m.path, folder)) for n, m in settings.models.items()
    }
    training = msgspec.structs.replace(settings.training, base=_absolute(settings.training.base, folder))
    return msgspec.structs.replace(settings, plan=plan, models=models, training=training)


def _absolute(path: str, folder: Path) -> str:
    try:
        return path and str((folder / os.path.expanduser(path)).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(repr(path), f"this cannot be a path: {error}.", "Mend it.") from None


def _config_hint() -> str:
    return "Leave the file out for the quickstart, or copy one of those in `config/`."
