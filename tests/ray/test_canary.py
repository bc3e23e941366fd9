"""A key that may be found nowhere, and an endpoint that puts it into everything it says."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from tests import runs
from tests.endpoint import ScriptedEndpoint
from tests.ray.conftest import children_named, summary, wait_for
from tests.ray.test_generate import assert_whole
from tests.torture import models_at

PLAN = (
    'plan.questions=["wvs7-q28"]',
    'plan.cultures=["arabic", "korean"]',
    "plan.dialogues_per_question=4",
    "plan.utterances=4",
    "limits.retries=6",
    "limits.backoff_s=0.05",
)
_PIECE = 12
"""Letters in a row by which a part of the key is known."""


class Parrot(ScriptedEndpoint):
    """Echoes the key it was shown: in errors of all kinds, in headers, in replies and what describes them."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = ""
        self.said = 0
        self.refuses = False
        self.fails = 0
        self.listed: dict[str, Any] | web.Response | None = None

    async def _answer(self, request: web.Request) -> web.Response:
        self.shown = shown = request.headers["Authorization"].removeprefix("Bearer ")
        headers = {"X-Request-Id": shown, "Retry-After": shown, "Set-Cookie": f"key={shown}", "Server": shown}
        if request.path.endswith("/models") and self.listed is not None:
            return web.json_response(self.listed)
        if self.fails:
            words = {"error": {"message": f"{shown}, that is \u200b{shown[:20]}\u200b{shown[20:]}"}}
            return web.json_response(words, status=self.fails, headers=headers)
        if self.refuses and request.method == "POST":
            words = {"error": {"message": f"Incorrect API key provided: {shown}."}}
            return web.json_response(words, status=401, headers=headers)
        self.said += 1
        if self.said % 5 == 0:
            return web.json_response({"error": {"message": f"Bearer {shown}"}}, status=500, headers=headers)
        if self.said % 7 == 0:
            return web.Response(text=f"<html>{shown * 9}", status=429, headers=headers)
        if self.said % 11 == 0:
            return web.Response(text=f'{{"{shown}": {shown}', headers=headers)
        return await super()._answer(request)

    async def _reply(self, body: Any) -> dict[str, Any]:
        reply = await super()._reply(body)
        reply["model"] = f"mock {self.shown}"
        for choice in reply.get("choices", []):
            message = choice["message"]
            choice["finish_reason"] = f"stop {self.shown}"
            if not message["content"].startswith(("{", "[")):
                halves = self.shown[:20], self.shown[20:]
                message["content"] += (
                    f" My key is {self.shown}. It is \u200b{halves[0]}\u200b{halves[1]}, I say."
                )
            else:
                message["content"] = msgspec.json.encode(
                    _echoing(msgspec.json.decode(message["content"]), self.shown)
                ).decode()
        return reply


def _echoing(said: Any, key: str) -> Any:
    """The same JSON with the key at the end of its longer texts."""
    if isinstance(said, dict):
        return {name: _echoing(value, key) for name, value in said.items()}
    if isinstance(said, list):
        return [_echoing(value, key) for value in said]
    return f"{said} {key}" if isinstance(said, str) and " " in said else said


@pytest.fixture
def parrot() -> Iterator[ScriptedEndpoint]:
    """The endpoint."""
    with Parrot().serving() as endpoint:
        yield endpoint


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """A key in the environment, as most people have theirs."""
    made = f"sk-{secrets.token_hex(24)}"
    monkeypatch.setenv("OPENAI_API_KEY", made)
    return made


def shows(data: bytes, key: str) -> bool:
    """Whether a piece of the key is in it."""
    return any(key[at : at + _PIECE].encode() in data for at in range(len(key) - _PIECE + 1))


def assert_nowhere(key: str, *folders: Path) -> int:
    """The key is in no file below these folders, nor in a name; returns how many were looked at."""
    looked = 0
    for folder in folders:
        for path in folder.rglob("*"):
            assert not shows(str(path).encode(), key), path
            if path.is_file() and not path.is_symlink():
                looked += 1
                assert not shows(path.read_bytes(), key), path
    return looked


def assert_not_in_process_list(key: str, driver: int) -> None:
    """No process of a run shows the key in its arguments."""
    pids = [driver, *children_named(driver, "")]
    lines = [Path(f"/proc/{pid}/cmdline") for pid in pids]
    found = [line.read_bytes() for line in lines if line.exists()]
    assert len(found) > 5
    assert not any(shows(line, key) for line in found)


