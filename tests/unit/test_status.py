"""Figures of a run in progress, and `culturepark status` on runs that go on, ended or died."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from culturepark.cli.main import run as culturepark
from culturepark.cli.views.live import Display
from culturepark.cli.views.status import cost_words
from culturepark.dialogue.conductor import Progress
from culturepark.monitor.figures import (
    Cost,
    Endpoint,
    FigureTracker,
    Rates,
    Snapshot,
    Speed,
    cost_of,
    total_of,
)
from culturepark.monitor.metrics import METRICS, PREFIX, page_table, values
from culturepark.monitor.status import (
    as_json_text,
    read_status,
    starting,
    status_of,
    status_report,
    write_status,
)
from culturepark.store.lock import RunLock
from culturepark.store.rundir import Run
from tests import builders, runs
from tests.faults import Crash, FaultyFiles

ROOT = Path(__file__).resolve().parent.parent.parent
PRICED = {
    "chat": {"engine": "openai", "model": "m", "price_prompt": 1.0, "price_completion": 2.0},
    "vectors": {"engine": "scripted"},
}
ENDPOINT = Endpoint("http://one:8000/v1", "m", 40, 30, 5, 12.5, 900.0, 2.4, 3, 1, 4, 5000, 1.0)

Printed = pytest.CaptureFixture[str]


# --- rates


def test_rates_are_of_the_window_and_of_the_whole() -> None:
    rates = Rates(window_s=30)
    for second in range(101):
        rates.add(float(second), 2 * second if second <= 70 else 140 + 10 * (second - 70), 100 * second)
    assert rates.now == Speed(10.0, 100.0)
    assert rates.overall == Speed(4.4, 100.0)


def test_a_moment_tells_no_rate() -> None:
    rates = Rates()
    assert rates.now == rates.overall == Speed()
    rates.add(0.0, 5, 5)
    rates.add(0.5, 9, 9)
    assert rates.now == Speed()


@given(st.lists(st.tuples(st.floats(0.1, 20), st.integers(0, 1000), st.booleans()), min_size=2, max_size=60))
def test_a_count_that_begins_anew_never_makes_a_rate_negative(steps: list[tuple[float, int, bool]]) -> None:
    rates, now_s, count, said = Rates(), 0.0, 0, 0
    rates.add(0.0, 0, 0)
    for step_s, more, restarted in steps:
        now_s += step_s
        # A process that was just restarted may already count some.
        count = min(count, more) if restarted else count + more
        said += 0 if restarted else more
        rates.add(now_s, count, 0)
        assert (rates.now.turns_s or 0.0) >= 0
    if not any(restarted for _, _, restarted in steps) and now_s >= 1:
        assert rates.overall.turns_s == pytest.approx(said / now_s)


# --- cost and time to come


def priced(root: Path, ended: int, **chat: Any) -> tuple[Run, Snapshot]:
    models = PRICED | {"chat": PRICED["chat"] | chat}
    run = builders.run_in(root, runs.settings(models=models))
    ledger = runs.write(run, runs.outcomes(run.plan)[:ended])
    return run, runs.snapshot(run, ledger)


def test_what_is_owed_costs_what_the_others_did(tmp_path: Path) -> None:
    run, snapshot = priced(tmp_path / "run", 6)
    cost = cost_of(total_of(snapshot.funnels), run.settings, 18)
    assert cost.so_far is not None
    assert cost.so_far > 0
    assert cost.to_come == pytest.approx(3 * cost.so_far)
    assert cost_of(total_of(snapshot.funnels), run.settings, 0).to_come == 0.0


def test_nothing_unknown_is_called_zero(tmp_path: Path) -> None:
    run, snapshot = priced(tmp_path / "unpriced", 6, price_completion=None)
    assert cost_of(total_of(snapshot.funnels), run.settings, 18) == Cost()
    assert cost_of({}, run.settings, 24) == Cost()
    run, _ = priced(tmp_path / "begun", 0)
    assert cost_of({}, run.settings, 24) == Cost(0.0, None)
    told_nothing = {"finished": 2, "usage:speaker:calls": 9, "usage:speaker:unreported": 9}
    assert cost_of(told_nothing, run.settings, 22) == Cost()
    told_little = told_nothing | {"usage:speaker:unreported": 8, "usage:speaker:prompt_tokens": 100}
    assert cost_of(told_little, run.settings, 22) == Cost()


def test_calls_that_reported_nothing_make_a_cost_the_least_it_can_be(tmp_path: Path) -> None:
    run, snapshot = priced(tmp_path / "run", 6)
    total = dict(total_of(snapshot.funnels))
    whole = cost_of(total, run.settings, 0)
    total["usage:speaker:unreported"] = 3
    total["usage:speaker:calls"] += 3
    assert cost_of(total, run.settings, 0) == replace(whole, unreported=3)
    assert cost_words(replace(whole, unreported=3)) == f"at least {cost_words(whole)}"


def test_calls_under_way_are_judged_with_those_of_the_role_that_ended(tmp_path: Path) -> None:
    run, snapshot = priced(tmp_path / "run", 6)
    ended = dict(total_of(snapshot.funnels))
    underway = {
        "usage:speaker:calls": 3,
        "usage:speaker:unreported": 2,
        "usage:speaker:prompt_tokens": 50_000,
    }
    reported = cost_of(ended, run.settings, 18, underway | {"usage:speaker:unreported": 0})
    assert cost_of(ended, run.settings, 18, underway) == replace(reported, unreported=2)
    silent = {"usage:speaker:calls": 9_999, "usage:speaker:unreported": 9_999}
    assert cost_of(ended, run.settings, 18, silent) == Cost()


def test_the_time_left_is_that_of_the_turns_left(tmp_path: Path) -> None:
    run, snapshot = priced(tmp_path / "run", 12)
    watch = FigureTracker(run, 0)
    before = total_of(snapshot.funnels)["turns"]
    figures = None
    for second in range(61):
        at = replace(snapshot.progress, turns=second)
        figures = watch.figures(replace_snapshot(snapshot, at, float(second)))
    assert figures is not None
    # Half of the 24 dialogues are owed, with 14 turns each, at a turn a second.
    in_flight = figures.turns - before
    assert figures.left_s == pytest.approx(12 * 14 - in_flight)
    stuck = watch.figures(replace_snapshot(snapshot, replace(snapshot.progress, turns=60), 200.0))
    assert stuck.left_s is None


def replace_snapshot(snapshot: Snapshot, progress: Progress, elapsed_s: float) -> Snapshot:
    return Snapshot(progress, snapshot.funnels, (), 0, elapsed_s, False, snapshot.endpoints)


def test_retries_outlive_the_moderator_that_counted_them(tmp_path: Path) -> None:
    run, snapshot = priced(tmp_path / "run", 3)
    watch = FigureTracker(run, 0)
    for retried in (4, 0, 2):
        snapshot.endpoints = (replace(ENDPOINT, retried=retried),)
        figures = watch.figures(snapshot)
    assert figures.retries == 6


# --- the command


KEYS = {
    "state", "age_s", "run_id", "written_s", "starting", "elapsed_s", "left_s", "dialogues", "turns",
    "turns_planned", "speed", "overall", "tokens", "cost", "retries", "stopping", "endpoints", "usage",
    "funnel", "cultures",
}  # fmt: skip


def status_json(root: Path, printed: Printed) -> dict[str, Any]:
    printed.readouterr()
    assert culturepark(["status", str(root), "--json"]) == 0
    found = json.loads(printed.readouterr().out)
    assert set(found) == KEYS
    return found


def going_on(root: Path, written_s: float) -> Run:
    run, snapshot = priced(root, 9)
    snapshot.endpoints = (ENDPOINT,)
    write_status(root, status_of(run, snapshot, FigureTracker(run, 0).figures(snapshot), written_s))
    return run


def test_a_run_that_goes_on_is_shown_as_its_driver_saw_it(tmp_path: Path, capsys: Printed) -> None:
    run = going_on(tmp_path / "run", time.time() - 60)
    with RunLock.acquire(run.root):
        found = status_json(run.root, capsys)
        assert culturepark(["status", str(run.root)]) == 0
    assert found["state"] == "running"
    assert 60 <= found["age_s"] < 90
    assert found["dialogues"]["owed"] == found["dialogues"]["in_flight"] == 15
    assert found["endpoints"][0]["limit"] == 40
    assert found["cost"]["to_come"] > 0
    printed = capsys.readouterr().out
    for words in ("running", " s ago)", "15 in flight", "one:8000", "2.4 s", "to come", "arabic"):
        assert words in printed


def test_a_run_that_died_is_told_from_one_that_was_stopped(tmp_path: Path, capsys: Printed) -> None:
    stopped = going_on(tmp_path / "stopped", time.time() - 60)
    assert status_json(stopped.root, capsys)["state"] == "stopped"
    (stopped.root / "summary.json").unlink()
    died = status_json(stopped.root, capsys)
    assert died["state"] == "died"
    assert died["dialogues"]["in_flight"] == 0
    assert died["endpoints"] == []
    assert died["dialogues"]["finished"] + died["dialogues"]["failed"] == 9


def test_an_ended_run_needs_no_status_file(tmp_path: Path, capsys: Printed) -> None:
    run = runs.made(tmp_path / "run")
    for damage in (None, b"", b'{"run_id": 3}'):
        if damage is not None:
            (run.root / "status.json").write_bytes(damage)
        found = status_json(run.root, capsys)
        assert found["state"] == "complete"
        assert found["dialogues"]["owed"] == 0
        assert found["elapsed_s"] is None
    assert culturepark(["status", str(run.root), "--watch"]) == 0


def test_a_run_without_a_status_file_goes_on_all_the_same(tmp_path: Path, capsys: Printed) -> None:
    run = runs.made(tmp_path / "run", ended=5)
    with RunLock.acquire(run.root):
        found = status_json(run.root, capsys)
    assert (found["state"], found["age_s"]) == ("running", None)


def test_a_start_is_believed_for_a_while(tmp_path: Path) -> None:
    run = runs.made(tmp_path / "run", ended=5)
    write_status(run.root, starting(run, 1000.0))
    assert status_report(run.root, 1010.0).state == "running"
    assert status_report(run.root, 2000.0).state != "running"


def test_check_does_not_mind_the_status_file(tmp_path: Path, capsys: Printed) -> None:
    run = runs.made(tmp_path / "run")
    write_status(run.root, starting(run, time.time()))
    assert culturepark(["check", str(run.root)]) == 0


def test_a_status_that_a_power_loss_tore_or_took_is_none_and_does_no_harm(tmp_path: Path) -> None:
    run = runs.made(tmp_path / "run", ended=5)
    calls, crashed = 0, True
    while crashed:
        files = FaultyFiles(run.root)
        write_status(run.root, starting(run, 1000.0), files)
        files.crash_at(calls)
        try:
            write_status(run.root, starting(run, 1010.0), files)
            crashed = False
        except Crash:
            pass
        files.power_loss(Random(calls), keep=calls % 3 / 2, holes=calls % 2 == 0)
        found = read_status(run.root)
        assert found is None or found in (starting(run, 1000.0), starting(run, 1010.0))
        assert status_report(run.root, 2000.0).status.dialogues.finished > 0
        calls += 1
    assert calls > 4


# --- the display and the metrics


def test_the_display_shows_three_endpoints_and_how_many_more(tmp_path: Path) -> None:
    run, snapshot = priced(tmp_path / "run", 9)
    snapshot.endpoints = tuple(replace(ENDPOINT, url=f"http://host{n}:8000/v1") for n in range(5))
    written = io.StringIO()
    console = Console(file=written, width=80, height=40, force_terminal=True, color_system=None)
    with Display(console, run, 0) as display:
        display.show(snapshot)
        display.show(
            replace_snapshot(snapshot, replace(snapshot.progress, turns=140), snapshot.elapsed_s + 10)
        )
    text = written.getvalue()
    for words in ("10.0 turns/s", "20 retries", "host2:8000", "30 of 40", "and 2 more", "to come"):
        assert words in text
    assert "host3" not in text


def test_every_value_has_a_line_in_the_table_and_every_line_a_value(tmp_path: Path) -> None:
    run = going_on(tmp_path / "run", 0.0)
    with RunLock.acquire(run.root):
        status = replace(status_report(run.root, 0.0).status, left_s=5.0)
    kinds = {one.name: one for one in METRICS}
    found = list(values(status))
    for one in found:
        assert tuple(name for name, _ in one.labels) == kinds[one.name].labels
    assert {one.name for one in found} == {one.name for one in METRICS if one.kind != "histogram"}
    assert len({(one.name, one.labels) for one in found}) == len(found)


def test_the_page_holds_the_table() -> None:
    assert page_table() in (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert all(PREFIX + one.name in page_table() for one in METRICS)


def test_json_is_one_line(tmp_path: Path) -> None:
    run = runs.made(tmp_path / "run", ended=5)
    assert "\n" not in as_json_text(status_report(run.root, 0.0))
