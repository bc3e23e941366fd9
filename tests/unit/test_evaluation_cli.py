"""`culturepark evaluate` as its user meets it: what is held out, what is written, what is refused."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from culturepark.cli.arguments import Task
from culturepark.cli.evaluate_options import EvaluateOptions, check_options
from culturepark.cli.main import run as culturepark
from culturepark.errors import ConfigError
from culturepark.evaluation import report, targets
from culturepark.evaluation.measure import compare, compare_pairs, pairs_with_first
from culturepark.evaluation.statistics import holm
from culturepark.models.errors import ModelError
from culturepark.training.split import held_out_questions
from tests import builders, runs
from tests.evaluation_models import OptionsModel, Shares, evenly

URL = "http://127.0.0.1:9/v1"
NOTHING_GIVEN = EvaluateOptions(
    target=URL, model="even", against=None, against_model="", adapter=None, no_base=False,
    api_key_env="OPENAI_API_KEY", task=None, culture=None, seeds=None, question=None, tuned_on=None,
    draws=None, people=None, items_each=None, vsm_items=None, labelled=None, by=None, harness=None,
    judge=None, judge_model="", rows=None, baseline=None, rng_seed=0, out=Path("evaluation"), force=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Shares]:
    """What each model answers, by its name."""
    monkeypatch.setenv("COLUMNS", "100")
    answers: dict[str, Shares] = {"even": evenly, "": evenly}
    monkeypatch.setattr(targets, "open_chat", lambda model, limits: OptionsModel(answers[model.model]))
    return answers


def evaluate(*arguments: str) -> int:
    return culturepark(["evaluate", *arguments])


def test_a_runs_own_questions_are_never_asked(tmp_path: Path, capsys: Any) -> None:
    runs.made(tmp_path / "run")
    out = tmp_path / "out"
    here = (str(tmp_path / "run"), "--culture", "korean", "--task", "opinions", "--out", str(out))
    assert evaluate(*here) == 0
    measured = report.read_measurements(out)
    units = next(one.units for one in measured["scripted"] if one.metric == "js")
    held_out = held_out_questions(builders.THREE, runs.settings().plan.seed, 0.2)
    assert len(units) == 48
    assert set(builders.THREE) & set(units) == held_out
    trained = min(set(builders.THREE) - held_out)
    assert evaluate(*here) == 2
    assert "holds results already" in capsys.readouterr().err
    assert evaluate(*here, "--force", "--question", trained) == 2
    assert "not held out" in capsys.readouterr().err
    assert evaluate(*here, "--force", "--question", "wvs7-q33") == 0
    assert report.read_measurements(out)["scripted"][0].units == ("wvs7-q33",)


def test_an_endpoint_is_not_asked_what_its_model_was_tuned_on(tmp_path: Path) -> None:
    runs.made(tmp_path / "run")
    held_out = held_out_questions(builders.THREE, runs.settings().plan.seed, 0.2)
    here = (URL, "--model", "even", "--culture", "korean", "--out", str(tmp_path / "out"))
    assert evaluate(*here, "--task", "opinions", "--tuned-on", str(tmp_path / "run")) == 0
    units = {unit for one in report.read_measurements(tmp_path / "out")["even"] for unit in one.units}
    assert set(builders.THREE) & units == held_out
    assert evaluate(*here, "--task", "vsm", "--tuned-on", str(tmp_path / "run")) == 2


def test_an_evaluation_that_was_stopped_asks_only_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    opened: list[OptionsModel] = []

    class Stopping(OptionsModel):
        async def complete(self, *arguments: Any, **options: Any) -> Any:
            if len(opened) == 1 and len(self.asked) == 100:
                raise ModelError("unauthorised", "the key has expired")
            return await super().complete(*arguments, **options)

    def opening(*_: Any) -> OptionsModel:
        opened.append(Stopping(evenly))
        return opened[-1]

    monkeypatch.setattr(targets, "open_chat", opening)
    here = (URL, "--model", "even", "--culture", "korean", "--task", "opinions", "--by", "logprobs")
    out = tmp_path / "out"
    assert evaluate(*here, "--out", str(out)) == 3
    assert "not asked twice" in " ".join(capsys.readouterr().err.split())
    (kept,) = (out / "answers").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole + whole[:50])  # the process died over a line
    assert evaluate(*here, "--out", str(out)) == 0
    assert evaluate(*here, "--out", str(tmp_path / "whole")) == 0
    stopped, rest, all_of_it = (one.asked for one in opened)
    assert 0 < len(rest) < len(all_of_it)
    assert set(stopped) | set(rest) == set(all_of_it)
    assert report.read_measurements(out) == report.read_measurements(tmp_path / "whole")
    assert evaluate(*here, "--out", str(out), "--force") == 0
    assert opened[-1].asked == all_of_it
    assert evaluate(*here, "--out", str(tmp_path / "seed"), "--seed", "1") == 0
    assert opened[-1].asked != all_of_it


def test_two_models_side_by_side(tmp_path: Path, models: dict[str, Shares], capsys: Any) -> None:
    models["first"] = lambda text, options: [1.0] + [0.0] * (len(options) - 1)
    out = tmp_path / "out"
    them = (URL, "--model", "even", "--against", URL, "--against-model", "first")
    assert evaluate(*them, "--culture", "arabic", "--culture", "german", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "first against even" in printed
    assert "arabic js ↓" in printed
    assert "Arab countries" in printed
    assert all(len(line) <= 100 for line in printed.splitlines())

    whole = json.loads((out / "report.json").read_text("utf-8"))
    figures: Any = pq.read_table(out / "figures.parquet").to_pylist()
    assert [dict(row) for row in figures] == whole["figures"]
    for row in figures:
        if row["better"] != "neither":
            assert row["floor_random"] is not None or row["metric"] == "rank_correlation"
        assert row["draws"] > 0
    js = next(r for r in figures if (r["model"], r["subset"], r["metric"]) == ("even", "all", "js"))
    assert js["value"] == pytest.approx(js["floor_random"])
    assert js["low"] < js["value"] < js["high"]
    compared: Any = pq.read_table(out / "comparisons.parquet").to_pylist()
    assert {row["task"] for row in compared} == {"opinions", "vsm", "forgetting"}
    # What was written is enough to compare again.
    measured = report.read_measurements(out)
    again = compare("even", measured["even"], "first", measured["first"])
    assert [one.p_holm for one in again] == [row["p_holm"] for row in compared]


def test_the_same_model_twice_differs_nowhere(tmp_path: Path) -> None:
    out = tmp_path / "out"
    them = (URL, "--model", "even", "--against", URL, "--against-model", "even", "--task", "opinions")
    assert evaluate(*them, "--culture", "korean", "--question", "wvs7-q33", "--question", "wvs7-q34",
                    "--out", str(out)) == 0  # fmt: skip
    whole = json.loads((out / "report.json").read_text("utf-8"))
    assert {one["model"] for one in whole["figures"]} == {"even #1", "even #2"}
    assert all(one["difference"]["value"] == 0 and one["p_holm"] == 1 for one in whole["comparisons"])


def test_a_run_is_not_taken_for_a_model_of_another_name(tmp_path: Path, capsys: Any) -> None:
    run = str(runs.made(tmp_path / "run").root)
    for them in (
        (run, "--model", "ft:mine"),
        (URL, "--model", "even", "--against", run, "--against-model", "x"),
    ):
        assert evaluate(*them, "--task", "opinions", "--out", str(tmp_path / "out")) == ConfigError.exit_code
        assert "--adapter NAME" in " ".join(capsys.readouterr().err.split())


def test_p_values_are_corrected_over_all_that_is_compared(tmp_path: Path) -> None:
    runs.made(tmp_path / "run")
    runs.made(tmp_path / "other", plan={"kinds": ["direct"]})
    out = tmp_path / "out"
    them = (str(tmp_path / "run"), "--against", str(tmp_path / "other"), "--judge", "none")
    tasks = ("--task", "quality", "--task", "opinions", "--question", "wvs7-q33")
    assert evaluate(*them, *tasks, "--out", str(out)) == 0
    found = json.loads((out / "report.json").read_text("utf-8"))["comparisons"]
    assert {one["task"] for one in found} == {"quality", "opinions"}
    there = [one for one in found if one["difference"]]
    assert min(one["p_holm"] for one in there) < 1
    assert [one["p_holm"] for one in there] == holm([one["difference"]["p"] for one in there])


def test_labelled_texts(tmp_path: Path, models: dict[str, Shares], capsys: Any) -> None:
    models["mean"] = lambda text, options: [float("insults" in option) for option in options]
    file, out = tmp_path / "germeval2018.test.txt", tmp_path / "out"
    file.write_text("".join(f"Text {n}\t{'OTHER' if n % 4 else 'OFFENSE'}\tx\n" for n in range(160)), "utf-8")
    given = (URL, "--model", "mean", "--task", "moderation", "--out", str(out))
    sets = ("--labelled", f"germeval-2018={file}", "--labelled", "synthetic", "--rows", "100", "--seed", "3")
    assert evaluate(*given, *sets) == 0
    printed = capsys.readouterr().out
    assert "germeval-2018: 100 texts in German. CC BY 4.0" in printed
    assert printed.index("of 160 texts, each class in its share") < printed.index("macro_f1")
    assert 'only 25 texts of the class "offensive"' in printed.split("To be kept in mind")[1]
    figures: Any = pq.read_table(out / "figures.parquet").to_pylist()
    assert {(row["subset"], row["metric"]) for row in figures} == {
        ("germeval-2018", "macro_f1"), ("germeval-2018", "f1 offensive"), ("germeval-2018", "f1 other"),
        ("synthetic", "macro_f1"), ("synthetic", "f1 insult"), ("synthetic", "f1 none"),
    }  # fmt: skip
    for row in figures:
        assert (row["task"], row["n"], row["draws"], row["invalid_rate"]) == ("moderation", 100, 200, 0)
        assert row["floor_others"] is None
    assert figures[1]["value"] == pytest.approx(figures[1]["floor_constant"]) == pytest.approx(0.4)
    units = {unit for one in report.read_measurements(out)["mean"] for unit in one.units}
    assert {unit.partition("/")[0] for unit in units if "/synthetic/" in unit} > {"german", "turkish"}


def test_when_labelled_texts_are_asked(tmp_path: Path, capsys: Any) -> None:
    few = (URL, "--model", "even", "--culture", "german")
    one = (*few, "--question", "wvs7-q33", "--people", "50")
    assert evaluate(*one, "--out", str(tmp_path / "without")) == 0
    assert "synthetic" not in capsys.readouterr().out
    assert evaluate(*one, "--labelled", "synthetic", "--out", str(tmp_path / "with")) == 0
    assert {m.task for m in report.read_measurements(tmp_path / "with")["even"]} == {
        "opinions", "vsm", "moderation", "forgetting",
    }  # fmt: skip
    assert "112 texts left out" in capsys.readouterr().out
    assert evaluate(*few, "--task", "vsm", "--labelled", "synthetic", "--out", str(tmp_path / "no")) == 2
    assert "--task moderation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((URL,), 2, "no name"),
        (("http://user:pass@host/v1", "--model", "m"), 2, "not an http"),
        (("nowhere",), 2, "no directory"),
        (("embedded", "--people", "20"), 2, "too few"),
        (("embedded", "--culture", "germn"), 2, "Did you mean"),
        (("embedded", "--question", "wvs7-q999"), 2, "no question"),
        (("embedded", "--vsm-items", "none.csv"), 2, "cannot be read"),
        (("embedded", "--labelled", "none.toml"), 2, "cannot be read"),
        (("embedded", "--labelled", "coldataset"), 2, "does not come with its texts"),
        (("embedded", "--task", "quality", "--task", "vsm"), 2, "no run's directory"),
        (("embedded", "--no-base"), 2, "no model left"),
        ((".",), 4, "no run directory"),
    ],
)
def test_what_cannot_be_evaluated(
    tmp_path: Path, capsys: Any, arguments: tuple[str, ...], code: int, words: str
) -> None:
    assert evaluate(*arguments, "--out", str(tmp_path / "out")) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "task", "needed"),
    [
        (("--adapter", "own"), "quality", "vsm"),
        (("--baseline", "runs/direct"), "opinions", "quality"),
        (("--by", "logprobs"), "quality", "vsm"),
        (("--draws", "5"), "vsm", "opinions"),
        (("--harness", "gsm8k"), "opinions", "forgetting"),
        (("--judge", "none"), "opinions", "quality"),
        (("--judge-model", "wise"), "opinions", "quality"),
        (("--labelled", "synthetic"), "vsm", "moderation"),
        (("--no-base",), "quality", "vsm"),
        (("--people", "50"), "forgetting", "vsm"),
        (("--question", "wvs7-q33"), "vsm", "opinions"),
        (("--rows", "9"), "opinions", "quality"),
        (("--seeds", "builtin"), "vsm", "opinions"),
        (("--vsm-items", "items.csv"), "opinions", "vsm"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    tmp_path: Path, capsys: Any, option: tuple[str, ...], task: str, needed: str
) -> None:
    given = (URL, "--model", "even", *option, "--task", task, "--out", str(tmp_path / "out"))
    assert evaluate(*given) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{option[0]}: it is for" in said
    assert f"Add `--task {needed}`" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({}, None),
        ({"against_model": "m"}, "--against-model"),
        ({"against": URL, "against_model": "m"}, None),
        ({"against": URL, "against_model": "m", "task": [Task.quality]}, "--against-model"),
        ({"no_base": True}, "--no-base"),
        ({"no_base": True, "adapter": ["own"]}, None),
        ({"task": [Task.quality], "judge": "none", "rows": 9}, "--rows"),
        ({"task": [Task.quality, Task.moderation], "judge": "none", "rows": 9}, None),
        ({"task": [Task.quality], "judge_model": "wise"}, "--judge-model"),
        ({"task": [Task.quality], "judge": "none", "judge_model": "wise"}, "--judge-model"),
        ({"task": [Task.quality], "judge": "somebody"}, "--judge"),
        ({"task": [Task.quality], "judge": ""}, "--judge"),
        ({"task": [Task.opinions], "judge": ""}, None),
        ({"task": [Task.quality], "judge": URL, "judge_model": "wise"}, None),
        ({"task": [Task.opinions], "people": 0}, "--people"),
        ({"labelled": ["synthetic"], "rows": 9}, None),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], where: str | None) -> None:
    options = replace(NOTHING_GIVEN, **given)
    if where is None:
        check_options(options)
        return
    with pytest.raises(ConfigError) as caught:
        check_options(options)
    assert caught.value.where == where


def test_every_cultures_adapter_is_asked_of_everything_it_may_have_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.made(tmp_path / "run")
    own = targets.target_of(str(tmp_path / "run"))
    here: dict[str, Any] = {one: SimpleNamespace(key=one) for one in ("arabic", "korean")}
    monkeypatch.setattr(
        "culturepark.cli.evaluation.adapter_target", lambda *_: replace(own, name="own", adapters=here)
    )
    opened: list[OptionsModel] = []

    @asynccontextmanager
    async def models(of: Any) -> Any:
        opened.append(OptionsModel(evenly))
        yield opened[-1:]

    monkeypatch.setattr("culturepark.cli.evaluation.target_models", models)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert evaluate(run, "--adapter", "own", "--task", "forgetting", "--out", out) == 0
    base, adapters = opened
    assert len(adapters.asked) - 1 == 2 * (len(base.asked) - 1)
    measured = report.read_measurements(Path(out))
    assert {one.subset for one in measured["own"]} >= {"arabic", "korean", "all"}
    assert [one.key for one in measured["own"]] == [one.key for one in measured["scripted"]]
    assert all(
        one.difference and one.difference.value == 0 for one in compare_pairs(pairs_with_first(measured))
    )
    alone = (run, "--adapter", "own", "--no-base", "--task", "forgetting", "--out", str(tmp_path / "alone"))
    assert evaluate(*alone) == 0
    assert report.read_measurements(tmp_path / "alone") == {"own": measured["own"]}
    assert evaluate(run, "--adapter", "own", "--harness", "sums", "--out", str(tmp_path / "not")) == 2
