"""Launches are neither forgotten nor repeated, whatever dies in between; trainers of the user's; errors."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from culturepark.cli.main import run as culturepark
from culturepark.errors import ConfigError, EndpointError, RunDirError, TrainingError
from culturepark.models.errors import ModelError
from culturepark.models.scripted import ScriptedEmbedder
from culturepark.settings_load import decode_settings
from culturepark.store.rundir import Run
from culturepark.training import subprocess_backend
from culturepark.training.adapters import adapter_named, adapters_of
from culturepark.training.base import base_of
from culturepark.training.datasets import seal
from culturepark.training.jobs import (
    cancel,
    create_job,
    next_action,
    run_training,
    trainable_cultures,
    training_names,
)
from culturepark.training.leakage import REPORT, read_report
from culturepark.training.lora import _explained, last_checkpoint, multiplies_bf16
from culturepark.training.ports import Base, Job, Outcome, Recipe, State
from culturepark.training.records import Event, Record, Records, training_lock
from culturepark.training.run_command import arguments_of
from culturepark.training.subprocess_backend import COMMAND, LOCAL, NEEDED, SubprocessBackend

PYTHON = sys.executable
RECIPE = Recipe(
    rank=4, alpha=8, dropout=0, learning_rate=1e-3, epochs=1, max_steps=2, batch=2, row_tokens=64, seed=1
)


def job_for(run: Run, command: list[str], name: str = "arabic") -> Job:
    """A training by a command of the user's."""
    training = msgspec.structs.replace(run.settings.training, backend="command", command=tuple(command))
    return create_job(run, name, msgspec.structs.replace(run.settings, training=training))


def of(job: Job, run: Run, backend: Any, **options: Any) -> Outcome:
    """Follow a training without waiting long."""
    return run_training(Records(run.root), backend, job, poll_s=0.02, **options)


class Dies(Exception):
    """This process is killed here."""


class Fake:
    """A service that remembers jobs by key; `dies` names the call after whose effect we are killed."""

    def __init__(self, dies: str = "", state: State = "finished") -> None:
        self.jobs: dict[str, str] = {}
        self.launches = 0
        self.dies = dies
        self.state: State = state
        self.cancelled: list[str] = []

    def _after(self, call: str) -> None:
        if self.dies == call:
            self.dies = ""
            raise Dies

    def prepare(self, job: Job) -> None:
        self._after("prepare")

    def find(self, job: Job) -> str | None:
        return self.jobs.get(job.key)

    def launch(self, job: Job) -> str:
        self.launches += 1
        self.jobs[job.key] = f"ft-{self.launches}"
        Path(job.output).mkdir(parents=True, exist_ok=True)
        self._after("launch")
        return self.jobs[job.key]

    def poll(self, job: Job, job_id: str) -> State:
        self._after("poll")
        return self.state

    def cancel(self, job: Job, job_id: str) -> None:
        self.cancelled.append(job_id)

    def detach(self, job: Job, job_id: str) -> None: ...

    def outcome(self, job: Job, job_id: str) -> Outcome:
        self._after("outcome")
        if self.state == "finished":
            return Outcome(state="finished", model=".", steps=2)
        return Outcome(state="failed", failure="killed", what="gone", fix="again")


def events(run: Run) -> list[str]:
    """What the records say, in order."""
    return [record.event for record in Records(run.root).all()]


# --- deciding


JOB = Job(
    name="arabic",
    backend="local",
    dataset="d",
    dataset_hash="h",
    rows=3,
    output="o",
    base=Base("gguf", "m", "p", "x"),
    recipe=RECIPE,
)


@given(
    st.sampled_from(["intended", "launched", "finished", "failed", "cancelled", None]),
    st.sampled_from([None, "ft-1"]),
    st.booleans(),
    st.booleans(),
)
def test_what_runs_or_is_there_is_never_launched_again(
    event: Event | None, found: str | None, there: bool, retry: bool
) -> None:
    last = Record(1, JOB.key, event, 0.0, JOB, "ft-1" if event == "launched" else "") if event else None
    todo = next_action(last, found, there, retry)
    if event == "launched" or (event == "intended" and found):
        assert todo == type(todo)("watch", "ft-1")
    if event == "finished" and there:
        assert todo.step == "done"
    if event in ("failed", "cancelled") and not retry:
        assert todo.step == "done"
    if todo.step == "launch":
        assert not (found and there)


