"""What a run leaves for its users beside the shards: chat files, the dataset card, the summary.

All of it follows from the manifest and can be made again at any time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from culturepark.store import funnel as funnels
from culturepark.store.files import REAL, Files, make_dirs, write_atomically
from culturepark.store.funnel import Funnel
from culturepark.store.manifest import Manifest
from culturepark.store.paths import inside, safe_name
from culturepark.store.readers import rows
from culturepark.store.rundir import SHARD_DIRS, Run
from culturepark.text import tidy


def publish(run: Run, counts: Mapping[str, Funnel], files: Files = REAL) -> dict[str, Any]:
    """Write datasets, card and summary durably, in this order; returns the summary. Raises RunDirError."""
    manifest = Manifest.read(run.root / "manifest")
    for culture in run.plan.planned():
        for name, lines in (("chat", _chat), ("prompt-completion", _prompt_completion)):
            path = inside(run.root, f"datasets/{safe_name(culture)}/{name}.jsonl")
            make_dirs(path.parent, files)
            write_atomically(path, lines(run.root, manifest, culture), files)
    summary = summarise(run, counts, manifest)
    write_atomically(run.root / "README.md", card(run, summary).encode(), files)
    # Last: a run that has a summary is published.
    write_atomically(run.root / "summary.json", msgspec.json.format(msgspec.json.encode(summary)), files)
    return summary


def summarise(run: Run, counts: Mapping[str, Funnel], manifest: Manifest) -> dict[str, Any]:
    """Counts by culture and in all, usage by role, and the shards. Sums that do not hold are in
    `problems`."""
    planned = run.plan.planned()
    total: Funnel = Counter()
    for funnel in counts.values():
        funnels.add(total, funnel)
    whole = sum(planned.values()) == total["finished"] + total["failed"]
    found = [
        f"{culture}: {problem}"
        for culture, funnel in counts.items()
        for problem in funnels.problems(funnel, planned[culture], whole)
    ]
    return {
        "run_id": run.file.run_id,
        "complete": whole,
        "total": funnels.view(total, sum(planned.values())),
        "cultures": {c: funnels.view(f, planned[c]) for c, f in sorted(counts.items())},
        "unasked": [{"culture": culture, "seed_id": seed} for culture, seed in run.plan.unasked],
        "usage": funnels.usage_view(total, run.settings),
        "models": run.file.models,
        "shards": {kind: [shard.path for shard in manifest.shards(kind)] for kind in SHARD_DIRS},
        "problems": found,
    }


def card(run: Run, summary: Mapping[str, Any]) -> str:
    """The dataset card: what this is, how it was made, what it holds, and what to beware of."""
    plan, settings = run.plan, run.settings
    # A kind without shards is left out: a pattern that matches nothing makes the whole unreadable.
    configs = "\n".join(
        f"- config_name: {kind}\n  data_files: {kind}/*.parquet"
        + ("\n  default: true" if kind == "samples" else "")
        for kind in ("samples", "rejected", "dialogues")
        if summary["shards"][kind]
    )
    table = "\n".join(
        f"| {name} | {c['finished']} | {c['failed']} | {c['extracted']} | {c['kept']} | {c['rejected']} |"
        for name, c in summary["cultures"].items()
    )
    models = "\n".join(f"- {role}: {_plain(name)}" for role, name in summary["models"].items())
    surveys = ", ".join(sorted({_plain(f"{s.survey} {s.wave}") or "own questions" for s in plan.seeds}))
    languages = (
        sorted({c.language for c in plan.delegates}) if settings.plan.language == "native" else ["English"]
    )
    return f"""---
pretty_name: culturepark run {run.file.run_id}
tags:
- synthetic
- culture
- culturepark
configs:
{configs}
---

# culturepark run {run.file.run_id}

Synthetic opinions from dialogues between language-model agents of different cultures, made with
culturepark {run.file.code_version} (after CulturePark, arXiv 2405.15145). Every row carries its survey
question, the share of people who answered so, the persona, the models, the verdicts and the rewrite.

- Questions: {len(plan.seeds)} from {surveys}. Stances: {settings.plan.stance}.
- Languages of the text: {", ".join(languages)}.
- Run complete: {"yes" if summary["complete"] else "no, it can be resumed"}.

## Models

{models}

## Contents

| culture | finished | failed | opinions | kept | rejected |
|---|---:|---:|---:|---:|---:|
{table}

`samples/` holds what was kept, `rejected/` what was not and why, `dialogues/` the transcripts.
`datasets/<culture>/chat.jsonl` holds the kept samples as chat messages for fine-tuning, and
`prompt-completion.jsonl` the same in two fields. Read `samples/` with
`datasets.load_dataset("parquet", data_files="samples/*.parquet")`.

## Beware

The people in these dialogues do not exist, and what they say was made up by a language model that was told a
survey answer. It shows what such a model associates with that answer and country. It is no evidence of what
people there think: for that, read the survey. A small model's reasons wander and its facts are unreliable.
Verdicts `entails` and `novel` were given by the verifier named above, with its error rate.
"""


def _plain(name: str) -> str:
    """A name that is not ours, on one line of Markdown and escaped, so that it stays a name."""
    return re.sub(r"([\\`*<>\[\]|!])", r"\\\1", " ".join(tidy(name).split()))


def chat_line(messages: Sequence[Mapping[str, str]]) -> bytes:
    """One training row as a chat, a line of JSONL."""
    return msgspec.json.encode({"messages": messages}) + b"\n"


def prompt_completion_line(messages: Sequence[Mapping[str, str]]) -> bytes:
    """One training row as what is read and what is answered, a line of JSONL."""
    *before, last = messages
    prompt = "\n\n".join(message["content"] for message in before)
    return msgspec.json.encode({"prompt": prompt, "completion": last["content"]}) + b"\n"


def training_samples(
    root: Path, manifest: Manifest, culture: str, columns: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The sealed samples of a culture that have a training row: `messages` and the columns asked for."""
    return (
        row
        for row in rows(root, manifest, "samples", ("culture", "messages", *columns))
        if row["culture"] == culture and row["messages"]
    )


def _chat(root: Path, manifest: Manifest, culture: str) -> Iterator[bytes]:
    return (chat_line(row["messages"]) for row in training_samples(root, manifest, culture))


def _prompt_completion(root: Path, manifest: Manifest, culture: str) -> Iterator[bytes]:
    return (prompt_completion_line(row["messages"]) for row in training_samples(root, manifest, culture))
