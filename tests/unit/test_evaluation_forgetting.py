"""Forgetting: the built-in set and its floors, one model for each culture, the harness's results."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from culturepark.cli.main import run as culturepark
from culturepark.errors import ConfigError
from culturepark.evaluation import forgetting, harness, report, targets
from culturepark.evaluation.asking import Asker
from culturepark.evaluation.measure import Measurement, compare
from culturepark.settings import ModelSettings
from tests.evaluation_models import OptionsModel, Shares, at_place, evenly

URL = "http://127.0.0.1:9/v1"
ITEMS = forgetting.read_items()


def knows(text: str, options: list[str]) -> list[float]:
    items = [item for item in ITEMS if text.startswith(item.question) and set(item.options) == set(options)]
    return [float(option == items[0].options[0]) for option in options]


def measured(
    shares: Shares, cultures: tuple[str, ...] = (), apart: bool = False, **how: Any
) -> tuple[dict[str, Measurement], OptionsModel]:
    model = OptionsModel(shares, **how)
    found = asyncio.run(forgetting.evaluate(Asker(model), ITEMS, cultures, apart))
    return {one.subset: one for one in found}, model


def test_the_built_in_set() -> None:
    by_ability = Counter(item.ability for item in ITEMS)
    assert len(by_ability) == 6
    assert set(by_ability.values()) == {20}
    assert len({item.id for item in ITEMS}) == len(ITEMS) == 120
    assert len({(item.question, item.options) for item in ITEMS}) == len(ITEMS)
    for item in ITEMS:
        assert item.question
        assert all(item.options)
        assert len({option.casefold() for option in item.options}) == 4


def test_a_model_that_knows_is_right_and_one_that_does_not_is_at_the_floors() -> None:
    found, model = measured(knows)
    assert list(found) == ["arithmetic", "facts", "words", "logic", "reading", "order", "all"]
    assert all(one.interval().value == 1 for one in found.values())
    assert (found["all"].n, found["all"].draws, len(model.asked)) == (120, 480, 481)  # one finds out how
    for blind in (evenly, at_place(0), at_place(3)):
        for one in measured(blind)[0].values():
            assert one.interval().value == one.floors["constant"] == one.floors["random"] == 0.25


def test_replies_that_cannot_be_read_are_missing() -> None:
    found, _ = measured(evenly, logprobs=False, words="well, well")
    assert found["all"].interval().value is None
    assert (found["all"].n, found["all"].invalid_rate) == (0, 1)


def test_one_model_for_each_culture_beside_one_for_all() -> None:
    """Each is asked everything; a score is the mean over cultures, so that items pair with the base's."""
    both = ("korean", "turkish")

    class Apart(OptionsModel):
        async def complete(self, prompt: Any, sampling: Any, *, affinity: str, schema: Any = None) -> Any:
            self._shares = knows if affinity.startswith("korean/") else at_place(0)
            return await super().complete(prompt, sampling, affinity=affinity, schema=schema)

    model = Apart(evenly)
    own = asyncio.run(forgetting.evaluate(Asker(model), ITEMS, both, True))
    base, asked_once = measured(knows, both)
    assert len(model.asked) == 2 * 480 + 1
    assert len(asked_once.asked) == 480 + 1
    found = {one.subset: one for one in own}
    assert found["korean"].interval().value == 1
    assert found["turkish"].interval().value == 0.25
    assert found["all"].interval().value == pytest.approx((1 + 0.25) / 2)
    assert found["all"].n == 240
    assert base.keys() == found.keys()
    compared = {one.subset: one for one in compare("base", list(base.values()), "own", own)}
    assert compared["all"].n_units == compared["turkish"].n_units == 120
    assert compared["korean"].difference is not None
    assert compared["korean"].difference.value == 0
    assert compared["turkish"].difference is not None
    assert compared["turkish"].difference.high < 0
    joint, _ = measured(evenly, both)
    both_once = compare("base", list(base.values()), "joint", list(joint.values()))
    assert {one.subset for one in both_once} == {*(item.ability for item in ITEMS), "all"}


def test_both_are_asked_in_the_same_orders() -> None:
    once, apart = OptionsModel(evenly), OptionsModel(evenly)
    asyncio.run(forgetting.evaluate(Asker(once, method="logprobs"), ITEMS[:3], (), False))
    asyncio.run(forgetting.evaluate(Asker(apart, method="logprobs"), ITEMS[:3], ("arabic", "korean"), True))
    assert sorted(apart.asked) == sorted(once.asked * 2)


# --- lm-evaluation-harness


