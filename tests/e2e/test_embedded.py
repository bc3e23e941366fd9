"""The main job on the real embedded model, as the README says it, read with the libraries people use."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from culturepark.cli.views.dialogue import REASONS
from culturepark.store.rows import DIALOGUES, OPINIONS
from tests.ray.conftest import Generate, children_named, rows, summary, wait_for
from tests.ray.test_generate import assert_whole


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two cultures, one dialogue of each kind, six turns."""
    out = tmp_path_factory.mktemp("embedded") / "run"
    overrides = ('plan.cultures=["arabic", "korean"]', "plan.utterances=6")
    code, printed = Generate(out, *overrides).wait(600)
    assert code == 0, printed
    return out, printed


def test_counts_add_up(run: tuple[Path, str]) -> None:
    total = summary(run[0])
    assert total["complete"]
    assert not total["problems"]
    for culture in total["cultures"].values():
        assert culture["finished"] == culture["planned"] == 2
        assert culture["extracted"] == culture["kept"] + culture["rejected"]
        assert culture["kept"] > 0


def test_speakers_take_turns_and_delegates_speak_for_their_stance(run: tuple[Path, str]) -> None:
    for row in rows(run[0], "dialogues"):
        assert [turn["number"] for turn in row["turns"]] == [1, 2, 3, 4, 5, 6]
        assert [turn["speaker"] for turn in row["turns"]] == [0, 1, 0, 1, 0, 1]
        assert all(len(turn["text"].split()) >= 3 for turn in row["turns"])
        assert all("SmolLM2" in turn["model"] for turn in row["turns"])
    opinions = [row for kind in ("samples", "rejected") for row in rows(run[0], kind)]
    for culture in ("arabic", "korean"):
        assert "entails" in [row["first_verdict"] for row in opinions if row["culture"] == culture]
    # What a real model says differs from machine to machine: one culture's few opinions may all agree.
    assert len({row["first_verdict"] for row in opinions} - {None}) > 1


def test_samples_carry_their_provenance(run: tuple[Path, str]) -> None:
    by_id = {row["id"]: row for row in rows(run[0], "dialogues")}
    for row in rows(run[0], "samples"):
        turn = by_id[row["dialogue_id"]]["turns"][row["turn"] - 1]
        assert turn["text"][row["start"] : row["end"]] == row["extracted"]
        assert row["verdict"] in ("entails", "novel")
        assert 0 < row["persona"]["stance_share"] <= 1
        assert row["n_valid"] > 1000
        assert "SmolLM2" in row["speaker_model"]
        assert len(row["embedding"]) == 384
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]


