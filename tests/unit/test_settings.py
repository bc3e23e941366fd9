"""Bad input: one clear error each, which says where and what next, keeps secrets and harms no file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from culturepark.cultures import load_cultures
from culturepark.errors import ConfigError, CultureParkError, EndpointError, RunDirError, SeedError
from culturepark.models.local.weights import weights_of
from culturepark.models.replicas import base_urls_of
from culturepark.models.scripted import ScriptedChat
from culturepark.models.secrets import api_key_of
from culturepark.paths import config_dir
from culturepark.plan import Plan
from culturepark.seeds import builtin_seeds
from culturepark.seeds.load import load_seeds
from culturepark.settings import ModelSettings
from culturepark.settings_load import load_settings
from culturepark.store.lock import RunLock
from culturepark.store.rundir import load_run, open_run
from tests import builders

KEY = "sk-proj-4f9c2a7e11d0b6338855"
"""Looks like a key; must never be in an error."""

CONFIG = """
[models.chat]
engine = "scripted"
[models.vectors]
engine = "scripted"
[roles]
speaker = "chat"
embedder = "vectors"
[plan]
questions = ["wvs7-q28"]
cultures = ["arabic"]
"""


def prepare(path: Path, *overrides: str) -> Plan:
    """What `generate` does with a configuration before anything starts."""
    settings = load_settings(path, overrides)
    extra = [Path(folder) for folder in settings.plan.culture_files]
    return Plan(settings, load_seeds(settings.plan.seeds), load_cultures(extra=extra))


def config(tmp_path: Path, text: str = CONFIG) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


# Override (or overrides), then words that the error must have: where, and what or what next.
OVERRIDES: dict[str, tuple[str | list[str], list[str]]] = {
    "room misspelt": ("plann.seed=1", ["$.plann", "Did you mean `plan`"]),
    "key misspelt": ("plan.utterences=4", ["$.plan.utterences", "Did you mean `utterances`"]),
    "deep key misspelt": ("refine.faults.keep_longst=true", ["$.refine.faults.keep_longst", "keep_longest"]),
    "model key misspelt": ("models.chat.modell='x'", ["$.models.chat.modell", "`model`"]),
    "sampling role misspelt": ("sampling.speeker.top_p=0.5", ["$.sampling.speeker", "`speaker`"]),
    "sampling key misspelt": (
        "sampling.speaker.temprature=1",
        ["$.sampling.speaker.temprature", "`temperature`"],
    ),
    "text for a number": (
        "plan.dialogues_per_question='many'",
        ["dialogues_per_question", "whole number", "'many'"],
    ),
    "text for a list": ("plan.cultures=arabic", ["$.plan.cultures", "a list"]),
    "number for a table": ("refine.faults=3", ["$.refine.faults", "a table"]),
    "list for a table": ("sampling=[]", ["$.sampling", "a table"]),
    "number for a model": ("models.chat=3", ["$.models.chat", "a table"]),
    "model without engine": ("models.new.model='x'", ["$.models.new", "`engine` is missing"]),
    "part of a dialogue": ("plan.dialogues_per_question=1.5", ["dialogues_per_question", "whole number"]),
    "no dialogues": ("plan.dialogues_per_question=0", ["dialogues_per_question", ">= 1"]),
    "temperature out of range": (
        "sampling.speaker.temperature=9",
        ["$.sampling.speaker.temperature", "<= 5"],
    ),
    "temperature not a number": ("sampling.speaker.temperature=nan", ["$.sampling.speaker.temperature"]),
    "deadline of nothing": ("limits.deadline_s=0", ["$.limits.deadline_s", "> 0"]),
    "endless deadline": ("limits.deadline_s=inf", ["$.limits.deadline_s"]),
    "seed beyond 64 bits": ("plan.seed=99999999999999999999999", ["$.plan.seed"]),
    "unknown kind": ("plan.kinds=['crosss']", ["$.plan.kinds[0]", "cross, in-culture, direct"]),
    "unknown engine": ("models.chat.engine='gpt'", ["$.models.chat.engine", "openai, embedded, scripted"]),
    "unknown stance": ("plan.stance='mean'", ["$.plan.stance", "distribution, mode, paper"]),
    "unknown model in a role": ("roles.verifier='judge'", ["$.roles.verifier", "'judge'", "chat, vectors"]),
    "nobody speaks": ("roles.speaker=''", ["$.roles.speaker", "[models]"]),
    "no embedder": ("roles.embedder=''", ["$.roles.embedder", "refine.enabled"]),
    "model name with capitals": ("models.Chat.engine='scripted'", ["$.models.Chat", "lower-case"]),
    "endpoint without a model": (
        "models.chat.engine='openai'",
        ["$.models.chat.model", "--set models.chat.model"],
    ),
    "unknown culture": ("plan.cultures=['arabik']", ["$.plan.cultures", 'Did you mean "arabic"']),
    "culture by its country": ("plan.cultures=['Jordan']", ["$.plan.cultures", 'Did you mean "arabic"']),
    "culture twice": ("plan.cultures=['arabic', 'arabic']", ["$.plan.cultures", "twice"]),
    "unknown contact": ("plan.contact='martian'", ["$.plan.contact", "Known cultures"]),
    "contact as delegate": ("plan.cultures=['english']", ["$.plan.cultures", "main contact"]),
    "unknown question": ("plan.questions=['wvs7-q999']", ["$.plan.questions", "wvs7-q999", "seeds list"]),
    "question twice": ("plan.questions=['wvs7-q28', 'wvs7-q28']", ["$.plan.questions", "twice"]),
    "no kinds": ("plan.kinds=[]", ["$.plan.kinds", "empty"]),
    "no styles": ("plan.styles=[]", ["$.plan.styles", "empty"]),
    "no pairings": ("plan.pairings=[]", ["$.plan.pairings", "empty"]),
    "no openers": ("plan.openers=[]", ["$.plan.openers", "empty"]),
    "no seeds": ("plan.seeds=[]", ["$.plan.seeds", "empty"]),
    "a part beyond the last": ("plan.shard='3/2'", ["$.plan.shard", "'3/2'", "no part"]),
    "no part": ("plan.shard='second'", ["$.plan.shard", "names no part", "2/4"]),
    "more parts than cells": ("plan.shard='1/999'", ["$.plan.shard", "fewer parts"]),
    "odd turns": ("plan.utterances=7", ["$.plan.utterances", "even number"]),
    "only unasked questions": (
        ["plan.cultures=['chinese']", "plan.questions=['wvs7-q125']"],
        ["$.plan.cultures", "chinese", "leave the culture out"],
    ),
    "native language, small prompts": (
        ["models.chat.profile='small'", "plan.language='native'"],
        ["$.plan.language", "english"],
    ),
    "address without http": (
        "models.chat.base_urls=['localhost:8000']",
        ["base_urls", "http://localhost:8000/v1"],
    ),
    "address with a bad port": ("models.chat.base_urls=['http://h:99999/v1']", ["base_urls", "h:99999"]),
    "path and hub": (
        ["models.chat.path='a.gguf'", "models.chat.hub='o/n:a.gguf'"],
        ["$.models.chat", "both"],
    ),
    "hub of no file": ("models.chat.hub='owner/name'", ["$.models.chat.hub", "owner/name:file.gguf"]),
    "header over two lines": ('models.chat.headers.x-team="a\\nb"', ["$.models.chat.headers", "x-team"]),
    "set without a value": ("plan.seed", ["--set", "key=value"]),
    "set without a key": ("=3", ["--set", "key=value"]),
    "set below a value": ("plan.cultures.deeper=3", ["--set plan.cultures.deeper", "`cultures` is a value"]),
    "no seed file": ("plan.seeds=['none.jsonl']", ["none.jsonl", "Check the path"]),
    "no folder of cultures": ("plan.culture_files=['nowhere']", ["nowhere", "Check the path"]),
    "path with NUL": ('plan.seeds=["a\\u0000b"]', ["path"]),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_bad_setting_gives_one_clear_error(name: str, tmp_path: Path) -> None:
    overrides, words = OVERRIDES[name]
    path = config(tmp_path)
    with pytest.raises(CultureParkError) as caught:
        prepare(path, *([overrides] if isinstance(overrides, str) else overrides))
    check(caught.value, words)
    assert caught.value.exit_code == 2


def check(error: CultureParkError, words: list[str]) -> None:
    assert error.where
    assert error.what
    assert error.fix, f"it does not say what to do next: {error}"
    for word in words:
        assert word in str(error), f"{word!r} is not in: {error}"
    assert KEY not in str(error)
    assert len(str(error)) < 1500
    assert "Traceback" not in str(error)


SECRETS = [
    f"models.chat.api_key_env='{KEY}'",
    "models.chat.api_key_env='gsk_4f9c2a7e11d0b6338855aa'",
    f"models.chat.api_key_env=['{KEY}']",
    f"models.chat.api_key='{KEY}'",
    f"models.chat.headers.Authorization='Bearer {KEY}'",
    f"models.chat.headers.x-goog-api-key='{KEY}'",
    f"models.chat.headers.x-team='{KEY}'",
    f"models.chat.headers='Bearer {KEY}'",
    f"models.chat.base_urls='http://user:{KEY}@host/v1'",
    f"models.chat.base_urls=['http://user:{KEY}@host/v1']",
    f"models.chat.base_urls=['http://host/v1?key={KEY}']",
    f"models.chat='{KEY}'",
    f"models.chat.profile='{KEY}'",
    KEY,
]


@pytest.mark.parametrize("override", SECRETS)
def test_a_key_in_the_wrong_place_is_refused_and_never_shown(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(config(tmp_path), [override])
    check(caught.value, [])
    assert "gsk_4f9" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[plan\nseed = 1", ["run.toml", "not TOML", "line 1"]),
        (b'[plan]\nseed = 1\nseed = 2\n[roles]\nspeaker = "x"', ["not TOML"]),
        (b"\xff\xfe[plan]", ["run.toml", "cannot be read"]),
        (b"", ["$.roles.speaker"]),
    ],
)
def test_a_file_that_is_no_configuration(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    check(caught.value, words)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path, word in ((tmp_path / "no.toml", "no such file"), (tmp_path, "folder")):
        with pytest.raises(ConfigError) as caught:
            load_settings(path)
        check(caught.value, [str(path), word])


def seed_row(**changes: Any) -> bytes:
    seed = msgspec.structs.replace(builtin_seeds()[0], id="own-1", **changes)
    return msgspec.json.encode(seed) + b"\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["own.jsonl", "no seed"]),
        (b"\n\n", ["own.jsonl", "no seed"]),
        (seed_row() + b"{broken\n", ["own.jsonl: line 2", "not a seed"]),
        (seed_row() + seed_row(), ["own.jsonl: line 2", "own-1"]),
        (seed_row(options=()), ["own.jsonl: line 1"]),
        (b"\xff\xfe\n", ["own.jsonl: line 1"]),
        (seed_row(answers={}), ["$.plan.cultures", "arabic"]),
    ],
)
def test_a_seed_file_at_fault(content: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(content)
    with pytest.raises((SeedError, ConfigError)) as caught:
        prepare(config(tmp_path), f"plan.seeds=['{tmp_path}/own.jsonl']", "plan.questions=[]")
    check(caught.value, words)


def test_the_same_seed_from_two_sources(tmp_path: Path) -> None:
    row = msgspec.json.encode(builtin_seeds()[0]) + b"\n"
    (tmp_path / "own.jsonl").write_bytes(row)
    with pytest.raises(SeedError) as caught:
        prepare(config(tmp_path), f"plan.seeds=['builtin', '{tmp_path}/own.jsonl']")
    check(caught.value, ["own.jsonl", builtin_seeds()[0].id])


# --- models on this machine, keys and addresses from the environment


@pytest.mark.parametrize("content", [None, b"not weights", b""])
def test_a_file_that_is_no_model(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        weights_of(ModelSettings(engine="embedded", path=str(path)))
    check(caught.value, ["model.gguf", "path"])


def test_a_model_that_was_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        weights_of(ModelSettings(engine="embedded", hub="owner/name:file.gguf"))
    check(caught.value, ["owner/name:file.gguf", "culturepark embedded fetch"])


def test_addresses_of_the_environment_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSettings(engine="openai", model="m")
    for url in ("localhost:8000", f"http://user:{KEY}@host/v1", f"https://host/v1?key={KEY}"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with pytest.raises(ConfigError) as caught:
            base_urls_of(model)
        check(caught.value, ["OPENAI_BASE_URL"])
    monkeypatch.setenv("OPENAI_BASE_URL", "http://host/v1/")
    assert base_urls_of(model) == ("http://host/v1",)
    assert base_urls_of(msgspec.structs.replace(model, base_urls=("http://a/", "http://b"))) == (
        "http://a",
        "http://b",
    )


def test_keys_come_from_a_variable_or_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSettings(engine="openai", model="m", api_key_env="THE_KEY")
    assert api_key_of(model) == ""
    file = tmp_path / "key"
    monkeypatch.setenv("THE_KEY_FILE", str(file))
    with pytest.raises(ConfigError) as caught:
        api_key_of(model)
    check(caught.value, ["THE_KEY_FILE", str(file)])
    file.write_text(KEY + "\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        api_key_of(model)
    check(caught.value, ["THE_KEY_FILE", "chmod 600"])
    file.chmod(0o600)
    assert api_key_of(model) == KEY
    for broken in (f"{KEY}\nsecond line", f"\u201c{KEY}\u201d"):
        monkeypatch.setenv("THE_KEY", broken)
        with pytest.raises(ConfigError) as caught:
            api_key_of(model)
        check(caught.value, ["THE_KEY"])


@pytest.mark.parametrize("rules", ["latency_ms=soon", "fail_every=x", "fail_kind=boredom"])
def test_rules_of_the_scripted_model(rules: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ScriptedChat(rules)
    check(caught.value, [])


# --- run directories


def tree(root: Path) -> dict[str, str]:
    """Every file below `root` with its content's hash."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
    }