def test_the_key_is_what_would_give_the_same_model() -> None:
    replace = msgspec.structs.replace
    assert replace(JOB, output="elsewhere", dataset="moved", checkpoint_steps=7).key == JOB.key
    others = [
        replace(JOB, dataset_hash="other"),
        replace(JOB, recipe=replace(RECIPE, rank=5)),
        replace(JOB, base=replace(JOB.base, digest="y")),
        replace(JOB, backend="openai"),
        replace(JOB, name="korean"),
    ]
    assert len({job.key for job in [JOB, *others]}) == 1 + len(others)


def test_what_is_trained(finished: Run) -> None:
    assert training_names(finished, None, False) == ["arabic", "korean", "joint"]
    assert training_names(finished, ["korean"], False) == ["korean"]
    assert training_names(finished, None, True) == ["joint"]
    assert training_names(finished, ["korean", "korean"], True) == ["korean", "joint"]
    with pytest.raises(ConfigError, match="arabic, korean"):
        training_names(finished, ["german"], False)


# --- over crashes


@pytest.mark.parametrize("dies", ["prepare", "launch", "poll", "outcome"])
def test_killed_anywhere_it_is_launched_once(run: Run, dies: str) -> None:
    backend, job = Fake(dies), job_for(run, [PYTHON])
    with pytest.raises(Dies):
        of(job, run, backend)
    outcome = of(job, run, backend)
    assert (outcome.state, backend.launches) == ("finished", 1)
    assert events(run)[-1] == "finished"
    assert events(run).count("launched") == 1
    before = events(run)
    assert of(job, run, backend) == outcome
    assert (events(run), backend.launches) == (before, 1)


def test_each_step_is_recorded_before_the_next(run: Run) -> None:
    seen: dict[str, list[str]] = {}

    class Watched(Fake):
        def launch(self, job: Job) -> str:
            seen["launch"] = events(run)
            return super().launch(job)

        def poll(self, job: Job, job_id: str) -> State:
            seen["poll"] = events(run)
            return super().poll(job, job_id)

    of(job_for(run, [PYTHON]), run, Watched())
    assert seen == {"launch": ["intended"], "poll": ["intended", "launched"]}
    assert events(run) == ["intended", "launched", "finished"]


def test_what_failed_is_tried_again_only_on_the_users_word(run: Run) -> None:
    backend, job = Fake(state="lost"), job_for(run, [PYTHON])
    assert of(job, run, backend).failure == "killed"
    backend.jobs.clear()
    assert of(job, run, backend, retry=False).failure == "killed"
    assert backend.launches == 1
    backend.state = "finished"
    assert of(job, run, backend).state == "finished"
    assert backend.launches == 2


def test_a_job_whose_process_died_with_ours_is_launched_again(run: Run) -> None:
    class Gone(Fake):
        def find(self, job: Job) -> str | None:
            return None

        def poll(self, job: Job, job_id: str) -> State:
            return "lost" if job_id == "ft-1" else super().poll(job, job_id)

    backend, job = Gone(), job_for(run, [PYTHON])
    records = Records(run.root)
    records.add("intended", job)
    records.add("launched", job, backend.launch(job))
    assert of(job, run, backend, retry=False).state == "finished"
    assert backend.launches == 2


def test_a_refused_launch_is_recorded_with_its_reason(run: Run) -> None:
    class Refuses(Fake):
        def launch(self, job: Job) -> str:
            raise EndpointError("service", "it refuses.", "Use another.")

    with pytest.raises(EndpointError):
        of(job_for(run, [PYTHON]), run, Refuses())
    last = Records(run.root).all()[-1]
    assert (last.event, last.outcome and last.outcome.what) == ("failed", "it refuses.")


def test_what_was_asked_for_last_goes_by_the_name(run: Run) -> None:
    first = job_for(run, [PYTHON])
    second = job_for(run, [PYTHON, "-c", "1"])
    for asked in (first, second, first, first, second):
        service = Fake()
        of(asked, run, service)
        assert adapters_of(run.root)["arabic"].key == asked.key
    assert events(run).count("intended") == 2
    assert events(run).count("finished") == 4