def homes() -> set[Path]:
    """Where private sessions of Ray keep their files."""
    return set(Path(tempfile.gettempdir()).glob("culturepark-ray-*"))


def test_a_run_shows_its_key_nowhere(tmp_path: Path, generate: Any, parrot: Parrot, key: str) -> None:
    out, before = tmp_path / "run", homes()
    parrot.latency_s = 0.2
    run = generate(out, *PLAN, *models_at(parrot))
    wait_for(lambda: parrot.said > 60 or run.process.poll() is not None, "calls")
    assert run.process.poll() is None, run.wait()[1]
    assert parrot.shown == key
    assert_not_in_process_list(key, run.process.pid)
    (home,) = homes() - before
    assert_nowhere(key, home, out)
    for actor in children_named(run.process.pid, "ray::RefinerActor"):
        os.kill(actor, signal.SIGTERM)  # which Ray answers with stack traces in its logs
    said = parrot.said
    wait_for(lambda: parrot.said > said + 10 or run.process.poll() is not None, "more calls")
    run.process.send_signal(signal.SIGKILL)
    _, printed = run.wait(60)
    assert not shows(printed.encode(), key)
    assert assert_nowhere(key, home) > 20  # it is left behind, logs and all

    parrot.latency_s, parrot.refuses = 0.0, True
    code, printed = generate(out, *PLAN, *models_at(parrot)).wait()
    assert code == 3, printed
    assert "Incorrect API key provided: [key]" in printed
    assert not shows(printed.encode(), key)
    assert_nowhere(key, out)

    parrot.refuses = False
    code, printed = generate(out, *PLAN, *models_at(parrot)).wait()
    assert code == 0, printed
    assert not shows(printed.encode(), key)
    assert_whole(out)
    assert summary(out)["total"]["kept"]
    assert assert_nowhere(key, out) > 20
    written = b"".join(path.read_bytes() for path in (out / "logs").iterdir())
    assert written.count(b"call_retried") > 5


@pytest.mark.parametrize("command", ["generate", "doctor"])
def test_no_command_prints_a_key_that_is_echoed(
    tmp_path: Path, parrot: Parrot, key: str, command: str
) -> None:
    parrot.listed = {"data": [{"id": f"mock-{key}"}]}
    sets = [arg for one in models_at(parrot) for arg in ("--set", one)]
    where = ["--out", str(tmp_path / "run")] if command == "generate" else []
    done = subprocess.run(
        [sys.executable, "-m", "culturepark", command, *where, *sets, "--debug"],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode
    assert b"[key]" in done.stdout + done.stderr
    assert not shows(done.stdout + done.stderr, key)


def run_command(*arguments: str) -> tuple[int, bytes]:
    """Exit code and all that was printed by a command that needs no Ray."""
    done = subprocess.run(
        [sys.executable, "-m", "culturepark", *arguments, "--debug"],
        capture_output=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("fails", [0, 400, 401, 403, 500])
def test_an_evaluation_shows_its_key_nowhere(tmp_path: Path, parrot: Parrot, key: str, fails: int) -> None:
    parrot.fails = fails
    out = tmp_path / "evaluation"
    asked = ("--task", "opinions", "--culture", "korean", "--question", "wvs7-q33", "--draws", "2")
    code, printed = run_command("evaluate", parrot.url, "--model", "mock", *asked, "--out", str(out))
    assert parrot.shown == key
    assert not shows(printed, key)
    assert code == (3 if fails else 0), printed.decode()
    assert (b"[key]" in printed) == bool(fails)
    assert assert_nowhere(key, out)
    assert (out / "report.json").exists() == (not fails)


@pytest.mark.parametrize("fails", [400, 401, 403, 404, 500])
def test_a_tuning_job_shows_its_key_nowhere(tmp_path: Path, parrot: Parrot, key: str, fails: int) -> None:
    parrot.fails = fails
    run = runs.made(tmp_path / "run", plan={"dialogues_per_question": 16}, refine={"clusters": 0})
    sets = ('training.model="tuned"', 'models.tuned.engine="openai"', 'models.tuned.model="base"')
    sets += (f'models.tuned.base_urls=["{parrot.url}"]',)
    code, printed = run_command(
        "finetune", str(run.root), "--culture", "arabic", "--backend", "openai",
        *(arg for one in sets for arg in ("--set", one)),
    )  # fmt: skip
    assert parrot.shown == key
    assert code == 3, printed.decode()
    assert not shows(printed, key)
    assert (b"[key]" in printed) == (fails != 401)  # of that one it says nothing
    assert assert_nowhere(key, run.root) > 5
