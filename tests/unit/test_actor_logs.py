"""Logs of actors: one JSON object a line, and a full disk costs nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from actors.run_context import open_logger


def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "agent.jsonl").symlink_to("/dev/full")
    log = open_logger(tmp_path, "agent")
    log.info("dialogue_refined", dialogue="d1")
    log.warning("turn_failed", reason="ü\ud800")


def test_a_line_of_a_log_is_one_json_object(tmp_path: Path) -> None:
    log = open_logger(tmp_path, "agent")
    log.info("dialogue_refined", dialogue="d1", said="für\n\x1b[31m")
    (line,) = (tmp_path / "logs" / "agent.jsonl").read_bytes().splitlines()
    assert line.isascii()
    assert json.loads(line)["said"] == "für\n\x1b[31m"