def test_what_a_training_made_is_made_again_when_it_is_gone(run: Run) -> None:
    backend, job = Fake(), job_for(run, [PYTHON])
    of(job, run, backend)
    Path(job.output).rmdir()
    backend.jobs.clear()
    assert of(job, run, backend).state == "finished"
    assert backend.launches == 2


def test_a_damaged_record_stops_everything(run: Run) -> None:
    of(job_for(run, [PYTHON]), run, Fake())
    (run.root / "training" / "records" / "000002.json").write_text("{")
    with pytest.raises(RunDirError, match=r"000002\.json.*damaged"):
        Records(run.root).all()


def test_one_process_at_a_time_launches(run: Run) -> None:
    with (
        training_lock(run.root),
        pytest.raises(RunDirError, match="another process"),
        training_lock(run.root),
    ):
        pass
    with training_lock(run.root):
        pass


def test_a_moved_run_keeps_its_adapters(run: Run, tmp_path: Path) -> None:
    of(job_for(run, [PYTHON]), run, Fake())
    moved = run.root.rename(tmp_path / "moved")
    adapter = adapters_of(moved)["arabic"]
    assert adapter.folder is not None
    assert adapter.folder.is_relative_to(moved)
    assert adapter_named(moved, adapter.key[:12]) == adapter_named(moved, "arabic") == adapter


# --- real processes


def waits(flag: Path) -> list[str]:
    """A trainer that says it has begun, then trains until it is ended."""
    code = f"import pathlib, time; pathlib.Path({str(flag)!r}).touch(); time.sleep(600)"
    return [PYTHON, "-c", code]


def until(done: Callable[[], bool]) -> None:
    """Return once it is; processes need a moment."""
    ends_s = time.monotonic() + 20
    while not done():
        assert time.monotonic() < ends_s
        time.sleep(0.01)


def test_a_command_gets_what_it_asked_for(run: Run) -> None:
    code = (
        "import json, pathlib, sys; d, o, rest = sys.argv[1:4]; "
        "n = len(pathlib.Path(d, 'train.jsonl').read_text().splitlines()); "
        "pathlib.Path(o, 'model.json').write_text(json.dumps([n, rest]))"
    )
    job = job_for(run, [PYTHON, "-c", code, "{dataset}", "{output}", "{name} {base} {unknown} $HOME; ls"])
    assert of(job, run, SubprocessBackend(COMMAND)).state == "finished"
    made = json.loads((Path(job.output) / "model.json").read_text())
    assert made == [job.rows, "arabic scripted {unknown} $HOME; ls"]
    assert adapters_of(run.root)["arabic"].folder == Path(job.output)


def test_what_stands_for_a_path_is_not_looked_into(finished: Run) -> None:
    job = msgspec.structs.replace(JOB, command=("{dataset}",), dataset="/a/{output}")
    assert arguments_of(job) == ["/a/{output}"]


def test_a_command_that_fails_says_how(run: Run) -> None:
    job = job_for(run, [PYTHON, "-c", "print('no such thing'); raise SystemExit(3)"])
    outcome = of(job, run, SubprocessBackend(COMMAND))
    assert (outcome.state, outcome.failure) == ("failed", "crashed")
    assert "exit code 3" in outcome.what
    assert "no such thing" in (Path(job.output) / "log.txt").read_text()
    with pytest.raises(ConfigError, match="no program"):
        of(job_for(run, ["no-such-trainer-at-all"]), run, SubprocessBackend(COMMAND))


def test_a_killed_training_is_seen_and_can_go_on(run: Run, tmp_path: Path) -> None:
    flag = tmp_path / "begun"
    backend, job = SubprocessBackend(COMMAND), job_for(run, waits(flag))

    def kill(what: str, job: Job, job_id: str) -> None:
        if what == "running" and flag.exists():
            os.killpg(int(job_id), signal.SIGKILL)

    outcome = of(job, run, backend, on_event=kill)
    assert (outcome.state, outcome.failure) == ("failed", "killed")
    assert "again" in outcome.fix
    assert events(run) == ["intended", "launched", "failed"]


