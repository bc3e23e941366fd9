"""Answers of a model as they come, stored beside the results (cache): an evaluation that was stopped asks
only the rest.

One file for each model, `answers/<digest>.jsonl`, the digest being of all that its answers depend on besides
the question. A line is an answer; a last line that was cut short when the process died is removed.
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
from culturepark.evaluation.asking import ASKING_VERSION, Answer, Method, Question
from culturepark.evaluation.report import REPORT
from culturepark.evaluation.targets import EMBEDDED, Target
from culturepark.models.local.weights import served_file, sha256_of
from culturepark.models.replicas import base_urls_of
from culturepark.store.files import disk_errors, make_dirs
from culturepark.versions import PROMPT_VERSION

FOLDER = "answers"


class _Line(Struct, frozen=True):
    """`id` is the question's, for the reader of the file; `key` is what the answer is found by."""

    key: str
    id: str
    answer: Answer


class AnswerCache:
    """The answers of one model under test, by question. Implements asking.AnswerStore."""

    def __init__(self, out: Path, name: str, target: Target, rng_seed: int) -> None:
        """Read what is there. `name` distinguishes equal targets.

        Raises RunDirError, ConfigError if another process writes here.
        """
        depends_on = (name, _identity(target), rng_seed, ASKING_VERSION, __version__, PROMPT_VERSION)
        digest = hashlib.sha256(msgspec.json.encode(depends_on, order="deterministic")).hexdigest()
        make_dirs(out / FOLDER)
        self._path = out / FOLDER / f"{digest[:16]}.jsonl"
        self._answers: dict[str, Answer] = {}
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
            self._answers[line.key] = line.answer
        if rest:
            self._file.truncate(self._file.tell() - len(rest))

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, question: Question, draws: int, method: Method) -> Answer | None:
        """The answer to this question, asked with so many draws and by this method; None if there is none."""
        return self._answers.get(_key(question, draws, method))

    def add(self, question: Question, answer: Answer) -> None:
        """Append an answer. Raises RunDirError."""
        key = _key(question, answer.draws, answer.method)
        with disk_errors(self._path):
            self._file.write(msgspec.json.encode(_Line(key, question.id, answer)) + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def delete_results(out: Path) -> None:
    """Delete earlier results, and the answers that they came from. Raises RunDirError."""
    with disk_errors(out):
        for path in (out / REPORT, *(out / FOLDER).glob("*.jsonl")):
            path.unlink(missing_ok=True)


def _identity(target: Target) -> dict[str, Any]:
    """What its answers depend on: which model answers, and where."""
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
    # The affinity, which replica is asked, changes no answer.
    request = msgspec.json.encode((replace(question, affinity=""), draws, method))
    return hashlib.blake2b(request, digest_size=12).hexdigest()
