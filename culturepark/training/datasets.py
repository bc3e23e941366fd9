"""Sealed training sets: the samples of a run's shards, split by question, under a hash of their content
(content addressing).

training/datasets/<name>-<hash>/
  train.jsonl  held-out.jsonl                         chat messages
  train-completion.jsonl  held-out-completion.jsonl   the same as prompt and completion
  rows.jsonl         where each line comes from: split, sample (empty: a survey), culture, question
  README.md          the data card
  axolotl.yaml  dataset_info.json  llama-factory.yaml
  dataset.json       the facts; written last, so its presence means that the rest is complete
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import secrets
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from culturepark.errors import RunDirError, TrainingError
from culturepark.prompts.training_rows import survey_messages
from culturepark.settings import TrainingSettings
from culturepark.store.files import REAL, disk_errors, make_dirs, write_atomically
from culturepark.store.manifest import Manifest
from culturepark.store.paths import safe_name
from culturepark.store.publish import chat_line, prompt_completion_line, training_samples
from culturepark.store.rundir import Run
from culturepark.training.exports import exports
from culturepark.training.split import held_out_questions

JOINT = "joint"
"""The name of the dataset, and of the adapter, of all cultures together."""

TRAIN, HELD_OUT = "train", "held-out"
_AGAIN = "Run `culturepark finetune` on the run again: it makes the dataset anew."


class Dataset(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The facts in `dataset.json`.

    `hash` is the sha256 of the chat lines, training rows before held-out ones. `counts` are rows by split
    and culture, `held_out` the ids of all questions of the run that are held out, whether or not there are
    rows about them; `survey_rows` how many of the training rows are people's answers.
    """

    name: str
    run_id: str
    hash: str
    seed: int
    held_out_share: float
    cultures: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    held_out: tuple[str, ...]
    files: dict[str, str]
    survey_rows: int = 0
    schema: int = 1

    @property
    def n_train(self) -> int:
        """Training rows."""
        return sum(self.counts[TRAIN].values())

    @property
    def n_held_out(self) -> int:
        """Rows on held-out questions."""
        return sum(self.counts[HELD_OUT].values())


class Line(Struct, frozen=True):
    """One training row with its origin (provenance). `sample` is empty for a row from the survey."""

    order: tuple[int, int, int, int]
    sample: str
    culture: str
    question: str
    messages: list[dict[str, str]]