def test_a_training_that_the_system_killed_for_memory_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, killed = tmp_path / "begun", list[str]()
    monkeypatch.setattr(subprocess_backend, "_oom_kills", lambda: 3 + len(killed))
    backend, job = SubprocessBackend(COMMAND), job_for(run, waits(flag))

    def kill(what: str, job: Job, job_id: str) -> None:
        if what == "running" and flag.exists() and not killed:
            killed.append(job_id)
            os.killpg(int(job_id), signal.SIGKILL)

    outcome = of(job, run, backend, on_event=kill)
    assert (outcome.state, outcome.failure) == ("failed", "out_of_memory")
    assert "memory ran out" in outcome.what
    assert "training.batch" in outcome.fix


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out_of_memory"),
        (ImportError("libgomp.so: cannot allocate memory in static TLS block"), "not_installed"),
        (ImportError("No module named 'trl'"), "not_installed"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "crashed"),
    ],
)
def test_what_stopped_a_training_is_named(error: Exception, failure: str) -> None:
    found, what, fix = _explained(error)
    assert found == failure
    assert what
    assert fix


def test_a_training_that_outlives_its_launcher_is_found_and_not_doubled(run: Run, tmp_path: Path) -> None:
    flag = tmp_path / "begun"
    job = job_for(run, waits(flag))
    first = SubprocessBackend(COMMAND)
    Records(run.root).add("intended", job)
    job_id = first.launch(job)  # and we are killed before it is recorded
    until(flag.exists)
    second = SubprocessBackend(COMMAND)
    assert second.find(job) == second.launch(job) == job_id
    said: list[str] = []

    def stop(what: str, job: Job, job_id: str) -> None:
        said.append(what)
        if what == "running":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of(job, run, second, on_event=stop)
    assert said == ["found", "running"]
    first._supervisors[job.key].wait(5)
    assert second.poll(job, job_id) == "lost"
    assert second.find(job) is None
    assert events(run) == ["intended", "launched"]


def test_a_training_that_failed_and_takes_its_time_to_leave_is_not_taken_for_one_that_runs(
    run: Run, tmp_path: Path
) -> None:
    flag = tmp_path / "begun"
    job, first, second = job_for(run, waits(flag)), SubprocessBackend(COMMAND), SubprocessBackend(COMMAND)
    first.launch(job)
    until(flag.exists)
    subprocess_backend.save_outcome(job, Outcome(state="failed", failure="crashed", what="it broke."))
    assert second.find(job) is None
    flag.unlink()
    job_id = second.launch(job)
    until(flag.exists)
    assert first._supervisors[job.key].wait(5) is not None
    assert second.find(job) == job_id
    assert second.poll(job, job_id) == "running"
    second.cancel(job, job_id)


def test_a_training_can_be_cancelled(run: Run, tmp_path: Path) -> None:
    flag = tmp_path / "begun"
    backend, job = SubprocessBackend(COMMAND), job_for(run, waits(flag))
    records = Records(run.root)
    records.add("intended", job)
    records.add("launched", job, backend.launch(job))
    until(flag.exists)
    outcome = cancel(records, backend, job)
    assert outcome is not None
    assert backend.poll(job, "") == outcome.state == "cancelled"
    assert events(run)[-1] == "cancelled"
    assert cancel(records, backend, job) is None
    assert of(job, run, backend, retry=False).state == "cancelled"


def test_what_had_ended_before_it_was_cancelled_is_what_it_came_to(run: Run) -> None:
    service, job, records = Fake(), job_for(run, [PYTHON]), Records(run.root)
    records.add("intended", job)
    assert cancel(records, service, job) is None  # the service knows of none
    records.add("launched", job, service.launch(job))
    outcome = cancel(records, service, job)
    assert service.cancelled == ["ft-1"]
    assert outcome is not None
    assert outcome.state == events(run)[-1] == "finished"


def test_one_that_goes_on_all_the_same_is_not_recorded_as_cancelled(run: Run) -> None:
    service, job, records = Fake(state="running"), job_for(run, [PYTHON]), Records(run.root)
    records.add("launched", job, service.launch(job))
    with pytest.raises(TrainingError, match="still runs"):
        cancel(records, service, job)
    assert events(run) == ["launched"]


