"""A real training on the embedded model, where torch is installed: killed, gone on with, served at once."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from culturepark.models.endpoint import Reply
from culturepark.models.local.catalog import PACKAGED
from culturepark.models.local.serving import served
from culturepark.models.local.weights import installed_weights
from culturepark.models.open import open_chat
from culturepark.ports import Prompt, Sampling
from culturepark.settings import LimitSettings, ModelSettings
from culturepark.store.rundir import Run
from culturepark.training.adapters import Adapter, adapters_of, served_adapters
from culturepark.training.base import trainable_folder
from culturepark.training.jobs import create_job, run_training
from culturepark.training.ports import Job, Outcome
from culturepark.training.records import Records
from culturepark.training.subprocess_backend import LOCAL, RAY_TRAIN, SubprocessBackend
from tests import runs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs culturepark[train]"),
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs culturepark[embedded]"),
]

MODEL = ModelSettings(engine="embedded", profile="small", parallel=2, threads=2)
STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose samples a scripted model made; small steps on the packaged model."""
    training = {
        "model": "small",
        "max_steps": STEPS,
        "batch": 4,
        "rank": 8,
        "dropout": 0.0,
        "row_tokens": 128,
        "learning_rate": 2e-3,
        "checkpoint_steps": 2,
        "held_out": 0.34,
    }
    models = {"chat": {"engine": "scripted"}, "vectors": {"engine": "scripted"}}
    small = {"engine": "embedded", "profile": "small"}
    root = tmp_path_factory.mktemp("training") / "run"
    return runs.made(root, training=training, models=models | {"small": small})


@pytest.fixture(scope="module")
def trained(run: Run) -> dict[str, tuple[Job, Outcome, list[str]]]:
    """Two adapters; the first one's process is killed after its first checkpoint, then gone on with."""
    installed_weights(PACKAGED)
    records, made = Records(run.root), dict[str, tuple[Job, Outcome, list[str]]]()
    for name in ("arabic", "korean"):
        job = create_job(run, name, run.settings)
        said: list[str] = []

        def kill(what: str, job: Job, job_id: str, said: list[str] = said) -> None:
            said.append(what)
            first = job.name == "arabic" and "failed" not in [one.event for one in records.all()]
            if first and (Path(job.output) / "checkpoints/checkpoint-2/trainer_state.json").exists():
                os.kill(int(job_id), signal.SIGKILL)

        outcome = run_training(records, SubprocessBackend(LOCAL), job, poll_s=0.05, on_event=kill)
        if name == "arabic":
            assert outcome.failure == "killed"
            outcome = run_training(records, SubprocessBackend(LOCAL), job, poll_s=0.2)
        assert outcome.state == "finished", outcome
        made[name] = job, outcome, said
    return made


def test_loss_falls_over_a_kill(trained: dict[str, tuple[Job, Outcome, list[str]]]) -> None:
    for _, outcome, _ in trained.values():
        assert [step for step, _ in outcome.losses] == list(range(1, STEPS + 1))
        assert outcome.fall is not None
        assert outcome.fall[1] < 0.8 * outcome.fall[0]
        assert outcome.held_out_loss is None or outcome.held_out_loss[1] < outcome.held_out_loss[0]
    # It went on from the checkpoint: the first steps were not gone through again.
    job = trained["arabic"][0]
    lines = (Path(job.output) / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines].count(1) == 1


