"""A run that an earlier version began and that was killed (tests/data/runs) goes on to its end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from culturepark import __version__
from culturepark.store.rundir import load_run
from culturepark.versions import PROMPT_VERSION
from tests.ray.conftest import summary
from tests.ray.test_generate import assert_whole, content

RUNS = Path(__file__).parents[1] / "data" / "runs"
ENDED = 5
"""Dialogues of the run that had ended when it was killed."""


def test_a_run_of_an_earlier_version_goes_on_or_is_refused_by_name(tmp_path: Path, generate: Any) -> None:
    old = Path(shutil.copytree(RUNS / "cut-short", tmp_path / "old"))
    config = str(RUNS / "cut-short.toml")
    before = load_run(old).file
    sealed = {path.name: path.read_bytes() for path in (old / "samples").iterdir()}
    code, printed = generate(old, config=config).wait()
    if (before.code_version, before.prompt_version) != (__version__, PROMPT_VERSION):
        assert code == 4, printed
        assert f"version {before.code_version} with prompts {before.prompt_version}" in " ".join(
            printed.split()
        )
        return
    assert code == 0, printed
    assert f"{ENDED} of 8 done" in printed
    assert_whole(old)
    assert summary(old)["total"]["finished"] == 8
    assert {name: (old / "samples" / name).read_bytes() for name in sealed} == sealed
    code, printed = generate(tmp_path / "new", config=config).wait()
    assert code == 0, printed
    for kind in ("dialogues", "samples", "rejected"):
        assert content(old, kind) == content(tmp_path / "new", kind)
