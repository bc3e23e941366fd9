"""Ctrl-C between a run's end and its process's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, pathlib, signal, sys, time
from actors.driver import _Signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
signals = _Signals(pathlib.Path(sys.argv[1]))
if sys.argv[2] == "asked":
    os.kill(os.getpid(), signal.SIGINT)
signals.restore()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(5)
"""


@pytest.mark.parametrize(("how", "code"), [("asked", 130), ("not", 1)])
def test_a_second_ctrl_c_ends_the_process_also_when_the_first_was_obeyed(
    tmp_path: Path, how: str, code: int
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code
    assert ("Traceback" in ended.stderr) == (how == "not")
