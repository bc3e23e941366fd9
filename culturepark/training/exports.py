"""Configuration files with which other trainers read a sealed dataset as it stands."""

from __future__ import annotations

from pathlib import Path

import msgspec

from culturepark.settings import TrainingSettings


def exports(name: str, folder: Path, training: TrainingSettings, held_out: bool) -> dict[str, str]:
    """File names and texts for Axolotl and LLaMA-Factory. `BASE_MODEL` is left for the user to fill in.

    Without rows that are `held_out` no evaluation is named: both refuse an empty file.
    """
    return {
        "axolotl.yaml": _axolotl(name, folder, training, held_out),
        "dataset_info.json": _dataset_info(name, held_out),
        "llama-factory.yaml": _llama_factory(name, folder, training, held_out),
    }


def _quoted(text: str) -> str:
    """A YAML scalar: JSON's strings are YAML's too."""
    return msgspec.json.encode(text).decode()


def _length(training: TrainingSettings, key: str) -> str:
    return f"max_steps: {training.max_steps}" if training.max_steps else f"{key}: {training.epochs:g}"


def _axolotl(name: str, folder: Path, training: TrainingSettings, held_out: bool) -> str:
    block = """
  - path: {path}
    ds_type: json
    split: train
    type: chat_template
    field_messages: messages
    message_property_mappings:
      role: role
      content: content
    roles_to_train: [assistant]"""
    sets = "datasets:" + block.format(path=_quoted(str(folder / "train.jsonl")))
    if held_out:
        sets += "\ntest_datasets:" + block.format(path=_quoted(str(folder / "held-out.jsonl")))
    return f"""# axolotl train axolotl.yaml      (after naming the base model; paths are of this machine)
base_model: BASE_MODEL
chat_template: tokenizer_default
{sets}
adapter: lora
lora_r: {training.rank}
lora_alpha: {training.alpha}
lora_dropout: {training.dropout:g}
lora_target_linear: true
sequence_len: {training.row_tokens}
micro_batch_size: {training.batch}
gradient_accumulation_steps: 1
{_length(training, "num_epochs")}
learning_rate: {training.learning_rate:.6f}
lr_scheduler: linear
optimizer: adamw_torch
save_steps: {training.checkpoint_steps}
output_dir: {_quoted(f"./{name}-axolotl")}
"""


def _dataset_info(name: str, held_out: bool) -> str:
    """LLaMA-Factory's list of datasets, which it looks for in the folder that `dataset_dir` names."""
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    shape = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    sets = {f"culturepark-{name}": {"file_name": "train.jsonl", **shape}}
    if held_out:
        sets[f"culturepark-{name}-held-out"] = {"file_name": "held-out.jsonl", **shape}
    return msgspec.json.format(msgspec.json.encode(sets)).decode() + "\n"


def _llama_factory(name: str, folder: Path, training: TrainingSettings, held_out: bool) -> str:
    evaluated = f"eval_dataset: {_quoted(f'culturepark-{name}-held-out')}\n" if held_out else ""
    return f"""# llamafactory-cli train llama-factory.yaml      (after naming the base model and its template)
model_name_or_path: BASE_MODEL
template: TEMPLATE
stage: sft
do_train: true
finetuning_type: lora
lora_rank: {training.rank}
lora_alpha: {training.alpha}
lora_dropout: {training.dropout:g}
lora_target: all
dataset_dir: {_quoted(str(folder))}
dataset: {_quoted(f"culturepark-{name}")}
{evaluated}cutoff_len: {training.row_tokens}
per_device_train_batch_size: {training.batch}
{_length(training, "num_train_epochs")}
learning_rate: {training.learning_rate:.6f}
lr_scheduler_type: linear
save_steps: {training.checkpoint_steps}
output_dir: {_quoted(f"./{name}-llama-factory")}
"""