def seal(
    run: Run, name: str, training: TrainingSettings, cultures: Sequence[str] = ()
) -> tuple[Path, Dataset]:
    """The dataset of one culture (its id), or of `cultures` together (JOINT; empty: all), written unless it
    is there.

    It holds the samples of the shards that are sealed now; the same samples give the same folder
    (idempotent). Returns its folder and facts. Raises TrainingError if there is no training row, RunDirError
    about the disk.
    """
    members = tuple(cultures) or tuple(sorted(run.plan.planned())) if name == JOINT else (name,)
    held = held_out_questions((seed.id for seed in run.plan.seeds), run.settings.plan.seed, training.held_out)
    lines = sorted(_lines(run, members), key=lambda line: (line.order, line.sample))
    split = {
        TRAIN: [line for line in lines if line.question not in held],
        HELD_OUT: [line for line in lines if line.question in held],
    }
    if training.samples and not split[TRAIN]:
        raise _empty(run, name, len(split[HELD_OUT]))
    surveyed = list(_survey_lines(run, members, held, training.survey_rows))
    split[TRAIN] = [*(split[TRAIN] if training.samples else ()), *surveyed]
    if not split[TRAIN]:
        what = "it is empty: its people were asked none of the questions that are trained on."
        raise TrainingError(f"dataset of {name}", what, "Leave it out, or set `training.samples`.")
    chats = {part: b"".join(chat_line(one.messages) for one in of) for part, of in split.items()}
    digest = hashlib.sha256(chats[TRAIN] + b"\n" + chats[HELD_OUT]).hexdigest()
    folder = run.root.resolve() / "training" / "datasets" / f"{safe_name(name)}-{digest[:12]}"
    files: dict[str, bytes] = {f"{part}.jsonl": data for part, data in chats.items()}
    for part, of in split.items():
        files[f"{part}-completion.jsonl"] = b"".join(prompt_completion_line(one.messages) for one in of)
    files["rows.jsonl"] = b"".join(_origins(split))
    facts = Dataset(
        name=name,
        run_id=run.file.run_id,
        hash=digest,
        seed=run.settings.plan.seed,
        held_out_share=training.held_out,
        cultures=members,
        counts={part: dict(sorted(Counter(o.culture for o in of).items())) for part, of in split.items()},
        held_out=tuple(sorted(held)),
        files={file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        survey_rows=len(surveyed),
    )
    texts = {"README.md": card(run, facts), **exports(name, folder, training, facts.n_held_out > 0)}
    if _is_whole(folder, facts):
        for file, text in texts.items():  # they name settings that may have changed since
            if not (path := folder / file).is_file() or path.read_text("utf-8") != text:
                write_atomically(path, text.encode())
    else:
        _write(folder, files | {file: text.encode() for file, text in texts.items()}, facts)
    return folder, facts


def verify(folder: Path) -> Dataset:
    """The facts of a sealed dataset whose files are what they were. Raises RunDirError."""
    facts = read_dataset(folder)
    for file, digest in facts.files.items():
        try:
            with (folder / file).open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise RunDirError(str(folder / file), f"it cannot be read: {error.strerror}.", _AGAIN) from None
        if found != digest:
            raise RunDirError(str(folder / file), "it was changed after it was sealed.", _AGAIN)
    return facts


def read_dataset(folder: Path) -> Dataset:
    """The facts of a sealed dataset. Raises RunDirError if there is none, or a damaged one."""
    path = folder / "dataset.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Dataset)
    except (OSError, msgspec.MsgspecError) as error:
        raise RunDirError(str(path), f"it cannot be read: {error}.", _AGAIN) from None


def _is_whole(folder: Path, facts: Dataset) -> bool:
    try:
        return verify(folder) == facts
    except RunDirError:
        return False


def _lines(run: Run, cultures: Iterable[str]) -> Iterable[Line]:
    manifest = Manifest.read(run.root / "manifest")
    columns = ("id", "seed_id", "number", "turn", "start")
    for at, culture in enumerate(cultures):
        for row in training_samples(run.root, manifest, culture, columns):
            # By place in the plan, since the order of commits varies from run to run.
            order = (at, int(row["number"]), int(row["turn"]), int(row["start"]))
            yield Line(order, row["id"], culture, row["seed_id"], row["messages"])


def _survey_lines(run: Run, cultures: Sequence[str], held: Collection[str], count: int) -> Iterable[Line]:
    """`count` answers for each culture and question that is not held out, in proportion to people's."""
    seeds = [seed for seed in run.plan.seeds if seed.id not in held]
    for at, (culture, seed) in enumerate(itertools.product(cultures, seeds)):
        about = run.plan.cultures[culture]
        shares = seed.people(about.survey_keys)
        if shares is None or not count:
            continue
        rng = random.Random(f"survey:{run.settings.plan.seed}:{culture}:{seed.id}")
        places = range(len(shares))
        parts = apportion(shares, count)
        for number, chosen in enumerate(place for place in places for _ in range(parts[place])):
            messages = survey_messages(seed, rng.sample(places, len(places)), chosen, about.demonym)
            yield Line((at, number, 0, 0), "", culture, seed.id, messages)


def apportion(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers that sum to `count`, in proportion to `shares` (largest remainder method)."""
    exact = [share / sum(shares) * count for share in shares]
    whole = [int(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: (whole[place] - exact[place], place))
    for place in by_remainder[: count - sum(whole)]:
        whole[place] += 1
    return whole


def _origins(split: dict[str, list[Line]]) -> Iterable[bytes]:
    for part, lines in split.items():
        for one in lines:
            about = {
                "split": part,
                "sample": one.sample,
                "culture": one.culture,
                "question": one.question,
            }
            yield msgspec.json.encode(about) + b"\n"


def _empty(run: Run, name: str, held_out: int) -> TrainingError:
    where = f"dataset of {name}"
    if held_out:
        what = f"all {held_out} rows are about held-out questions, so none is left to train on."
        return TrainingError(where, what, "Generate on more questions, or lower `training.held_out`.")
    if not run.settings.refine.enabled:
        fix = "Generate with `refine.enabled = true`: without refinement there are no samples."
        return TrainingError(where, "it is empty: this run refines nothing.", fix)
    what = "it is empty: no sample with a training row is sealed yet."
    fix = f"Let the run go on, or see why opinions were dropped: `culturepark show {run.root}`."
    return TrainingError(where, what, fix)


def _write(folder: Path, files: dict[str, bytes], facts: Dataset) -> None:
    """Write all files to a temporary folder and rename that when they are durable (atomic publication)."""
    make_dirs(folder.parent)
    part = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.part")
    make_dirs(part)
    try:
        for file, data in files.items():
            write_atomically(part / file, data)
        write_atomically(part / "dataset.json", msgspec.json.format(msgspec.json.encode(facts)))
        with disk_errors(folder):
            if folder.exists():  # damaged, or with another split: it is replaced
                shutil.rmtree(folder)
            os.rename(part, folder)
            REAL.fsync_dir(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def card(run: Run, facts: Dataset) -> str:
    """The data card: content, split and limits of the dataset."""
    by_culture: list[str] = []
    for culture in facts.cultures:
        train, held = (facts.counts[part].get(culture, 0) for part in (TRAIN, HELD_OUT))
        by_culture.append(f"| {culture} | {train} | {held} |")
    table = "\n".join(by_culture)
    seeds: dict[str, Any] = {seed.id: seed for seed in run.plan.seeds}
    held_out = "\n".join(f"- `{one}`: {' '.join(seeds[one].statement.split())}" for one in facts.held_out)
    surveyed = (
        f"\n{facts.survey_rows} of the training rows, those without a sample, are answers of people in the "
        "survey: the question, its options in some order, and an answer, as many of each as in the survey.\n"
        if facts.survey_rows
        else ""
    )
    models = "\n".join(f"- {role}: {name}" for role, name in sorted(run.file.models.items()))
    surveyed_only = facts.survey_rows == facts.n_train
    made = (
        "from answers of people in a survey. None came\nof a dialogue but for the held-out rows."
        if surveyed_only
        else "from dialogues between language-model agents (after\nCulturePark, arXiv 2405.15145)."
    )
    beware = (
        "The rows are shares of answers, taken apart: they show how often people of a country chose an "
        "option, and\nnothing of why."
        if surveyed_only
        else "Nobody said this. The rows show what a language model associates with a survey answer and a "
        "country, and a\nmodel that is tuned on them learns that, its mistakes and stereotypes with it."
    )
    return f"""# Training set {facts.name} of run {facts.run_id}

Chat rows made by culturepark {run.file.code_version} {made}

- sha256 of the rows: `{facts.hash}`
- Prompts: version {run.file.prompt_version}. Stances: {run.settings.plan.stance}.

| culture | training rows | held-out rows |
|---|---:|---:|
{table}

`train.jsonl` and `held-out.jsonl` hold chat messages, the files with `-completion` the same as prompt and
completion. `rows.jsonl` names split, sample, culture and question of each line: first those of training, then
the held-out ones, in order. With the sample's id, `culturepark show RUN --sample ID` tells its provenance.
{surveyed}

## Split

By question: no training row is about a held-out question. Questions are ordered by a hash of their id and the
run's seed ({facts.seed}); {facts.held_out_share:.0%} of the run's questions are held out, the same for all
cultures. Evaluate on these:

{held_out or "- none"}

## Models that wrote it

{models}

## Beware

{beware}
Whether a model that is tuned on them answers more like people do has to be measured, on questions that are
held out.
"""
