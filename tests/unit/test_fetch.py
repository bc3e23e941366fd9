"""`culturepark embedded fetch` against a local stand-in for the model hub, with the hub's real client."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

WEIGHTS = b"GGUF" + bytes(range(256)) * 40


class Hub(BaseHTTPRequestHandler):
    """One repository with one file."""

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, body: bool) -> None:
        if self.path.split("?")[0] != "/owner/name/resolve/main/file.gguf":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(WEIGHTS).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(WEIGHTS)))
        self.end_headers()
        if body:
            self.wfile.write(WEIGHTS)


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(tmp_path: Path, hub: str, file: str) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "own.toml"
    config.write_text(
        f'[models.chat]\nengine = "embedded"\nhub = "owner/name:{file}"\n'
        '[models.e]\nengine = "embedded"\n[roles]\nspeaker = "chat"\nembedder = "e"\n',
        "utf-8",
    )
    env = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")
    }
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "culturepark", "embedded", "fetch", str(config)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def test_a_file_is_fetched_to_where_runs_look_for_it(tmp_path: Path, hub: str) -> None:
    done = fetch(tmp_path, hub, "file.gguf")
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "cache" / "culturepark" / "gguf").glob("*/*.gguf")
    assert found.read_bytes() == WEIGHTS


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path: Path, hub: str) -> None:
    done = fetch(tmp_path, hub, "other.gguf")
    assert done.returncode == 2
    assert "other.gguf" in done.stderr
    assert "Traceback" not in done.stderr
