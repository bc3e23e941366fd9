"""What an earlier version wrote (tests/data/runs) is still read, and resumed only under its own prompts."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from culturepark.cultures import load_cultures
from culturepark.errors import RunDirError
from culturepark.monitor.status import STATUS_FILE, Status
from culturepark.plan import Plan
from culturepark.seeds import load_seeds
from culturepark.settings_load import load_settings
from culturepark.store import rundir
from culturepark.store.audit import check_run
from culturepark.store.rundir import open_run
from culturepark.store.view import View

RUNS = Path(__file__).parents[1] / "data" / "runs"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Both runs, to be written to."""
    return Path(shutil.copytree(RUNS, tmp_path / "runs"))


@pytest.mark.parametrize("run", ["finished", "cut-short"])
def test_the_fields_of_a_status_keep_their_names(run: str) -> None:
    data = (RUNS / run / STATUS_FILE).read_bytes()
    again = msgspec.json.encode(msgspec.json.decode(data, type=Status))
    assert msgspec.json.decode(again) == msgspec.json.decode(data)


def test_a_finished_run_reads(old: Path) -> None:
    view = View(old / "finished")
    assert view.complete
    assert (view.total["finished"], view.total["extracted"], view.total["kept"]) == (4, 25, 17)
    (sample,) = view.samples(1)
    whole = view.opinion(sample["id"])
    dialogue = view.dialogue(whole["dialogue_id"])
    turn = dialogue["turns"][whole["turn"] - 1]
    assert turn["text"][whole["start"] : whole["end"]]
    assert sample["id"] in {row["id"] for row in view.opinions_of(dialogue)}


def test_a_run_that_was_cut_short_reads(old: Path) -> None:
    view = View(old / "cut-short")
    assert not view.complete
    assert (view.ended, view.total["waiting"], view.total["kept"]) == (5, 5, 20)


@pytest.mark.parametrize(("name", "complete"), [("finished", True), ("cut-short", False)])
def test_every_file_and_count_is_as_it_should_be(old: Path, name: str, complete: bool) -> None:
    report = check_run(old / name)
    assert report.problems == []
    assert report.complete == complete


def test_once_prompts_change_a_run_is_not_resumed_and_still_read(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "PROMPT_VERSION", "of tomorrow")
    settings = load_settings(old / "cut-short.toml", ())
    plan = Plan(settings, load_seeds(settings.plan.seeds), load_cultures())
    with pytest.raises(RunDirError, match="with prompts 2") as refused:
        open_run(old / "cut-short", settings, plan)
    assert refused.value.where == str(old / "cut-short")
    assert View(old / "finished").total["kept"] == 17
