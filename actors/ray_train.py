"""The process that a training over Ray Train runs in: `python -m actors.ray_train JOB.json FD`.

The same trainer as the backend `local`, in `training.workers` processes that Ray places on a cluster's
nodes: the one that RAY_ADDRESS names, else a private one on this machine. FD is the locked file that says
it lives; started and watched by `culturepark.training.subprocess_backend`. Run directory and base model have
to be on storage that all nodes see, as Ray Train asks for checkpoints.
"""

# Ray Train's types are mostly unknown.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import ray

from actors.session import ray_session
from culturepark.store.files import write_atomically
from culturepark.training.ports import Job, Outcome
from culturepark.training.subprocess_backend import LOG_FILE, register_process, save_outcome

_WORKER_FILE = "worker.json"
"""File of the outcome of the first worker, or of one that failed: Ray Train returns no more than metrics."""


def main(arguments: Sequence[str]) -> int:
    """Train, and leave the outcome."""
    job = register_process(arguments[0], arguments[1])
    os.set_inheritable(int(arguments[1]), False)
    with suppress(FileNotFoundError):
        _outcome_file(job).unlink()
    try:
        with ray_session():
            _fit(job)
    except Exception:
        traceback.print_exc()
    outcome = _outcome_of(job)
    save_outcome(job, outcome)
    return int(outcome.state != "finished")


def _fit(job: Job) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    there: dict[str, Any] = ray.cluster_resources()
    gpu = there.get("GPU", 0) >= job.workers
    each = 1 if gpu else max(1, int(there.get("CPU", 1)) // job.workers)
    trainer: Any = TorchTrainer(
        _work,
        train_loop_config={"job": msgspec.json.encode(job).decode()},
        scaling_config=ScalingConfig(
            num_workers=job.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": each} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(name=job.key, storage_path=str(Path(job.output).resolve() / "ray-train")),
    )
    trainer.fit()


def _work(config: dict[str, str]) -> None:
    """In each worker: Ray Train has made the process group, and the trainer finds it."""
    from ray import train as ray_train

    from culturepark.training.lora import train

    job = msgspec.json.decode(config["job"], type=Job)
    outcome = train(job)
    failed = outcome.state != "finished"
    if failed or ray_train.get_context().get_world_rank() == 0:
        write_atomically(_outcome_file(job), msgspec.json.encode(outcome))
    if failed:
        raise RuntimeError(outcome.what)  # so that the others do not wait for this one


def _outcome_file(job: Job) -> Path:
    return Path(job.output) / _WORKER_FILE


def _outcome_of(job: Job) -> Outcome:
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(_outcome_file(job).read_bytes(), type=Outcome)
    fix = f"See {LOG_FILE} in {job.output}."
    return Outcome(
        state="failed", failure="crashed", what="its group of workers ended without a result.", fix=fix
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
