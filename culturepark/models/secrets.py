"""API keys: where a key is read from, and how it is kept out of all that is shown, logged or stored."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from culturepark.errors import ConfigError
from culturepark.settings import ModelSettings
from culturepark.text import tidy

_SHOWN_CHARS = 240
"""At most this many characters of an endpoint's words go into an error message."""
_SECRET_CHARS = 16
"""A shorter key is a placeholder such as `none`, for a server that wants any: a model may well
say that word."""


def api_key_of(model: ModelSettings) -> str:
    """The key in the named variable, or in the file that `<NAME>_FILE` names; empty if neither is
    set. Raises ConfigError if the file can be read by others, or not at all, or if what it holds
    cannot be a key."""
    name = model.api_key_env
    if key := os.environ.get(name, "").strip():
        return _checked_key(key, name)
    if not (file := os.environ.get(f"{name}_FILE", "")):
        return ""
    try:
        if stat.S_IMODE(Path(file).stat().st_mode) & 0o077:
            raise ConfigError(f"{name}_FILE", f"others may read {file}.", f"Run `chmod 600 {file}`.")
        return _checked_key(Path(file).read_text("utf-8").strip(), f"{name}_FILE")
    except OSError as error:
        raise ConfigError(
            f"{name}_FILE", f"{file} cannot be read: {error.strerror}.", "Check the path."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name}_FILE", f"{file} holds no text.", "Put the key alone into it.") from None


def without_key(text: str, key: str) -> str:
    """An endpoint's words without the key, also where invisible characters stand between its letters."""
    if len(key) < _SECRET_CHARS:
        return text
    text = text.replace(key, "[key]")
    return clean.replace(key, "[key]") if key in (clean := tidy(text)) else text


def safe_words(text: str, key: str, most: int = _SHOWN_CHARS) -> str:
    """A service's words as they may be shown, logged and recorded: at most `most` characters, printable,
    without the key (redaction)."""
    text = tidy(text).replace("\n", " ")
    if key:
        text = text.replace(key, "[key]")
    # Cut last: a key that lies across the cut would be left in part.
    return re.sub(r"\b(sk|Bearer)[-_ ][\w.-]{8,}", r"\1-[key]", text)[:most]


def _checked_key(key: str, where: str) -> str:
    # It goes into a header, where a line break or a curly quote cannot stand.
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        what = "what it holds cannot be a key (it is not shown here)."
        raise ConfigError(where, what, "Put the key alone there: no quotes, spaces or line breaks.")
    return key
