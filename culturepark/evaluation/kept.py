"""Answers of a model as they come, beside the results: an evaluation that was stopped asks only the rest.

One file a model, `answers/<digest>.jsonl`, the digest being of all that its answers depend on besides the
question. A line is an answer; one that was being written when the process died is taken away.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
from msgspec import Struct

from culturepark import __version__
from culturepark.evaluation.asking import Answer, Method, Question
from culturepark.evaluation.targets import Target
from culturepark.prompts import PROMPT_VERSION
from culturepark.store.files import disk_errors, make_dirs

FOLDER = "answers"


class _Line(Struct, frozen=True):
    """`id` is the question's, for whoever reads the file; `key` is what it is found by."""

    key: str
    id: str
    answer: Answer


class KeptAnswers:
    """The answers of one model under test, by question. Implements asking.Kept."""

    def __init__(self, out: Path, target: Target, rng_seed: int) -> None:
        """Read what is there. Raises RunDirError."""
        adapters = {culture: adapter.key for culture, adapter in target.adapters.items()}
        about = (target.name, target.model, adapters, rng_seed, __version__, PROMPT_VERSION)
        digest = hashlib.sha256(msgspec.json.encode(about, order="deterministic")).hexdigest()
        make_dirs(out / FOLDER)
        self._path = out / FOLDER / f"{digest[:16]}.jsonl"
        self._known = dict[str, Answer]()
        with disk_errors(self._path):
            self._file = self._path.open("a+b")
            self._read()

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for raw in self._file:
            try:
                line = msgspec.json.decode(raw, type=_Line)
            except msgspec.MsgspecError:
                break
            if not raw.endswith(b"\n"):
                break
            whole += len(raw)
            self._known[line.key] = line.answer
        self._file.truncate(whole)

    def get(self, question: Question, draws: int, method: Method) -> Answer | None:
        """The answer to this question, asked so often and in this way; None if there is none yet."""
        return self._known.get(_key(question, draws, method))

    def add(self, question: Question, answer: Answer) -> None:
        """Keep an answer. Raises RunDirError."""
        key = _key(question, answer.draws, answer.method)
        with disk_errors(self._path):
            self._file.write(msgspec.json.encode(_Line(key, question.id, answer)) + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def forget(out: Path) -> None:
    """Remove the answers of earlier evaluations. Raises RunDirError."""
    with disk_errors(out):
        for path in (out / FOLDER).glob("*.jsonl"):
            path.unlink()


def _key(question: Question, draws: int, method: Method) -> str:
    asked = msgspec.json.encode((question, draws, method))
    return hashlib.blake2b(asked, digest_size=12).hexdigest()
