"""The main job with real actors and a scripted model: whole, resumed, killed, interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from culturepark.paths import config_dir
from tests.ray.conftest import SCRIPTED, children_named, rows, summary, wait_for

QUESTIONS = 'plan.questions=["wvs7-q28", "wvs7-q36", "wvs7-q125"]'
"""The second was never asked of the Arabic culture, the third never of the Chinese."""
PLAN = (
    *SCRIPTED,
    QUESTIONS,
    'plan.cultures=["arabic", "chinese", "turkish"]',
    "plan.dialogues_per_question=10",
)
TIMING = {"started_s", "ended_s", "run_id"}


def content(out: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of a kind in plan order, without what a clock decided."""
    found = [{k: v for k, v in row.items() if k not in TIMING} for row in rows(out, kind)]
    for row in found:
        for turn in row.get("turns", []):
            turn.pop("latency_s")
    return sorted(found, key=lambda row: (row["number"], row["id"]))


def assert_whole(out: Path) -> None:
    total = summary(out)
    assert total["complete"]
    assert not total["problems"]
    for culture in total["cultures"].values():
        assert culture["planned"] == culture["finished"] + culture["failed"] > 0
        assert culture["extracted"] == culture["kept"] + culture["rejected"]
    assert total["total"]["kept"] > 0
    ids = Counter(row["id"] for row in rows(out, "dialogues"))
    assert len(ids) == total["total"]["planned"]
    assert set(ids.values()) == {1}
    opinions = Counter(row["id"] for kind in ("samples", "rejected") for row in rows(out, kind))
    assert set(opinions.values()) == {1}
    assert sum(opinions.values()) == total["total"]["extracted"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    from tests.ray.conftest import Generate

    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, printed = Generate(out, *PLAN).wait()
    assert code == 0, printed
    return out


def test_a_run_is_whole_and_never_asked_questions_stay_unasked(undisturbed: Path) -> None:
    assert_whole(undisturbed)
    asked = {(row["culture"], row["seed_id"]) for row in rows(undisturbed, "dialogues")}
    assert ("arabic", "wvs7-q36") not in asked
    assert ("chinese", "wvs7-q125") not in asked
    assert {"culture": "arabic", "seed_id": "wvs7-q36"} in summary(undisturbed)["unasked"]


def test_a_finished_run_is_left_alone(undisturbed: Path, generate: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.parquet")}
    code, printed = generate(undisturbed, *PLAN).wait()
    assert code == 0, printed
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.parquet")} == before


@pytest.mark.parametrize("victim", ["driver", "ray::CulturalAgent", "ray::RefinerActor", "ray::Collector"])
def test_what_is_killed_in_the_middle_is_whole_after_resume(
    undisturbed: Path, tmp_path: Path, generate: Any, victim: str
) -> None:
    """The scripted model is deterministic, so the result must be that of an undisturbed run."""
    out = tmp_path / "run"
    overrides = (*PLAN, "limits.dialogues_in_flight=12")
    # The model's name is part of the run's identity, so the slow run is compared by content.
    slow = 'models.chat.model="latency_ms=60"'
    run = generate(out, *overrides, slow)
    wait_for(lambda: any((out / "log").glob("*.wal")), "a log")
    wait_for(
        lambda: sum(p.stat().st_size for p in (out / "log").glob("*.wal")) > 100_000, "records in the log"
    )
    if victim == "driver":
        run.kill()
        run = generate(out, *overrides, slow)
    else:
        wait_for(lambda: children_named(run.process.pid, victim), victim)
        os.kill(children_named(run.process.pid, victim)[0], signal.SIGKILL)
    code, printed = run.wait()
    assert code == 0, printed
    assert_whole(out)
    for kind in ("dialogues", "samples", "rejected"):
        assert content(out, kind) == content(undisturbed, kind)


def test_the_moderator_is_killed_and_the_run_goes_on(tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    run = generate(out, *PLAN, 'models.chat.model="latency_ms=60"')
    wait_for(
        lambda: sum(p.stat().st_size for p in (out / "log").glob("*.wal")) > 20_000, "outcomes in the log"
    )
    (moderator,) = children_named(run.process.pid, "ray::Moderator")
    os.kill(moderator, signal.SIGKILL)
    code, printed = run.wait()
    assert code == 0, printed
    assert_whole(out)


_SMALL_DISK = """
mount -t tmpfs -o size=500k tmpfs "$0" || exit 77
"$@"; [ $? = 4 ] || exit 1
mount -o remount,size=64m "$0"
"$@" && cp -r "$0/run" "$0-kept"
"""


def test_a_disk_that_is_full_stops_the_run_and_once_there_is_space_it_goes_on(
    undisturbed: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    overrides = PLAN
    generate = [sys.executable, "-m", "culturepark", "generate", "--out", str(disk / "run")]
    generate += [word for one in overrides for word in ("--set", one)]
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    shell = ["unshare", "--mount", *as_root, "sh", "-c", _SMALL_DISK, str(disk)]
    try:
        done = subprocess.run([*shell, *generate], capture_output=True, text=True, timeout=240, check=False)
    except FileNotFoundError:
        pytest.skip("this system has no `unshare`")
    if done.returncode in (1, 77) and "mount" in done.stderr:
        pytest.skip("this user may mount nothing")
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert printed.count("the disk is full") == 1
    assert "Traceback" not in printed
    kept = tmp_path / "disk-kept"
    assert_whole(kept)
    assert content(kept, "samples") == content(undisturbed, "samples")


def test_how_many_actors_there_are_changes_no_row(undisturbed: Path, tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    more = ("actors.agents_per_culture=2", "actors.refiners=3")
    code, printed = generate(out, *PLAN, *more).wait()
    assert code == 0, printed
    for kind in ("dialogues", "samples", "rejected"):
        assert content(out, kind) == content(undisturbed, kind)


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_a_stop_drains_and_seals_and_the_run_can_be_resumed(how: str, tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    overrides = (
        *PLAN,
        "limits.dialogues_in_flight=6",
        'models.chat.model="latency_ms=40"',
    )
    run = generate(out, *overrides)
    wait_for(
        lambda: sum(p.stat().st_size for p in (out / "log").glob("*.wal")) > 20_000, "outcomes in the log"
    )
    if how == "ctrl-c":  # as a terminal does it: to the whole process group, Ray's processes among them
        os.killpg(run.process.pid, signal.SIGINT)
    else:
        run.process.terminate()
    code, printed = run.wait()
    assert code == 5, printed
    assert "Traceback" not in printed
    half = summary(out)
    assert not half["complete"]
    assert 0 < half["total"]["finished"] < half["total"]["planned"]
    code, printed = generate(out, *overrides).wait()
    assert code == 0, printed
    assert_whole(out)


def test_failures_are_rows_with_their_reason(tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    fails = 'models.chat.model="fail_every=40 fail_kind=bad_request"'
    code, printed = generate(out, *PLAN, fails, "limits.breaker=1000").wait()
    assert code == 0, printed
    assert_whole(out)
    failed = [row for row in rows(out, "dialogues") if row["status"] == "failed"]
    assert failed
    assert all(row["failure"] == "bad_request" and row["reason"] for row in failed)


def test_a_refused_key_stops_the_run_and_owes_the_dialogues(tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    fails = 'models.chat.model="fail_every=1 fail_kind=unauthorised"'
    code, printed = generate(out, *PLAN, fails).wait()
    assert code == 3, printed
    assert "Traceback" not in printed
    assert summary(out)["total"]["owed"] == summary(out)["total"]["planned"]


def test_two_drivers_on_one_directory(tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    overrides = (*PLAN, 'models.chat.model="latency_ms=400"')
    first = generate(out, *overrides)
    wait_for(lambda: any((out / "log").glob("*.wal")), "the first run's log")
    code, printed = generate(out, *overrides).wait()
    assert code == 4, printed
    assert "Traceback" not in printed
    assert first.process.poll() is None


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    run = generate(out, *PLAN, 'models.chat.model="latency_ms=2000"')
    wait_for(lambda: children_named(run.process.pid, "ray::CulturalAgent"), "agents")
    wait_for(lambda: any((out / "log").glob("*.wal")), "the run's log")
    actors = children_named(run.process.pid, "ray::CulturalAgent")
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(1)
    assert run.process.poll() is None  # it drains
    os.killpg(run.process.pid, signal.SIGINT)
    code, printed = run.wait(20)
    assert code == 130, printed
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in actors), "Ray's processes to end", 30)


def test_a_ninth_culture_is_one_file(tmp_path: Path, generate: Any) -> None:
    """The built-in seeds hold Egypt's answers; nothing else knows of this culture."""
    folder = tmp_path / "cultures"
    folder.mkdir()
    text = (config_dir() / "cultures" / "arabic.toml").read_text("utf-8")
    for old, new in (('"arabic"', '"egyptian"'), ('"JOR", "Jordan"', '"EGY", "Egypt"'), ("Jordan", "Egypt")):
        assert old in text
        text = text.replace(old, new)
    (folder / "egyptian.toml").write_text(text, "utf-8")
    out = tmp_path / "run"
    overrides = (f'plan.culture_files=["{folder}"]', 'plan.cultures=["egyptian", "turkish"]')
    code, printed = generate(out, *SCRIPTED, *overrides).wait()
    assert code == 0, printed
    assert_whole(out)
    assert {row["culture"] for row in rows(out, "samples")} == {"egyptian", "turkish"}
    assert {row["country"] for row in rows(out, "samples")} == {"Egypt", "Turkey"}
