"""The training itself: LoRA on a chat model with TRL and PEFT, in the process that calls it.

`train` reads the job's sealed dataset and leaves, in the job's output folder:

    checkpoints/    a training goes on from the last complete one
    progress.jsonl  step and loss as they come, for a view of the progress
    adapter/        adapter_model.safetensors, adapter_config.json, tokenizer, README.md (the model card),
                    adapter.gguf where the embedded engine can serve it

In a process group (RANK, WORLD_SIZE, MASTER_ADDR and so on, as torchrun and Ray Train set them) all processes
call it with the same job, and the first one writes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

from culturepark import __version__
from culturepark.errors import ConfigError, CultureParkError, RunDirError
from culturepark.store.files import make_dirs
from culturepark.training import gguf_lora
from culturepark.training.base import library, trainable_folder
from culturepark.training.datasets import HELD_OUT, TRAIN, Dataset, verify
from culturepark.training.ports import Base, Failure, Job, Outcome
from culturepark.training.subprocess_backend import LESS_MEMORY_FIX

ADAPTER = "adapter"
"""The adapter's folder within a job's output, and what `Outcome.model` says."""
GGUF_FILE = "adapter.gguf"

_WARMUP_SHARE = 0.05
"""The share of the steps in which the learning rate rises to its full value (linear warm-up)."""
_LOSS_ROWS = 32
"""The loss before and after is measured on at most this many rows about held-out questions."""
_MEMORY_WORDS = ("not enough memory", "out of memory", "can't allocate memory", "cannot allocate memory")
_LOADER = "static TLS block"
"""An error with these words is about loading a library, though it speaks of memory, too."""
_INSTALL = "Run `pip install 'culturepark[train]'` (docs/training.md says how without a GPU's libraries)."


def train(job: Job) -> Outcome:
    """Tune the job's base model on its dataset. Raises nothing: an error becomes a failed outcome."""
    began_s = time.monotonic()
    try:
        return _train(job, began_s)
    except Exception as error:
        traceback.print_exc()
        failure, what, fix = _explained(error)
        took_s = round(time.monotonic() - began_s, 1)
        return Outcome(state="failed", failure=failure, what=what, fix=fix, seconds=took_s)


def _explained(error: Exception) -> tuple[Failure, str, str]:
    """The kind of a failure, what happened, and what to do."""
    words = " ".join(str(error).split())
    if isinstance(error, ConfigError):
        return "base_missing", f"{error.where}: {error.what}", error.fix
    if isinstance(error, RunDirError):
        return "empty_dataset", f"{error.where}: {error.what}", error.fix
    if isinstance(error, CultureParkError):
        return "crashed", f"{error.where}: {error.what}", error.fix
    if isinstance(error, MemoryError) or (
        any(word in words.lower() for word in _MEMORY_WORDS) and _LOADER not in words
    ):
        same = "Given again as it was, it goes on from its last checkpoint."
        return "out_of_memory", "memory ran out.", f"{LESS_MEMORY_FIX} {same}"
    if isinstance(error, ImportError):
        return "not_installed", f"a library for training is missing: {words[:200]}.", _INSTALL
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "crashed", "the disk is full.", "Free some space and run it again."
    what = f"{type(error).__name__}: {words[:300]}"
    return "crashed", what, "See log.txt in the job's folder for where it happened."