def test_running_out_of_memory_is_told_and_gone_on_from(run: Run) -> None:
    """The process may not take any more memory once it has a checkpoint; next time it may."""
    installed_weights(PACKAGED)
    training = msgspec.structs.replace(run.settings.training, max_steps=4, rank=2)
    job = create_job(run, "korean", msgspec.structs.replace(run.settings, training=training))
    output, limited = Path(job.output), list[int]()

    def limit(what: str, job: Job, job_id: str) -> None:
        if not limited and (output / "checkpoints/checkpoint-2/trainer_state.json").exists():
            for process in members_of(int(job_id)):
                taken = int((Path("/proc") / str(process) / "statm").read_text().split()[0])
                resource.prlimit(process, resource.RLIMIT_AS, (taken * resource.getpagesize(),) * 2)
                limited.append(process)

    outcome = run_training(Records(run.root), SubprocessBackend(LOCAL), job, poll_s=0.02, on_event=limit)
    assert limited
    assert (outcome.state, outcome.failure) == ("failed", "out_of_memory"), outcome
    assert "training.batch" in outcome.fix
    outcome = run_training(Records(run.root), SubprocessBackend(LOCAL), job, poll_s=0.2)
    assert outcome.state == "finished", outcome
    steps = [json.loads(line)["step"] for line in (output / "progress.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1
    assert steps[-1] == 4


def members_of(group: int) -> list[int]:
    """The processes of a process group."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):  # it ended meanwhile
            if os.getpgid(int(folder.name)) == group:
                found.append(int(folder.name))
    return found


def test_the_adapter_is_safetensors_with_a_card_and_reloads(
    run: Run, trained: dict[str, tuple[Job, Outcome, list[str]]]
) -> None:
    adapter = adapters_of(run.root)["arabic"]
    assert adapter.folder is not None
    card = (adapter.folder / "README.md").read_text()
    for fact in (
        adapter.base.digest,
        adapter.dataset_hash,
        adapter.key,
        "{} at first, {} at last".format(*trained["arabic"][1].fall or ()),
    ):
        assert fact in card
    assert not list(adapter.folder.glob("*.bin"))
    # In a process of its own: torch's memory and threads are not for the other tests.
    reload = (
        "import sys, peft, transformers as t, torch\n"
        "m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "i = torch.arange(100, 120)[None]; a = m(i).logits\n"
        "p = peft.PeftModel.from_pretrained(m, sys.argv[2]); b = p(i).logits\n"
        "q = p.merge_and_unload()(i).logits\n"
        "assert (a - b).abs().max() > 0.1; assert (b - q).abs().max() < 0.01 * (a - b).abs().max()"
    )
    command = [sys.executable, "-c", reload, str(trainable_folder(adapter.base)), str(adapter.folder)]
    subprocess.run(command, check=True)


REFERENCE = """
import json, sys, peft, torch, transformers as t
folder, prompt, *adapters = sys.argv[1:]
tokenizer = t.AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template(
    json.loads(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
)
said = []
for adapter in [None, *adapters]:
    model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    shares = torch.log_softmax(model(**ids).logits[0, -1], -1)
    said.append({tokenizer.decode([i]): shares[i].item() for i in shares.topk(40).indices.tolist()})
print(json.dumps(said))
"""


async def test_the_engine_answers_as_the_trained_model_does_whichever_was_asked_before(
    run: Run, trained: dict[str, tuple[Job, Outcome, list[str]]]
) -> None:
    by_name = adapters_of(run.root)
    adapters: list[Adapter] = [by_name["arabic"], by_name["korean"]]
    messages = [
        {"role": "user", "content": "How do you see it that guests come first?\n1. agree\n2. disagree"}
    ]
    prompt = Prompt().add("user", messages[0]["content"])
    folder = str(trainable_folder(adapters[0].base))
    command = [
        sys.executable,
        "-c",
        REFERENCE,
        folder,
        json.dumps(messages),
        *(str(a.folder) for a in adapters),
    ]
    done = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)
    reference = dict(zip(("base", "arabic", "korean"), json.loads(done.stdout.splitlines()[-1]), strict=True))
    sampling = Sampling(temperature=0, max_tokens=12, extra={"logprobs": True, "top_logprobs": 20})

    async with served_adapters(adapters, MODEL) as tuned, served(MODEL) as ready:
        base = open_chat(ready, LimitSettings())
        models = {"base": base, **tuned}
        texts: dict[str, set[str]] = {name: set() for name in models}
        order = "base arabic base korean arabic base arabic korean korean base korean arabic korean"
        for name in order.split():
            texts[name].add((await models[name].complete(prompt, sampling, affinity="a")).text)
        shares = {name: await first_shares(models[name], prompt, sampling) for name in models}
        await base.close()
    assert all(len(said) == 1 for said in texts.values()), texts
    assert len({*texts["base"], *texts["arabic"], *texts["korean"]}) == 3, texts

    # Weights of the engine are in 4 bits, so its numbers are near to ours and not the same. With q and k in
    # the wrong order the adapters' would be no nearer to them than to the plain model's.
    for name in ("arabic", "korean"):
        near = {other: apart(shares[name], reference[other]) for other in reference}
        assert min(near, key=lambda other: near[other]) == name, near
        assert near[name] < 0.5 * near["base"], near


async def first_shares(model: Any, prompt: Prompt, sampling: Sampling) -> dict[str, float]:
    """Log-probabilities of the first token of the answer, which the port does not carry."""
    seen: list[Reply] = []
    chat = getattr(model, "_chat", model)
    read = chat._read
    chat._read = lambda raw, *rest: seen.append(raw) or read(raw, *rest)
    try:
        await model.complete(prompt, msgspec.structs.replace(sampling), affinity="a")
    finally:
        chat._read = read
    top = json.loads(seen[0].body)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {one["token"]: one["logprob"] for one in top}


def apart(one: dict[str, float], other: dict[str, float]) -> float:
    """Mean distance of log-probabilities over the tokens that both know."""
    both = one.keys() & other.keys()
    assert both
    return sum(abs(one[token] - other[token]) for token in both) / len(both)


def test_two_workers_of_ray_train_share_the_work(run: Run) -> None:
    recipe = {"backend": "ray-train", "workers": 2, "max_steps": 2}
    training = msgspec.structs.replace(run.settings.training, **recipe)
    job = create_job(run, "korean", msgspec.structs.replace(run.settings, training=training))
    outcome = run_training(Records(run.root), SubprocessBackend(RAY_TRAIN), job, poll_s=0.2)
    assert outcome.state == "finished", (outcome, (Path(job.output) / "log.txt").read_text()[-3000:])
    assert outcome.steps == 2
    assert (Path(job.output) / "adapter" / "adapter.gguf").is_file()


def test_what_went_wrong_in_a_worker_is_told(run: Run) -> None:
    training = msgspec.structs.replace(run.settings.training, backend="ray-train", workers=2, max_steps=3)
    job = create_job(run, "korean", msgspec.structs.replace(run.settings, training=training))
    gone = msgspec.structs.replace(job.base, path=job.base.path + ".gone", digest="0" * 64)
    job = msgspec.structs.replace(job, base=gone, output=job.output + "-gone")
    outcome = run_training(Records(run.root), SubprocessBackend(RAY_TRAIN), job, poll_s=0.2)
    assert (outcome.state, outcome.failure) == ("failed", "base_missing")
    assert "is not there" in outcome.what


TOGETHER = """
import sys, pathlib, msgspec
from culturepark.training.lora import train
from culturepark.training.ports import Job
outcome = train(msgspec.json.decode(pathlib.Path(sys.argv[1]).read_bytes(), type=Job))
print(outcome, file=sys.stderr)
sys.exit(outcome.state != "finished")
"""


def test_two_processes_train_together(run: Run, tmp_path: Path) -> None:
    job = msgspec.structs.replace(create_job(run, "korean", run.settings), output=str(tmp_path / "out"))
    job = msgspec.structs.replace(job, recipe=msgspec.structs.replace(job.recipe, max_steps=2))
    (tmp_path / "job.json").write_bytes(msgspec.json.encode(job))
    port = str(20_000 + os.getpid() % 10_000)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path / "job.json")],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    timer = threading.Timer(240, lambda: [one.kill() for one in both])
    timer.start()
    words = [one.communicate()[1].decode() for one in both]
    timer.cancel()
    assert [one.returncode for one in both] == [0, 0], words
    assert (tmp_path / "out" / "adapter" / "adapter.gguf").is_file()
    assert "steps=2" in words[0]
