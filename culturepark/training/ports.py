"""What a training is given, how it ended, and what a backend has to be able to do."""

from __future__ import annotations

import hashlib
from typing import Literal, Protocol

import msgspec
from msgspec import Struct

from culturepark.errors import TrainingError

State = Literal["running", "finished", "failed", "cancelled", "lost"]
"""The state of a launched job. `lost`: it does not run any more, and left no outcome."""

Failure = Literal[
    "", "empty_dataset", "base_missing", "not_installed", "out_of_memory", "killed", "refused", "crashed"
]


class Base(Struct, frozen=True, forbid_unknown_fields=True):
    """The model that is tuned.

    `kind` says what `path` is: a GGUF file, or a folder as transformers saves one; for a service or a
    command of the user's it is only a name. `digest` identifies the content, empty where it is not here.
    """

    kind: Literal["gguf", "folder", "name"]
    name: str
    path: str = ""
    digest: str = ""


class Recipe(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the base model is tuned (hyperparameters): those of the [training] settings that change the result,
    and the seed."""

    rank: int
    alpha: int
    dropout: float
    learning_rate: float
    epochs: float
    max_steps: int
    batch: int
    row_tokens: int
    seed: int


class Job(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training. `dataset` is the folder of a sealed dataset, `output` the folder for its results.

    `name` is a culture's id or `joint`. `rows` is the number of training rows, `workers` that of the
    processes that share the work, where the backend can do so.
    """

    name: str
    backend: str
    dataset: str
    dataset_hash: str
    rows: int
    output: str
    base: Base
    recipe: Recipe
    command: tuple[str, ...] = ()
    checkpoint_steps: int = 20
    workers: int = 1

    @property
    def key(self) -> str:
        """The key of the training (idempotency key), 32 hex digits: equal for jobs that give the same model.

        It covers name, dataset, base model, recipe, backend and command, but no paths of datasets or results.
        """
        same = (
            self.name,
            self.backend,
            self.dataset_hash,
            self.base.name if self.base.kind == "name" else self.base.digest,
            self.recipe,
            self.command,
        )
        return hashlib.sha256(msgspec.json.encode(same)).hexdigest()[:32]


class Outcome(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a training ended.

    `model` is the result: the adapter's folder relative to the job's output, or a service's name for the
    tuned model. `seconds` is how long it ran. `losses` are (step, training loss), `held_out_loss` is on
    held-out questions before and after, `precision` is that of matrix products. `what` and `fix` tell the
    reader what went wrong and what to do.
    """

    state: State
    model: str = ""
    failure: Failure = ""
    what: str = ""
    fix: str = ""
    steps: int = 0
    seconds: float = 0.0
    losses: tuple[tuple[int, float], ...] = ()
    held_out_loss: tuple[float, float] | None = None
    precision: str = ""

    @property
    def fall(self) -> tuple[float, float] | None:
        """Training loss at the beginning and at the end, each the mean over a quarter of the steps: the loss
        of a single step depends more on its rows, which are of similar length, than on the model."""
        if not self.losses:
            return None
        losses = [loss for _, loss in self.losses]
        n = max(1, len(losses) // 4)
        return round(sum(losses[:n]) / n, 4), round(sum(losses[-n:]) / n, 4)

    def error(self, job: Job) -> TrainingError:
        """The error for the reader of an outcome that is not `finished`."""
        words = "it was cancelled." if self.state == "cancelled" else self.what
        return TrainingError(
            f"training of {job.name}", words, self.fix or "Run `culturepark finetune` again."
        )


class Backend(Protocol):
    """Something that trains. Jobs are identified by their key, so asking twice is harmless (idempotent)."""

    def prepare(self, job: Job) -> None:
        """Check before anything is recorded whether this job can run. Raises CultureParkError."""
        ...

    def find(self, job: Job) -> str | None:
        """The id of a job with this key that runs or has finished, whenever and by whichever process it was
        launched."""
        ...

    def launch(self, job: Job) -> str:
        """Start it; returns its id. Raises CultureParkError."""
        ...

    def poll(self, job: Job, job_id: str) -> State:
        """Its state now."""
        ...

    def cancel(self, job: Job, job_id: str) -> None:
        """Stop it. A job that has ended already stays as it is."""
        ...

    def detach(self, job: Job, job_id: str) -> None:
        """Stop watching, without cancelling: a process on this machine is stopped, to go on from its last
        checkpoint when it is launched again; a service goes on by itself."""
        ...

    def outcome(self, job: Job, job_id: str) -> Outcome:
        """How it ended; only for a job that is no longer running."""
        ...