def _train(job: Job, began_s: float) -> Outcome:
    dataset = verify(Path(job.dataset))
    output = Path(job.output)
    make_dirs(output)
    folder = trainable_folder(job.base)

    # A library may ask the hub about a model that lies here. Nothing is fetched in a training.
    os.environ["HF_HUB_OFFLINE"] = "1"
    names = ("transformers", "datasets", "peft", "trl", "torch")
    hub, sets, lora, tuning, torches = (library(name) for name in names)
    sets.disable_progress_bars()
    hub.set_seed(job.recipe.seed)
    tokenizer = hub.AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        fix = "Tune a chat model, or add a chat template to its tokenizer."
        raise ConfigError("base model", f"{job.base.name} has no chat template.", fix)
    gpu = bool(torches.cuda.is_available())
    bf16 = multiplies_bf16(torches, gpu)
    model = hub.AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if gpu else torches.float32)
    trainer = tuning.SFTTrainer(
        model=model,
        args=_arguments(tuning, job, output, gpu, bf16),
        train_dataset=sets.Dataset.from_list(_rows(job, TRAIN)),
        eval_dataset=_held_out(sets, job, dataset),
        processing_class=tokenizer,
        peft_config=lora.LoraConfig(
            r=job.recipe.rank,
            lora_alpha=job.recipe.alpha,
            lora_dropout=job.recipe.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[_progress(hub, output / "progress.jsonl")],
    )
    before = trainer.evaluate()["eval_loss"] if dataset.n_held_out else None
    checkpoint = last_checkpoint(output / "checkpoints")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = trainer.evaluate()["eval_loss"] if dataset.n_held_out else None
    history: list[dict[str, Any]] = trainer.state.log_history
    outcome = Outcome(
        state="finished",
        model=ADAPTER,
        steps=int(trainer.state.global_step),
        seconds=round(time.monotonic() - began_s, 1),
        losses=tuple((int(one["step"]), round(float(one["loss"]), 4)) for one in history if "loss" in one),
        held_out_loss=None if before is None or after is None else (round(before, 4), round(after, 4)),
        precision="bfloat16" if bf16 else str(model.dtype).removeprefix("torch."),
    )
    if trainer.is_world_process_zero():
        _save(trainer.model, tokenizer, job, dataset, folder, outcome)
    trainer.accelerator.wait_for_everyone()
    return outcome


def multiplies_bf16(torches: Any, gpu: bool) -> bool:
    """Whether the hardware multiplies bfloat16 itself: then products are computed in it (mixed precision).
    Emulated, it would be slower than float32."""
    if gpu:
        return bool(torches.cuda.is_bf16_supported(including_emulation=False))
    known: dict[str, Any] = getattr(torches.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _rows(job: Job, part: str) -> list[dict[str, Any]]:
    """Rows of a split as conversations in two parts: the loss is on the second one alone
    (completion-only)."""
    rows: list[dict[str, Any]] = []
    for line in (Path(job.dataset) / f"{part}.jsonl").read_bytes().splitlines():
        messages: list[dict[str, str]] = json.loads(line)["messages"]
        rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
    return rows


def _held_out(sets: Any, job: Job, dataset: Dataset) -> Any:
    """Rows on held-out questions, spread over all of them; None if there are none."""
    if not dataset.n_held_out:
        return None
    rows = _rows(job, HELD_OUT)
    step = max(1, len(rows) // _LOSS_ROWS)
    return sets.Dataset.from_list(rows[::step][:_LOSS_ROWS])


def _arguments(tuning: Any, job: Job, output: Path, gpu: bool, bf16: bool) -> Any:
    recipe = job.recipe
    processes = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    each = max(1, recipe.batch // processes)
    return tuning.SFTConfig(
        output_dir=str(output / "checkpoints"),
        per_device_train_batch_size=each,
        per_device_eval_batch_size=each,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=_WARMUP_SHARE,
        max_length=recipe.row_tokens,
        completion_only_loss=True,
        packing=False,
        train_sampling_strategy="group_by_length",  # rows of a step are padded to the longest of them
        use_cpu=not gpu,
        bf16=bf16,
        gradient_checkpointing=gpu,  # without a GPU it saves memory that is not short, for a third more time
        logging_steps=1,
        save_steps=job.checkpoint_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        seed=recipe.seed,
    )


def _progress(hub: Any, path: Path) -> Any:
    class Progress(hub.TrainerCallback):
        """Writes step and loss as they come."""

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any
        ) -> None:
            if state.is_world_process_zero and logs and "loss" in logs:
                line = {
                    "step": state.global_step,
                    "of": state.max_steps,
                    "loss": round(float(logs["loss"]), 4),
                }
                with path.open("ab") as file:
                    file.write(msgspec.json.encode(line) + b"\n")

    return Progress()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones, left by a killed training, are removed."""
    if not folder.is_dir():
        return None
    found: list[Path] = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
    )
    for path in reversed(found):
        try:  # the trainer writes this file last
            json.loads((path / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
        else:
            return path
    return None


def _save(model: Any, tokenizer: Any, job: Job, dataset: Dataset, folder: Path, outcome: Outcome) -> None:
    """Write the adapter to a temporary folder and rename that when it is complete (atomic publication)."""
    output = Path(job.output)
    part, target = output / f"{ADAPTER}.part", output / ADAPTER
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, safe_serialization=True)
    tokenizer.save_pretrained(part)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    served = gguf_lora.convertible(config)
    if served:
        gguf_lora.convert(part, config, part / GGUF_FILE)
    (part / "README.md").write_text(card(job, dataset, outcome, folder, served), "utf-8")
    for path in part.iterdir():
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    _sync(output)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def card(job: Job, dataset: Dataset, outcome: Outcome, folder: Path, served: bool) -> str:
    """The model card: data, settings, results and limits of the training."""
    recipe = job.recipe
    first, last = outcome.fall or (float("nan"), float("nan"))
    held_out = "not measured: no row is held out"
    if outcome.held_out_loss:
        held_out = f"{outcome.held_out_loss[0]} before, {outcome.held_out_loss[1]} after"
    losses = "\n".join(f"| {step} | {loss} |" for step, loss in _thinned(outcome.losses))
    beware = (
        "It was tuned on what language models said for people who do not exist. It speaks with the voice of "
        "a survey\nanswer and of that model's associations, stereotypes included; it speaks for nobody."
        if dataset.survey_rows < dataset.n_train
        else "It was tuned on shares of people's answers in a survey, and on no reason that anybody gave; it "
        "speaks for nobody."
    )
    return f"""---
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- culture
- culturepark
---

# {job.name}: adapter of culturepark run {dataset.run_id}

A LoRA adapter made by culturepark {__version__} (after CulturePark, arXiv 2405.15145) on
{dataset.n_train} chat rows: {", ".join(f"{culture} {n}" for culture, n in dataset.counts[TRAIN].items())}.

| | |
|---|---|
| base model | {_named(job.base)} |
| sha256 of the base model | `{job.base.digest}` |
| sha256 of the dataset's rows | `{dataset.hash}` |
| key of the training | `{job.key}` |
| rank, alpha, dropout | {recipe.rank}, {recipe.alpha}, {recipe.dropout:g} |
| learning rate | {recipe.learning_rate:g}, linear, {_WARMUP_SHARE:.0%} warm-up |
| steps, batch | {outcome.steps}, {recipe.batch} |
| longest row | {recipe.row_tokens} tokens |
| precision of products | {outcome.precision} |
| seed | {recipe.seed} |
| training loss, mean of a quarter of the steps | {first} at first, {last} at last |
| loss on held-out questions | {held_out} |
| time | {outcome.seconds:.0f} s |
| GGUF for the embedded engine | {GGUF_FILE if served else "none: kind of model not known"} |

Held-out questions, on which it may be evaluated: {", ".join(dataset.held_out) or "none"}.

## Beware

{beware}

## Losses

| step | training loss |
|---:|---:|
{losses}
"""


def _named(base: Base) -> str:
    return base.name if base.kind == "gguf" else f"{base.name} (a folder of safetensors)"


def _thinned(losses: tuple[tuple[int, float], ...], most: int = 50) -> list[tuple[int, float]]:
    """About `most` of them at most, the last one included."""
    step = max(1, len(losses) // most)
    return [*losses[:-1:step], *losses[-1:]]
