"""A run directory is begun whole or not at all, whatever the power does while it is made."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from culturepark.errors import RunDirError
from culturepark.settings import Settings
from culturepark.store.files import PART, write_view
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.rundir import load_run, open_run
from tests import builders
from tests.faults import Crash, FaultyFiles

FILES = ("run.json", "seeds.jsonl", "cultures.json")


def settings_of() -> Settings:
    return builders.settings(plan={"cultures": ["arabic", "korean"], "questions": list(builders.THREE)})


def ends(files: FaultyFiles, seed: int, power: bool, keep: float) -> None:
    if power:
        files.power_loss(Random(seed), keep, holes=bool(seed % 2))
    else:
        files.kill()


@pytest.mark.parametrize(("power", "keep"), [(False, 1.0), (True, 0.0), (True, 0.5), (True, 1.0)])
def test_a_run_is_begun_whole_or_not_at_all(tmp_path: Path, power: bool, keep: float) -> None:
    """It ends before each operation of the disk, and again while it is begun a second time."""
    of = settings_of()
    plan = builders.plan(of)
    open_run(tmp_path / "whole", of, plan)
    whole = load_run(tmp_path / "whole")
    content = {name: (whole.root / name).read_bytes() for name in FILES}
    steps, crashed, found = 0, True, set[bool]()
    while crashed:
        base = tmp_path / f"step-{steps}"
        base.mkdir()
        root = base / "deep" / "run"
        files = FaultyFiles(base)
        files.crash_at(steps)
        try:
            open_run(root, of, plan, files)
            crashed = False
        except Crash:
            pass
        ends(files, steps, power, keep)
        found.add(begun := (root / "run.json").exists())
        if begun:
            assert load_run(root).file == whole.file
            assert {name: (root / name).read_bytes() for name in FILES} == content
        else:
            assert crashed  # what was returned as a run is there
            with pytest.raises(RunDirError, match="no run directory"):
                load_run(root)
        files.crash_at(steps % 7)
        try:
            open_run(root, of, plan, files)
        except Crash:
            ends(files, steps, power, keep)
        files.kill()
        assert open_run(root, of, plan, files).plan.fingerprint == plan.fingerprint
        ends(files, steps, power, keep)
        assert {name: (root / name).read_bytes() for name in FILES} == content
        assert load_run(root).file == whole.file
        others = {path.name for path in root.iterdir()} - {*FILES}
        assert all(name.endswith(PART) for name in others), others
        steps += 1
    assert found == {True, False}
    assert steps > 20


def test_a_status_that_is_being_written_while_a_ledger_is_opened_is_let_alone(tmp_path: Path) -> None:
    of = settings_of()
    run = open_run(tmp_path / "run", of, builders.plan(of))
    files = FaultyFiles(run.root)
    files.crash_at(3)  # all is written, and not renamed yet
    with pytest.raises(Crash):
        write_view(run.root / "status.json", b"{}", files)
    files.kill()
    before = {path.name for path in run.root.iterdir()}
    with RunLock.acquire(run.root) as lock:
        assert Ledger(run, lock).report.set_aside == ()
    assert before - {path.name for path in run.root.iterdir()} == set()
    write_view(run.root / "status.json", b"{}")
    assert {path.name for path in run.root.glob("*status*")} == {"status.json"}