def test_finetune_cancels_what_goes_on(run: Run, tmp_path: Path, capsys: Any) -> None:
    jobs = [job_for(run, waits(tmp_path / name), name) for name in ("arabic", "korean")]
    backend, records = SubprocessBackend(COMMAND), Records(run.root)
    for job in jobs:
        records.add("launched", job, backend.launch(job))
        until((tmp_path / job.name).exists)
    assert culturepark(["finetune", str(run.root), "--cancel", "--datasets-only"]) == ConfigError.exit_code
    assert culturepark(["finetune", str(run.root), "--cancel", "--backend", "local"]) == 0
    assert capsys.readouterr().out == "No training of these is under way.\n"
    assert culturepark(["finetune", str(run.root), "--cancel", "--culture", "korean"]) == 0
    assert capsys.readouterr().out == "korean: cancelled (command)\n"
    assert [backend.poll(job, "") for job in jobs] == ["running", "cancelled"]
    assert culturepark(["finetune", str(run.root), "--cancel"]) == 0
    assert capsys.readouterr().out == "arabic: cancelled (command)\n"
    assert culturepark(["finetune", str(run.root), "--cancel"]) == 0
    assert capsys.readouterr().out == "No training of these is under way.\n"


# --- what is missing


def test_without_torch_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    job = msgspec.structs.replace(job_for(run, [PYTHON]), backend="local")
    with pytest.raises(ConfigError, match=r"not installed: torch, (?s:.*)culturepark\[train\]"):
        SubprocessBackend(LOCAL).prepare(job)
    assert "torch" in NEEDED