def results_in(folder: Path, *, group: bool = False) -> None:
    """Files as lm-evaluation-harness 0.4.13 writes them, of two small benchmarks."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {"sums": [1.0, 0.0, 1.0, 1.0], "words": [0.0, 1.0]}
    results: dict[str, Any] = {
        task: {
            "alias": task,
            "sample_len": len(of),
            "exact_match,strict": sum(of) / len(of),
            "exact_match_stderr,strict": 0.25,
            "bleu,none": 31.5,
        }
        for task, of in scores.items()
    }
    if group:
        results["both"] = {"alias": "both", "exact_match,strict": 4 / 6, "exact_match_stderr,strict": "N/A"}
    whole = {
        "results": results,
        "group_subtasks": {"both": ["sums", "words"]} if group else {},
        "higher_is_better": {task: {"exact_match": True, "bleu": True} for task in scores},
        "n-samples": {task: {"original": len(of), "effective": len(of)} for task, of in scores.items()},
    }
    (folder / "results_2026-01-02T03-04-05.1.json").write_text(json.dumps(whole), "utf-8")
    for task, of in scores.items():
        lines = [
            json.dumps({"doc_id": n, "filter": by, "exact_match": one if by == "strict" else 0.0, "bleu": []})
            for n, one in enumerate(of)
            for by in ("strict", "loose")
        ]
        (folder / f"samples_{task}_2026-01-02T03-04-05.1.jsonl").write_text("\n".join(lines), "utf-8")


def test_results_become_figures(tmp_path: Path) -> None:
    results_in(tmp_path / "model")
    found = {one.subset: one for one in harness.read_results(tmp_path)}
    assert found.keys() == {"sums", "words"}  # bleu is no mean over questions
    sums = found["sums"]
    assert (sums.metric, sums.better, sums.task) == ("exact_match (strict)", "higher", "forgetting")
    assert sums.interval().value == 0.75
    assert sums.units == ("sums/0", "sums/1", "sums/2", "sums/3")
    assert "standard error of 0.25" in sums.notes[0]


def test_a_group_is_all_its_questions(tmp_path: Path) -> None:
    results_in(tmp_path / "model", group=True)
    [both] = harness.read_results(tmp_path)
    assert (both.subset, both.n) == ("both", 6)
    assert both.interval().value == pytest.approx(4 / 6)
    assert both.better == "higher"


@pytest.mark.parametrize("content", ["", "{}", '{"results": 3}'])
def test_results_that_are_none(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match="left no results"):
        harness.read_results(tmp_path)
    (tmp_path / "results_now.json").write_text(content, "utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        harness.read_results(tmp_path)


def test_the_key_goes_by_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "secret")
    model = ModelSettings(engine="openai", model="m,x=y", base_urls=(URL,), api_key_env="MINE")
    command = harness.command_of(model, ["gsm8k", "bbh"], tmp_path)
    arguments = json.loads(command[command.index("--model_args") + 1])
    assert arguments["base_url"] == f"{URL}/chat/completions"
    assert arguments["model"] == "m,x=y"
    assert command[command.index("--tasks") + 1 :][:2] == ["gsm8k", "bbh"]
    environment = harness.environment_of(model, {"PATH": "here", "OPENAI_API_KEY": "another"})
    assert environment == {"PATH": "here", "OPENAI_API_KEY": "secret"}
    assert "secret" not in " ".join(command)
    monkeypatch.delenv("MINE")
    file = tmp_path / "key"
    file.write_text("from-a-file\n", "utf-8")
    file.chmod(0o600)
    monkeypatch.setenv("MINE_FILE", str(file))
    assert harness.environment_of(model, {})["OPENAI_API_KEY"] == "from-a-file"
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        harness.environment_of(model, {})
    here = ModelSettings(engine="embedded")
    assert harness.environment_of(here, {"OPENAI_API_KEY": "another"})["OPENAI_API_KEY"] == ""


def test_an_address_that_no_setting_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def address() -> str:
        command = harness.command_of(ModelSettings(engine="openai", model="m"), ["gsm8k"], tmp_path)
        return json.loads(command[command.index("--model_args") + 1])["base_url"]

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert address() == "https://api.openai.com/v1/chat/completions"
    monkeypatch.setenv("OPENAI_BASE_URL", f"{URL}/")
    assert address() == f"{URL}/chat/completions"
    monkeypatch.setenv("OPENAI_BASE_URL", "nowhere")
    with pytest.raises(ConfigError, match="not an http"):
        address()


# --- the command


@pytest.fixture
def fake_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `lm_eval` that is none: it writes results, or fails on a benchmark named `broken`."""
    monkeypatch.setenv("COLUMNS", "100")
    package = tmp_path / "fake" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", "utf-8")
    results_in(tmp_path / "ready")
    code = f"""
        import pathlib, shutil, sys
        if "broken" in sys.argv:
            sys.exit("ValueError: there is no benchmark broken")
        out = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1])
        shutil.copytree({str(tmp_path / "ready")!r}, out / "model")
        """
    (package / "__main__.py").write_text(textwrap.dedent(code), "utf-8")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *sys.path]))
    monkeypatch.setattr(targets, "open_chat", lambda model, limits: OptionsModel(knows))
    return package


def evaluate(*arguments: str) -> int:
    return culturepark(["evaluate", *arguments, "--task", "forgetting"])


@pytest.mark.usefixtures("fake_harness")
def test_benchmarks_of_two_models_are_compared(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    them = (URL, "--model", "one", "--against", URL, "--against-model", "two")
    assert evaluate(*them, "--harness", "sums", "--harness", "words", "--out", str(out)) == 0
    assert "sums exact_match (strict) ↑" in capsys.readouterr().out
    found = report.read_measurements(out)
    assert [one.subset for one in found["two"]][-2:] == ["sums", "words"]
    whole = json.loads((out / "report.json").read_text("utf-8"))
    assert {"sums", "words", "all"} <= {one["subset"] for one in whole["comparisons"]}
    assert (out / "harness-1" / harness.LOG).is_file()
    assert (out / "harness-2" / harness.LOG).is_file()


@pytest.mark.usefixtures("fake_harness")
def test_a_benchmark_that_fails_says_why(tmp_path: Path, capsys: Any) -> None:
    assert evaluate(URL, "--model", "m", "--harness", "broken", "--out", str(tmp_path / "out")) == 2
    printed = capsys.readouterr().err
    assert "no benchmark broken" in printed
    assert "harness.log" in printed


def test_without_the_extra(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "no_such_harness")
    assert evaluate(URL, "--model", "m", "--harness", "gsm8k", "--out", str(tmp_path / "out")) == 2
    assert "culturepark[harness]" in capsys.readouterr().err


def test_adapters_have_no_name_for_the_harness() -> None:
    harness.refuse_adapters({})
    with pytest.raises(ConfigError, match="no model name"):
        harness.refuse_adapters({"korean": object()})
