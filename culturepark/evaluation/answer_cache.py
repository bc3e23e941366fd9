"""Answers of a model as they come, beside the results: an evaluation that was stopped asks only the rest.

One file a model, `answers/<digest>.jsonl`, the digest being of all that its answers depend on besides the
question. A line is an answer; one that was being written when the process died is taken away.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from culturepark import __version__, flock
from culturepark.errors import ConfigError
from culturepark.evaluation.asking import ASKED_AS, Answer, Method, Question
from culturepark.evaluation.report import REPORT
from culturepark.evaluation.targets import EMBEDDED, Target
from culturepark.models.local.engine import served_file, sha256_of
from culturepark.models.replicas import base_urls_of
from culturepark.store.files import disk_errors, make_dirs
from culturepark.versions import PROMPT_VERSION

FOLDER = "answers"


class _Line(Struct, frozen=True):
    """`id` is the question's, for whoever reads the file; `key` is what it is found by."""

    key: str
    id: str
    answer: Answer


class AnswerCache:
    """The answers of one model under test, by question. Implements asking.Kept."""

    def __init__(self, out: Path, name: str, target: Target, rng_seed: int) -> None:
        """Read what is there. `name` tells equal targets apart.

        Raises RunDirError, ConfigError if another process writes here.
        """
        about = (name, _place(target), rng_seed, ASKED_AS, __version__, PROMPT_VERSION)
        digest = hashlib.sha256(msgspec.json.encode(about, order="deterministic")).hexdigest()
        make_dirs(out / FOLDER)
        self._path = out / FOLDER / f"{digest[:16]}.jsonl"
        self._known: dict[str, Answer] = {}
        with disk_errors(self._path):
            self._file = self._path.open("a+b", buffering=0)
            if not flock.try_acquire(self._file.fileno()):
                self._file.close()
                what = f"another evaluation of {name} is writing to {out}."
                raise ConfigError("--out", what, "Wait for it, or name another directory.")
            self._read()

    def _read(self) -> None:
        self._file.seek(0)
        *lines, rest = self._file.read().split(b"\n")
        for raw in lines:
            try:
                line = msgspec.json.decode(raw, type=_Line)
            except msgspec.MsgspecError:
                continue  # asked again
            self._known[line.key] = line.answer
        if rest:
            self._file.truncate(self._file.tell() - len(rest))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, question: Question, draws: int, method: Method) -> Answer | None:
        """The answer to this question, asked so often and in this way; None if there is none yet."""
        return self._known.get(_key(question, draws, method))

    def add(self, question: Question, answer: Answer) -> None:
        """Keep an answer. Raises RunDirError."""
        key = _key(question, answer.draws, answer.method)
        with disk_errors(self._path):
            self._file.write(msgspec.json.encode(_Line(key, question.id, answer)) + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def forget(out: Path) -> None:
    """Take away earlier results, and the answers that they came from. Raises RunDirError."""
    with disk_errors(out):
        for path in (out / REPORT, *(out / FOLDER).glob("*.jsonl")):
            path.unlink(missing_ok=True)


def _place(target: Target) -> dict[str, Any]:
    """What its answers depend on: who answers, and where."""
    model = target.model
    return {
        "name": target.name,
        "model": model.model,
        "profile": model.profile,
        "at": base_urls_of(model) if model.engine == "openai" else (),
        "weights": sha256_of(served_file(model)) if model.engine == EMBEDDED else "",
        "adapters": {culture: adapter.key for culture, adapter in target.adapters.items()},
    }


def _key(question: Question, draws: int, method: Method) -> str:
    # Who was asked together changes no answer.
    asked = msgspec.json.encode((replace(question, begins_as=""), draws, method))
    return hashlib.blake2b(asked, digest_size=12).hexdigest()