def test_a_missing_base_model_is_named(finished: Run, tmp_path: Path) -> None:
    def at(**room: Any) -> Any:
        training = msgspec.structs.replace(finished.settings.training, **room)
        return msgspec.structs.replace(finished.settings, training=training)

    with pytest.raises(ConfigError, match="served elsewhere"):
        base_of(at())
    with pytest.raises(ConfigError, match=r"no config\.json"):
        base_of(at(base=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weights"):
        base_of(at(base=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = base_of(at(base=str(tmp_path))).digest
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert base_of(at(base=str(tmp_path))).digest != digest


def test_a_checkpoint_that_was_being_written_is_not_gone_on_from(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((9, "{}"), (10, "{}"), (20, '{"global'), (30, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-30").exists()


# --- the command


def test_finetune_trains_each_culture_and_says_where(run: Run, capsys: Any) -> None:
    code = "import pathlib, sys; pathlib.Path(sys.argv[1], 'model').touch()"
    command = json.dumps([PYTHON, "-c", code, "{output}"])
    arguments = ["finetune", str(run.root), "--backend", "command", "--set", f"training.command={command}"]
    arguments += ["--set", "training.poll_s=0.02"]
    assert culturepark(arguments) == 0
    assert set(adapters_of(run.root)) == {"arabic", "korean", "joint"}
    assert "rows" in capsys.readouterr().out
    assert culturepark(arguments) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    assert len(events(run)) == 9


def test_a_culture_without_samples_does_not_keep_the_others_from_training(
    run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sealed(of: Run, name: str, *rest: Any) -> Any:
        if name == "arabic":
            raise TrainingError("dataset of arabic", "it is empty.", "Let the run go on.")
        return seal(of, name, *rest)

    monkeypatch.setattr("culturepark.training.datasets.seal", sealed)
    command = json.dumps(
        [PYTHON, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1], 'm').touch()", "{output}"]
    )
    arguments = ["finetune", str(run.root), "--backend", "command", "--set", f"training.command={command}"]
    arguments += ["--set", "training.poll_s=0.02"]
    assert culturepark(arguments) == TrainingError.exit_code
    assert "dataset of arabic: it is empty." in capsys.readouterr().err
    assert set(adapters_of(run.root)) == {"korean", "joint"}
    assert culturepark([*arguments, "--culture", "arabic"]) == TrainingError.exit_code


def test_a_dataset_that_a_backend_refuses_does_not_keep_the_others_from_training(
    run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = SubprocessBackend.prepare

    def refuse(self: SubprocessBackend, job: Job) -> None:
        if job.name == "arabic":
            raise TrainingError("dataset of arabic", "it has too few rows.", "Generate more.")
        prepare(self, job)

    monkeypatch.setattr(SubprocessBackend, "prepare", refuse)
    command = json.dumps([PYTHON, "-c", ""])
    arguments = ["finetune", str(run.root), "--backend", "command", "--set", f"training.command={command}"]
    assert culturepark([*arguments, "--set", "training.poll_s=0.02"]) == TrainingError.exit_code
    assert "too few rows" in capsys.readouterr().err
    assert set(adapters_of(run.root)) == {"korean", "joint"}


def test_finetune_exits_with_the_trainings_code(run: Run, capsys: Any) -> None:
    command = json.dumps([PYTHON, "-c", "raise SystemExit(1)"])
    arguments = ["finetune", str(run.root), "--backend", "command", "--set", f"training.command={command}"]
    assert culturepark([*arguments, "--culture", "arabic", "--set", "training.poll_s=0.02"]) == 6
    assert "TrainingError: training of arabic" in capsys.readouterr().err


def test_finetune_shows_what_leaked(run: Run, tmp_path: Path, capsys: Any) -> None:
    assert culturepark(["finetune", str(run.root), "--datasets-only", "--culture", "arabic"]) == 0
    folder = next((run.root / "training" / "datasets").iterdir())
    origin = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    statement = next(seed.statement for seed in run.plan.seeds if seed.id == origin["question"])
    exam = tmp_path / "exam.txt"
    exam.write_text(f"{statement}\nSomething else entirely that nobody ever said here.\n")
    capsys.readouterr()
    arguments = ["finetune", str(run.root), "--datasets-only", "--culture", "arabic", "--against", str(exam)]
    assert culturepark(arguments) == 0
    assert "of 2 texts of exam.txt" in capsys.readouterr().out
    report = json.loads((folder / "leakage.json").read_text())
    assert [match["item"] for match in report["matches"] if match["look"] == "exact"] == [statement]
    assert {"held-out questions", "values survey", "moderation (synthetic)"} < set(report["items"])


def test_a_labelled_set_is_read_by_its_task_file(run: Run, tmp_path: Path, capsys: Any) -> None:
    said = run.plan.seeds[0].statement
    (tmp_path / "mine.csv").write_text(
        f'id,body,class\n1,"{said}",a\n2,Nobody says this to anyone at all,b\n'
    )
    (task := tmp_path / "mine.toml").write_text(
        'name = "mine"\nlanguage = "English"\nlicence = "ours"\nprompt = "Which?"\nculture = "arabic"\n'
        'text = "body"\nlabel = "class"\nfile = "mine.csv"\n'
        '[classes]\na = "It is"\nb = "It is not"\n[mapping]\na = "a"\nb = "b"\n'
    )
    arguments = ["finetune", str(run.root), "--datasets-only", "--culture", "arabic"]
    assert culturepark([*arguments, "--labelled", str(task), "--set", "training.held_out=0.01"]) == 0
    report = read_report(next((run.root / "training" / "datasets").iterdir()))
    assert report is not None
    assert report.items["moderation (mine)"] == 2
    capsys.readouterr()
    assert culturepark([*arguments, "--against", str(task)]) == ConfigError.exit_code
    assert "--labelled" in capsys.readouterr().err
    twice = ["--labelled", str(task), "--labelled", str(task)]
    assert culturepark([*arguments, *twice]) == ConfigError.exit_code
    assert "two sets are called moderation (mine)" in capsys.readouterr().err


def test_an_earlier_find_in_another_set_stays(run: Run, tmp_path: Path, capsys: Any) -> None:
    (exam := tmp_path / "exam.txt").write_text("\n".join(seed.statement for seed in run.plan.seeds))
    arguments = ["finetune", str(run.root), "--datasets-only", "--culture", "arabic"]
    assert culturepark([*arguments, "--against", str(exam)]) == 0
    folder = next((run.root / "training" / "datasets").iterdir())
    before = read_report(folder)
    assert culturepark(arguments) == 0
    assert before is not None
    assert before.of("exam.txt", "exact")
    assert read_report(folder) == before
    (folder / REPORT).write_text("{")
    assert read_report(folder) is None


def test_an_embedder_that_fails_leaves_the_search_by_words(
    run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Any, texts: Any) -> Any:
        raise ModelError("connection", "nobody is there")

    monkeypatch.setattr(ScriptedEmbedder, "embed", fail)
    assert culturepark(["finetune", str(run.root), "--datasets-only", "--culture", "arabic"]) == 0
    assert "by words alone" in capsys.readouterr().out
    found = read_report(next((run.root / "training" / "datasets").iterdir()))
    assert found is not None
    assert not found.nearest


def test_status_tells_of_what_leaked(run: Run, tmp_path: Path, capsys: Any) -> None:
    (exam := tmp_path / "exam.txt").write_text("\n".join(seed.statement for seed in run.plan.seeds))
    command = json.dumps([PYTHON, "-c", ""])
    arguments = ["finetune", str(run.root), "--backend", "command", "--set", f"training.command={command}"]
    arguments += ["--set", "training.poll_s=0.02", "--culture", "arabic"]
    assert culturepark([*arguments, "--against", str(exam)]) == 0
    capsys.readouterr()
    assert culturepark(["status", str(run.root)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tuning of arabic: finished" in said
    assert "of evaluation texts in its rows" in said


def test_training_modules_load_without_heavy_libraries() -> None:
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'openai', 'ray'}"
    modules = "adapters, backends, base, datasets, gguf_lora, jobs, leakage, lora, openai_jobs"
    imports = f"import sys; from culturepark.training import {modules}, subprocess_backend"
    code = f"{imports}; print({heavy} & set(sys.modules))"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("funnel", "is_due"),
    [
        ({"finished": 4, "kept": 2}, True),
        ({"finished": 3, "failed": 1, "kept": 1}, True),
        ({"finished": 3, "kept": 9}, False),
        ({"finished": 4}, False),
        ({}, False),
    ],
)
def test_a_culture_is_due_once_all_its_dialogues_ended_and_something_was_kept(
    funnel: dict[str, int], is_due: bool
) -> None:
    other = {"finished": 1, "kept": 1}
    assert (
        trainable_cultures({"arabic": funnel, "korean": other}, {"arabic": 4, "korean": 2})
        == ["arabic"] * is_due
    )


@pytest.mark.parametrize(
    ("known", "bf16"),
    [({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_products_are_in_bfloat16_where_a_cpu_does_so_itself(known: dict[str, bool], bf16: bool) -> None:
    cpu = SimpleNamespace(get_capabilities=lambda: known)
    assert multiplies_bf16(SimpleNamespace(cpu=cpu), gpu=False) == bf16
    assert not multiplies_bf16(SimpleNamespace(cpu=SimpleNamespace()), gpu=False)  # an older torch


def test_a_gpu_that_only_emulates_bfloat16_multiplies_as_before() -> None:
    cuda = SimpleNamespace(is_bf16_supported=lambda including_emulation: including_emulation)
    assert not multiplies_bf16(SimpleNamespace(cuda=cuda), gpu=True)


def test_a_batch_that_workers_cannot_share_is_refused() -> None:
    raw = {"models": {"chat": {"engine": "embedded"}}, "roles": {"speaker": "chat", "embedder": "chat"}}
    training = {"backend": "ray-train", "batch": 8, "workers": 2}
    assert decode_settings(raw | {"training": training}, "here").training.workers == 2
    with pytest.raises(ConfigError, match="8 rows cannot be shared out among 3 workers"):
        decode_settings(raw | {"training": training | {"workers": 3}}, "here")


def test_losses_are_told_as_means_of_the_first_and_the_last_quarter() -> None:
    losses = tuple((step + 1, loss) for step, loss in enumerate((4.0, 2.0, 9.0, 9.0, 9.0, 9.0, 1.0, 2.0)))
    assert Outcome(state="finished", losses=losses).fall == (3.0, 1.5)
    assert Outcome(state="finished", losses=losses[:1]).fall == (4.0, 4.0)
    assert Outcome(state="failed").fall is None