def settings_of(**room: Any) -> Any:
    return builders.settings(
        plan={"cultures": ["arabic"], "questions": ["wvs7-q28"], "dialogues_per_question": 2} | room
    )


def made(root: Path) -> None:
    builders.run_in(root, settings_of())


def with_file(name: str, content: bytes) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        made(root)
        (root / name).write_bytes(content)

    return make


def without(name: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        made(root)
        (root / name).unlink()

    return make


def edited(root: Path) -> None:
    made(root)
    raw = json.loads((root / "run.json").read_text())
    raw["settings"]["plan"]["seed"] = 99
    (root / "run.json").write_text(json.dumps(raw))


def foreign(root: Path) -> None:
    root.mkdir()
    (root / "thesis.tex").write_text("years of work")


def a_file(root: Path) -> None:
    root.write_text("a file")


DIRECTORIES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "another run": (lambda root: made_with(root, seed=2), ["another run", "plan.seed", "--out"]),
    "a changed plan": (
        lambda root: made_with(root, dialogues_per_question=3),
        ["plan.dialogues_per_question"],
    ),
    "somebody's files": (foreign, ["thesis.tex", "empty directory"]),
    "a file": (a_file, ["not a directory", "another directory"]),
    "a damaged run.json": (with_file("run.json", b"{half"), ["run.json", "damaged"]),
    "a run.json of something else": (with_file("run.json", b"[1, 2]"), ["run.json", "damaged"]),
    "run.json edited": (edited, ["run.json", "changed"]),
    "no cultures": (without("cultures.json"), ["cultures.json", "missing"]),
    "no seeds": (without("seeds.jsonl"), ["seeds.jsonl"]),
    "a broken seeds file": (with_file("seeds.jsonl", b"{half"), ["seeds.jsonl: line 1"]),
}