def test_shards_have_the_one_schema_and_load_with_datasets(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    for kind, schema in (("dialogues", DIALOGUES), ("samples", OPINIONS), ("rejected", OPINIONS)):
        for path in summary(run[0])["shards"][kind]:
            assert pq.read_schema(run[0] / path).equals(schema)
        loaded: Any = datasets.load_dataset(
            "parquet", data_files=str(run[0] / kind / "*.parquet"), split="train", cache_dir=str(tmp_path)
        )
        assert loaded.num_rows == len(rows(run[0], kind))
    chat: Any = datasets.load_dataset(
        "json",
        data_files=str(run[0] / "datasets" / "*" / "chat.jsonl"),
        split="train",
        cache_dir=str(tmp_path),
    )
    assert chat.num_rows == summary(run[0])["total"]["kept"]


def test_what_a_newcomer_sees(run: tuple[Path, str]) -> None:
    out, printed = run
    assert "Traceback" not in printed
    assert any(row["id"] in printed for row in rows(out, "dialogues"))
    assert any(row["id"][:9] in printed for row in rows(out, "samples"))
    for word in ("finished", "opinions", "kept", "entails", out.name):
        assert word in printed
    for reason in summary(out)["total"]["rejections"]:
        assert REASONS[reason] in printed


def test_the_engine_is_killed_and_started_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    started = Generate(out, 'plan.cultures=["turkish"]', "plan.utterances=8", "limits.backoff_s=0.5")
    wait_for(lambda: children_named(started.process.pid, "ray::ChatEngine"), "the engine")
    wait_for(lambda: any((out / "log").glob("*.wal")), "the run's log")
    for name in ("ray::ChatEngine", "ray::EmbeddingEngine"):
        for pid in children_named(started.process.pid, name):
            os.kill(pid, signal.SIGKILL)
    code, printed = started.wait(300)
    assert code == 0, printed
    assert summary(out)["total"]["finished"] == summary(out)["total"]["planned"] == 2
    retried = (out / "logs" / "agent-turkish-0.jsonl").read_text()
    assert "call_retried" in retried


@pytest.mark.parametrize("weights", [b"GGUF", b"GGUF" + bytes(4096)])
def test_weights_that_cannot_be_read_end_the_run_in_words(tmp_path: Path, weights: bytes) -> None:
    (tmp_path / "own.gguf").write_bytes(weights)
    own = f'models.chat.path="{tmp_path / "own.gguf"}"'
    code, printed = Generate(tmp_path / "run", 'plan.cultures=["turkish"]', own).wait(120)
    assert code == 3, printed
    assert "engine did not start" in printed
    assert "Internal error" not in printed


def test_an_engine_that_cannot_start_again_ends_the_run_in_words(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = Generate(out, 'plan.cultures=["turkish"]', "plan.utterances=8")
    wait_for(lambda: any((out / "log").glob("*.wal")), "the run's log")
    wait_for(lambda: chat_ports(out), "its engine's address")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for pid in children_named(run.process.pid, "ray::ChatEngine"):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: bound(taken, chat_ports(out)[0]), "the port that it left")
        taken.listen()
        code, printed = run.wait(120)
    assert code == 3, printed
    assert "engine did not start" in printed
    code, printed = Generate(out, 'plan.cultures=["turkish"]', "plan.utterances=8").wait(300)
    assert code == 0, printed
    assert summary(out)["total"]["finished"] == 2


def chat_ports(out: Path) -> list[int]:
    """The ports of the engine's servers, once the run says them."""
    endpoints = json.loads((out / "status.json").read_bytes()).get("endpoints", [])
    return [int(one["url"].split(":")[2].split("/")[0]) for one in endpoints if "SmolLM2" in one["model"]]


def bound(sock: socket.socket, port: int) -> bool:
    """Whether this port is now the socket's."""
    with contextlib.suppress(OSError):
        sock.bind(("127.0.0.1", port))
        return True
    return False


def test_ctrl_c_while_engines_start_loses_nothing(tmp_path: Path) -> None:
    run = Generate(tmp_path / "run", 'plan.cultures=["turkish"]', "plan.utterances=2")
    wait_for(lambda: children_named(run.process.pid, "ray::IDLE"), "Ray")
    os.killpg(run.process.pid, signal.SIGINT)
    code, printed = run.wait(120)
    assert code == 5, printed
    assert "Traceback" not in printed
    code, printed = Generate(tmp_path / "run", 'plan.cultures=["turkish"]', "plan.utterances=2").wait(300)
    assert code == 0, printed
    assert summary(tmp_path / "run")["total"]["finished"] == 2


def test_engines_are_killed_again_and_again_and_once_the_driver(tmp_path: Path) -> None:
    """A real model never says the same twice, so no rows are compared: each dialogue is there once, whole."""
    out = tmp_path / "run"
    command = (
        'plan.cultures=["turkish", "korean"]',
        "plan.utterances=6",
        "plan.dialogues_per_question=2",
        "limits.backoff_s=0.2",
        "limits.retries=8",
    )
    run = Generate(out, *command)
    dead: set[int] = set()
    for victim in ("Chat", "Embedding", "Chat", "driver", "Embedding", "Chat", "Embedding", "Chat"):
        engines = engines_of(run, "Chat" if victim == "driver" else victim, dead)
        more_is_said(run, out)
        if victim == "driver":
            run.kill()
            run = Generate(out, *command)
            continue
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        dead |= engines
    code, printed = run.wait(300)
    assert code == 0, printed
    assert len(dead) >= 7
    assert_whole(out)
    assert summary(out)["total"]["finished"] == summary(out)["total"]["planned"] == 4
    for row in rows(out, "dialogues"):
        assert [turn["number"] for turn in row["turns"]] == [1, 2, 3, 4, 5, 6]


def engines_of(run: Generate, kind: str, dead: set[int]) -> set[int]:
    """The processes of a kind of engine, once there are any that are not dead."""

    def found() -> set[int]:
        return set(children_named(run.process.pid, f"ray::{kind}Engine")) - dead

    wait_for(found, f"{kind}Engine")
    return found()


def more_is_said(run: Generate, out: Path) -> None:
    """Wait until another turn or call is on disk; the run must not be over then."""

    def on_disk() -> int:
        return sum(path.stat().st_size for path in (out / "log").glob("*.wal"))

    before = on_disk()
    wait_for(lambda: on_disk() > before or run.process.poll() is not None, "another turn or call")
    assert run.process.poll() is None, run.wait()[1]
