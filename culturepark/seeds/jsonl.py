"""Seeds as a JSONL file: one seed a line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from culturepark.errors import SeedError
from culturepark.seeds.check import check_seed, unreadable
from culturepark.seeds.model import Seed

_UTF8_BOM = b"\xef\xbb\xbf"


def read_seeds(path: str | os.PathLike[str]) -> tuple[Seed, ...]:
    """The seeds of a JSONL file, checked, in the file's order. Blank lines are passed over.

    Raises SeedError naming the file and line of the first fault: JSON that does not spell a Seed,
    a seed that `check_seed` refuses, an id used twice, or no seed at all.
    """
    decoder = msgspec.json.Decoder(Seed)
    lines: dict[str, int] = {}
    seeds: list[Seed] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(_UTF8_BOM) if number == 1 else line
                if not text.strip():
                    continue
                where = f"{path}: line {number}"
                try:
                    seed = decoder.decode(text)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise SeedError(
                        where,
                        f"this is not a seed: {error}",
                        "Each line is one JSON object with at least id, statement and options.",
                    ) from error
                check_seed(seed, where)
                if seed.id in lines:
                    raise SeedError(
                        where,
                        f"the id {seed.id} is already used on line {lines[seed.id]}.",
                        "Ids are unique within a run.",
                    )
                lines[seed.id] = number
                seeds.append(seed)
    except OSError as error:
        raise unreadable(path, error) from error
    if not seeds:
        raise SeedError(str(path), "it holds no seed.", "Write one JSON object a line.")
    return tuple(seeds)


def encode_seeds(seeds: Iterable[Seed], where: str) -> bytes:
    """The content of a JSONL file of these seeds; `where` names the file in errors.

    Raises SeedError if a seed does not hold, an id is used twice, or there is no seed.
    """
    encoder = msgspec.json.Encoder()
    lines: dict[str, bytes] = {}
    for seed in seeds:
        check_seed(seed, where)
        if seed.id in lines:
            raise SeedError(where, f"the id {seed.id} is used twice.", "Ids are unique within a file.")
        lines[seed.id] = encoder.encode(seed) + b"\n"
    if not lines:
        raise SeedError(where, "there is no seed to write.")
    return b"".join(lines.values())


def write_seeds(path: str | os.PathLike[str], seeds: Iterable[Seed]) -> None:
    """Write seeds as JSONL, whole or not at all: a crash leaves the old file as it was.

    Raises SeedError as `encode_seeds`, or if the file cannot be written.
    """
    target = Path(path)
    content = encode_seeds(seeds, str(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise SeedError(
            str(path), f"it cannot be written: {error.strerror}.", "Check the folder and the free space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    # The rename itself lasts only once the folder is on disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