def made_with(root: Path, **room: Any) -> None:
    builders.run_in(root, settings_of(**room))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_cannot_take_this_run_is_left_as_it_was(name: str, tmp_path: Path) -> None:
    make, words = DIRECTORIES[name]
    root = tmp_path / "run"
    make(root)
    before = tree(tmp_path)
    with pytest.raises(CultureParkError) as caught:
        builders.run_in(root, settings_of())
    check(caught.value, [str(root), *words])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("where", ["file/run", "file/deep/run"])
def test_a_place_where_nothing_can_be_written(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    before = tree(tmp_path)
    with pytest.raises(RunDirError) as caught:
        builders.run_in(tmp_path / where, settings_of())
    check(caught.value, ["file"])
    assert tree(tmp_path) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that refuses even root")
def test_a_file_system_that_takes_nothing() -> None:
    with pytest.raises(RunDirError) as caught:
        builders.run_in(Path("/proc/culturepark"), settings_of())
    check(caught.value, ["/proc/culturepark"])


def test_a_directory_in_use_says_by_whom(tmp_path: Path) -> None:
    with RunLock.acquire(tmp_path), pytest.raises(RunDirError) as caught:
        RunLock.acquire(tmp_path)
    check(caught.value, [f"process {os.getpid()}"])


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(RunDirError) as caught:
        load_run(tmp_path / "nowhere")
    check(caught.value, ["nowhere", "run.json", "--out"])


def test_a_run_is_opened_again_with_other_limits_and_after_a_kill_in_its_first_moments(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    for left in ("seeds.jsonl", "cultures.json", "run.json.0a1b2c3d.part", ".seeds.jsonl.123.tmp"):
        (root / left).write_bytes(b"{half")
    first = builders.run_in(root, settings_of())
    other = builders.settings(
        plan={"cultures": ["arabic"], "questions": ["wvs7-q28"], "dialogues_per_question": 2},
        limits={"retries": 0},
    )
    again = open_run(root, other, builders.plan(other))
    assert again.file.run_id == first.file.run_id
    assert again.settings.limits.retries == 0
    loaded = load_run(root)
    assert loaded.plan.fingerprint == first.plan.fingerprint
    assert [loaded.plan.brief(n) for n in range(2)] == [first.plan.brief(n) for n in range(2)]


# --- what is good


def test_overrides_win_and_take_toml_or_words(tmp_path: Path) -> None:
    path = config(tmp_path)
    settings = load_settings(
        path, ["plan.seed=7", "plan.stance=mode", "limits.retries=0", "plan.kinds=['cross']"]
    )
    assert (settings.plan.seed, settings.plan.stance, settings.limits.retries) == (7, "mode", 0)
    assert settings.plan.kinds == ("cross",)


def test_paths_are_relative_to_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        "[models.chat]\nengine = 'embedded'\npath = 'm.gguf'\n[models.e]\nengine = 'embedded'\n"
        "[roles]\nspeaker = 'chat'\nembedder = 'e'\n"
        "[plan]\nseeds = ['builtin', 'own.jsonl']\nculture_files = ['cultures']\n",
        "utf-8",
    )
    settings = load_settings(path)
    assert settings.plan.seeds == ("builtin", str(tmp_path / "own.jsonl"))
    assert settings.plan.culture_files == (str(tmp_path / "cultures"),)
    assert settings.models["chat"].path == str(tmp_path / "m.gguf")


def test_paths_of_overrides_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path)
    (here := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(here)
    overrides = ["plan.seeds=['builtin', 'own.jsonl']", "models.chat={engine = 'embedded', path = 'm.gguf'}"]
    settings = load_settings(path, [*overrides, "plan.culture_files=['cultures']"])
    assert settings.plan.seeds == ("builtin", str(here / "own.jsonl"))
    assert settings.plan.culture_files == (str(here / "cultures"),)
    assert settings.models["chat"].path == str(here / "m.gguf")


def test_an_empty_role_follows_the_speaker(tmp_path: Path) -> None:
    settings = load_settings(config(tmp_path), ["models.judge.engine='scripted'", "roles.verifier='judge'"])
    assert [settings.roles.of(role) for role in ("extractor", "verifier", "rewriter")] == [
        "chat",
        "judge",
        "chat",
    ]


def test_every_shipped_configuration_loads() -> None:
    for path in sorted(config_dir().glob("*.toml")):
        models = tomllib.loads(path.read_text())["models"]
        # Some leave it to the user to name the model.
        unnamed = [n for n, m in models.items() if m["engine"] == "openai" and not m.get("model")]
        assert len(prepare(path, *(f"models.{name}.model=some" for name in unnamed))) > 0, path
        command = path.read_text().splitlines()[0]
        assert command.startswith("# "), path
        assert f"config/{path.name}" in command, f"{path} does not begin with its command"


def test_errors_cross_process_borders() -> None:
    for kind in (ConfigError, SeedError, EndpointError, RunDirError):
        error = pickle.loads(pickle.dumps(kind("here", "this", "do that")))
        assert (type(error), error.where, error.what, error.fix) == (kind, "here", "this", "do that")
