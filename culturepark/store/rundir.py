"""The run directory: what lies where, and whether a directory holds this run.

run.json          settings, fingerprint, versions, models; its presence means the plan is fixed
seeds.jsonl       the questions, as they were used
cultures.json     the cultures, as they were used
log/              the write-ahead log: outcomes that are not in shards yet, dialogues under way
manifest/         commits of shards: readers trust nothing else; the head, what the next writer has to find
lock  epochs/     one writer at a time: its lock, and the epochs (fencing tokens) given so far
dialogues/ samples/ rejected/   Parquet shards
datasets/<culture>/             chat JSONL for fine-tuning
summary.json  README.md         counts that add up; the dataset card
status.json       what the running driver saw last: a view, read by `culturepark status` alone
logs/             structured logs
orphans/          what a crash left behind, set aside and never served (quarantine)
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec import Struct

from culturepark import __version__
from culturepark.cultures import Culture
from culturepark.errors import RunDirError
from culturepark.plan import Plan
from culturepark.prompts.profile import sampling_with
from culturepark.prompts.registry import profile_named
from culturepark.seeds import encode_seeds, read_seeds
from culturepark.settings import IDENTITY_TABLES, ROLES, Role, Settings
from culturepark.settings_load import decode_settings
from culturepark.store.files import REAL, Files, disk_errors, make_dirs, write_atomically
from culturepark.versions import PROMPT_VERSION

SHARD_DIRS = ("dialogues", "samples", "rejected")
"""The directories of Parquet shards, each named as the kind of rows in it."""

_OURS = {"seeds.jsonl", "cultures.json", "lock", "epochs", "logs", "orphans"}
"""What a directory may hold already when a run begins in it."""

_UNFINISHED = re.compile(
    r"(?:run\.json|cultures\.json|seeds\.jsonl)\.[0-9a-f]+\.part|\.seeds\.jsonl\.[0-9]+\.tmp"
)
"""Names of temporary files that a run killed in its first moments leaves behind."""


class RunFile(Struct, frozen=True):
    """What `run.json` holds."""

    run_id: str
    fingerprint: str
    code_version: str
    prompt_version: str
    planned: dict[str, int]
    unasked: list[tuple[str, str]]
    models: dict[str, str]
    settings: dict[str, Any]
    schema: int = 1


class RunFacts(Struct, frozen=True):
    """What is the same for every row of a run.

    `models` names the model of each role as provenance does, `sampling` is the JSON of how each was
    sampled. Without `train_on_novel`, novel opinions have no training row.
    """

    run_id: str
    models: dict[str, str]
    sampling: str
    train_on_novel: bool


class Run(Struct, frozen=True):
    """A run directory with what is needed to read or continue it."""

    root: Path
    file: RunFile
    settings: Settings
    plan: Plan

    @property
    def facts(self) -> RunFacts:
        """What is the same for every row."""
        resolved = {
            f"{role}: {use}" if use != role else role: sampling_with(
                profile_named(self.settings.model_of(role).profile).sampling(use), self.settings, role
            )
            for role, uses in _USES.items()
            for use in uses
        }
        sampling = msgspec.json.encode(resolved, order="deterministic").decode()
        refine = self.settings.refine
        return RunFacts(self.file.run_id, self.file.models, sampling, refine.train_on_novel)


# A speaker is sampled by kind of dialogue.
_USES: dict[Role, tuple[str, ...]] = {
    "speaker": ("speaker", "in-culture", "direct"),
    "extractor": ("extractor",),
    "verifier": ("verifier",),
    "rewriter": ("rewriter",),
}


def model_names(settings: Settings) -> dict[str, str]:
    """What provenance calls the model of each role."""
    from culturepark.models.local.engine import embedded_name
    from culturepark.refine.calibration import shipped_calibration

    names: dict[str, str] = {}
    for role in ROLES:
        if not settings.roles.of(role):
            continue
        model = settings.model_of(role)
        if model.engine == "embedded":
            names[role] = embedded_name(model, embedder=role == "embedder")
        else:
            names[role] = "scripted" if model.engine == "scripted" else model.model
    if settings.refine.enabled:
        if settings.model_of("extractor").profile == "small":
            names["extractor"] = "sentences, word for word"
        if settings.model_of("verifier").profile == "small":
            limits = shipped_calibration().thresholds
            names["verifier"] = f"hybrid ({limits.relevance}, {limits.margin}) on {names['embedder']}"
    return names


def open_run(root: Path, settings: Settings, plan: Plan, files: Files = REAL) -> Run:
    """Make `root` the directory of this run, or find that it is already.

    Raises RunDirError if it holds another run or other files; then nothing on disk has changed.
    """
    with disk_errors(root):
        present = set(os.listdir(root)) if root.is_dir() else set[str]()
        if root.exists() and not root.is_dir():
            raise RunDirError(str(root), "this is a file, not a directory.", "Name another directory.")
    if "run.json" in present:
        run = load_run(root)
        if not _by_this_version(run.file):
            what = f"it was made by version {run.file.code_version} with prompts {run.file.prompt_version}."
            raise RunDirError(str(root), what, "Resume it with that version, or use another --out.")
        if run.file.fingerprint != plan.fingerprint:
            what = f"it holds another run; {_difference(run, settings)}."
            raise RunDirError(str(root), what, "Use another --out, or the settings that it began with.")
        now = model_names(settings)
        if now != run.file.models:
            role = next(r for r in {*now, *run.file.models} if now.get(r) != run.file.models.get(r))
            what = f"its {role} was {run.file.models.get(role)}, and is now {now.get(role)}."
            raise RunDirError(str(root), what, "Resume it with the model that it began with.")
        return msgspec.structs.replace(run, settings=settings)
    foreign = sorted(name for name in present - _OURS if not _UNFINISHED.fullmatch(name))
    if foreign:
        what = f"it is not empty and holds no run (it holds {', '.join(foreign[:3])})."
        fix = "Name a new or empty directory."
        if present.issuperset({"log", "manifest"}):
            what = "its run.json is missing; the rest of a run is there."
            fix = "Put run.json back from a copy of the run, or name a new directory."
        raise RunDirError(str(root), what, fix)
    file = RunFile(
        run_id=f"r{plan.fingerprint[:16]}",
        fingerprint=plan.fingerprint,
        code_version=__version__,
        prompt_version=PROMPT_VERSION,
        planned=plan.planned(),
        unasked=plan.unasked,
        models=model_names(settings),
        settings=msgspec.to_builtins(settings),
    )
    seeds = encode_seeds(plan.seeds, str(root / "seeds.jsonl"))
    make_dirs(root, files)
    write_atomically(root / "seeds.jsonl", seeds, files)
    write_atomically(root / "cultures.json", msgspec.json.encode(plan.cultures), files)
    # Last and after the others are durable: a run.json means that the run directory is whole.
    write_atomically(root / "run.json", msgspec.json.format(msgspec.json.encode(file)), files)
    return Run(root, file, settings, plan)


def load_run(root: Path) -> Run:
    """Read a run directory without its configuration; also one of another version, which can be
    read but not resumed. Raises RunDirError."""
    path = root / "run.json"
    try:
        file = msgspec.json.decode(path.read_bytes(), type=RunFile)
        cultures = msgspec.json.decode((root / "cultures.json").read_bytes(), type=dict[str, Culture])
    except FileNotFoundError as error:
        what = f"{Path(str(error.filename)).name} is missing, so this is no run directory."
        raise RunDirError(
            str(root), what, "Name the directory that `culturepark generate --out` made."
        ) from None
    except OSError as error:
        raise RunDirError(str(path), f"it cannot be read: {error.strerror}.", "Check the disk.") from None
    except msgspec.MsgspecError as error:
        fix = "Put the file back from a copy; without it a run cannot be told from another."
        raise RunDirError(str(path), f"it is damaged: {error}.", fix) from None
    settings = decode_settings(file.settings, str(path))
    plan = Plan(settings, read_seeds(root / "seeds.jsonl"), cultures)
    if plan.fingerprint != file.fingerprint and _by_this_version(file):
        what = "its settings, seeds or cultures were changed after it began."
        raise RunDirError(str(path), what, "Put run.json, seeds.jsonl and cultures.json back as they were.")
    return Run(root, file, settings, plan)


def _by_this_version(file: RunFile) -> bool:
    return (file.code_version, file.prompt_version) == (__version__, PROMPT_VERSION)


def _difference(run: Run, settings: Settings) -> str:
    """The first settings in which this run differs from the one in the directory."""
    now = msgspec.to_builtins(settings)
    changed: list[str] = []
    for room in IDENTITY_TABLES:
        _compare(run.file.settings.get(room), now.get(room), room, changed)
    if not changed:
        return "its seeds or cultures differ"
    return f"these settings differ: {', '.join(changed[:3])}"


def _compare(old: Any, new: Any, path: str, changed: list[str]) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = cast(dict[str, Any], old), cast(dict[str, Any], new)
        for key in sorted({*before, *after}):
            _compare(before.get(key), after.get(key), f"{path}.{key}", changed)
    elif msgspec.json.encode(old) != msgspec.json.encode(new):
        changed.append(path)
