"""What a run leaves for its users: sums that hold, files that other tools read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from culturepark.messages import encode
from culturepark.settings import Settings
from culturepark.store import funnel as funnels
from culturepark.store.files import PART
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.manifest import Manifest
from culturepark.store.publish import publish
from culturepark.store.readers import rows
from culturepark.store.rows import DIALOGUES, OPINIONS
from culturepark.store.rundir import Run
from culturepark.store.view import View
from tests import builders
from tests.faults import Crash, FaultyFiles


def settings_of(**rooms: Any) -> Settings:
    room = {
        "cultures": ["arabic", "chinese"],
        "questions": ["wvs7-q28", "wvs7-q125"],
        "dialogues_per_question": 6,
        "utterances": 2,
    }
    return builders.settings(**({"plan": room, "refine": {"cell_dialogues": 3, "clusters": 2}} | rooms))


def made(root: Path, of: Settings, share: float = 1.0) -> tuple[Run, dict[str, Any]]:
    """A run of which this share of the dialogues has ended, and its summary."""
    run = builders.run_in(root, of)
    outcomes = builders.outcomes(run.plan)
    with RunLock.acquire(root) as lock:
        ledger = Ledger(run, lock)
        for outcome in outcomes[: int(share * len(outcomes))]:
            ledger.append(encode(outcome))
        ledger.close()
        ledger.close()  # the answer to the first call can be lost
        return run, publish(run, ledger.funnels)


def test_a_summary_means_that_all_is_published_whatever_the_power_does(tmp_path: Path) -> None:
    run, _ = made(tmp_path / "run", settings_of())
    counts = View(run.root).funnels
    datasets = [path.relative_to(run.root).as_posix() for path in run.root.glob("datasets/*/*")]
    published = ["summary.json", "README.md", *datasets]
    content = {name: (run.root / name).read_bytes() for name in published}
    step, crashed = 0, True
    while crashed:
        for name in published:
            (run.root / name).unlink(missing_ok=True)
        for folder in (*run.root.glob("datasets/*"), *run.root.glob("datasets")):
            folder.rmdir()
        files = FaultyFiles(run.root)
        files.crash_at(step)
        try:
            publish(run, counts, files)
            crashed = False
        except Crash:
            pass
        files.power_loss(Random(step), keep=step % 3 / 2)
        if (run.root / "summary.json").exists() or not crashed:
            assert {name: (run.root / name).read_bytes() for name in published} == content
        for part in run.root.rglob(f"*{PART}"):
            part.unlink()
        step += 1
    assert step > 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    return made(tmp_path_factory.mktemp("runs") / "run", settings_of())


def front_matter(card: str) -> dict[str, list[dict[str, str]]]:
    """The `configs` of a dataset card, read as the small part of YAML that it is."""
    _, head, _ = card.split("---\n", 2)
    configs: list[dict[str, str]] = []
    inside = False
    for line in head.splitlines():
        assert "\t" not in line
        if not line.startswith((" ", "-")):
            inside = line == "configs:"
        elif inside:
            if line.startswith("- "):
                configs.append({})
            key, colon, value = line[2:].partition(": ")
            assert colon, line
            configs[-1][key.strip()] = value
    return {"configs": configs}


def test_the_sums_of_the_summary_hold(whole: tuple[Run, dict[str, Any]]) -> None:
    run, summary = whole
    assert json.loads((run.root / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["complete"] is True
    assert summary["problems"] == []
    for name, counts in (*summary["cultures"].items(), ("total", summary["total"])):
        assert counts["planned"] == counts["finished"] + counts["failed"], name
        assert counts["extracted"] == counts["kept"] + counts["rejected"], name
        assert sum(counts["rejections"].values()) == counts["rejected"]
        assert sum(counts["failures"].values()) == counts["failed"]
        assert (counts["owed"], counts["waiting"]) == (0, 0)
    for key in ("planned", "finished", "failed", "turns", "extracted", "kept", "rejected"):
        assert summary["total"][key] == sum(c[key] for c in summary["cultures"].values())
    manifest = Manifest.read(run.root / "manifest")
    counted = {
        kind: list(rows(run.root, manifest, kind, ("culture",)))
        for kind in ("dialogues", "samples", "rejected")
    }
    assert len(counted["dialogues"]) == len(run.plan) == summary["total"]["planned"]
    for culture, counts in summary["cultures"].items():
        for kind, key in (("samples", "kept"), ("rejected", "rejected")):
            assert sum(row["culture"] == culture for row in counted[kind]) == counts[key]
    assert summary["unasked"] == [{"culture": "chinese", "seed_id": "wvs7-q125"}]
    assert summary["usage"]["speaker"]["prompt_tokens"] == 100 * len(run.plan)
    for paths in summary["shards"].values():
        assert all((run.root / path).is_file() for path in paths)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run, summary = made(tmp_path / "run", settings_of(), share=0.5)
    assert summary["complete"] is False
    assert summary["problems"] == []
    assert summary["total"]["owed"] == len(run.plan) - len(run.plan) // 2
    assert "no, it can be resumed" in (run.root / "README.md").read_text()


def test_the_card_points_to_the_shards(whole: tuple[Run, dict[str, Any]]) -> None:
    run, _ = whole
    configs = front_matter((run.root / "README.md").read_text())["configs"]
    assert [c["config_name"] for c in configs] == ["samples", "rejected", "dialogues"]
    assert [c.get("default") for c in configs] == ["true", None, None]
    for config in configs:
        assert list(run.root.glob(config["data_files"]))


def test_a_kind_without_shards_is_not_in_the_card(tmp_path: Path) -> None:
    run, _ = made(tmp_path / "none", settings_of(), share=0)
    assert front_matter((run.root / "README.md").read_text())["configs"] == []
    assert (run.root / "datasets" / "arabic" / "chat.jsonl").read_bytes() == b""


def test_chat_files_hold_the_kept_samples_of_their_culture(whole: tuple[Run, dict[str, Any]]) -> None:
    run, summary = whole
    manifest = Manifest.read(run.root / "manifest")
    kept = list(rows(run.root, manifest, "samples"))
    assert {path.name for path in (run.root / "datasets").iterdir()} == {"arabic", "chinese"}
    for culture, counts in summary["cultures"].items():
        folder = run.root / "datasets" / culture
        chats = [json.loads(line) for line in (folder / "chat.jsonl").read_bytes().splitlines()]
        pairs = [json.loads(line) for line in (folder / "prompt-completion.jsonl").read_bytes().splitlines()]
        own = [row for row in kept if row["culture"] == culture]
        assert len(chats) == len(pairs) == counts["kept"] == len(own) > 0
        for chat, pair, row in zip(chats, pairs, own, strict=True):
            assert [m["role"] for m in chat["messages"]] == ["system", "user", "assistant"]
            assert row["text"] in chat["messages"][-1]["content"] == pair["completion"]
            assert chat["messages"][1]["content"] in pair["prompt"]
            assert row["statement"] in chat["messages"][1]["content"]
            answer = f"{row['persona']['stance_code']}. "
            # A novel opinion is no reason for the survey answer.
            assert chat["messages"][-1]["content"].startswith(answer) == (row["verdict"] == "entails")


def test_publishing_again_changes_nothing(tmp_path: Path) -> None:
    run, _ = made(tmp_path / "run", settings_of())
    made_files = [p for p in run.root.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".json", ".md")]
    made_files = [p for p in made_files if not p.name.startswith("head-")]  # each writer has its own
    before = {path: path.read_bytes() for path in made_files}
    with RunLock.acquire(run.root) as lock:
        ledger = Ledger(run, lock)
        publish(run, ledger.funnels)
    assert {path: path.read_bytes() for path in made_files} == before


def test_the_datasets_library_reads_every_kind(
    whole: tuple[Run, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    import datasets

    datasets.disable_progress_bars()
    run, summary = whole
    for kind, schema in (("samples", OPINIONS), ("rejected", OPINIONS), ("dialogues", DIALOGUES)):
        files = sorted(str(path) for path in (run.root / kind).glob("*.parquet"))
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
        assert loaded.column_names == schema.names
        assert (
            len(loaded)
            == summary["total"][{"samples": "kept", "rejected": "rejected", "dialogues": "planned"}[kind]]
        )
        first = loaded[0]
        assert first["run_id"] == run.file.run_id
    assert loaded[0]["turns"][0]["name"] == loaded[0]["speakers"][0]["name"]
    # By its card the directory is a dataset, and what was kept is what comes first.
    by_card = datasets.load_dataset(str(run.root), split="train", cache_dir=str(tmp_path))
    assert len(by_card) == summary["total"]["kept"]


def test_money_is_known_only_where_everything_is() -> None:
    of = builders.settings(
        models={
            "chat": {
                "engine": "openai",
                "model": "m",
                "price_prompt": 2.0,
                "price_cached": 1.0,
                "price_completion": 10.0,
            },
            "free": {"engine": "scripted"},
            "unpriced": {"engine": "openai", "model": "u"},
            "vectors": {"engine": "openai", "model": "v", "price_prompt": 1.0},
        },
        roles={"speaker": "chat", "embedder": "vectors", "extractor": "free", "verifier": "unpriced"},
    )
    counts: dict[str, int] = {}
    for role in ("speaker", "rewriter", "extractor", "verifier", "embedder"):
        counts |= {
            f"usage:{role}:{k}": n
            for k, n in (
                ("calls", 1),
                ("prompt_tokens", 1_000_000),
                ("cached_tokens", 500_000),
                ("completion_tokens", 100_000),
            )
        }
    counts["usage:rewriter:unreported"] = 1
    counts["usage:embedder:unreported"] = 1
    counts["usage:extractor:unreported"] = 1
    money = {role: usage["money"] for role, usage in funnels.usage_view(counts, of).items()}
    assert money == {"speaker": 2.5, "rewriter": None, "extractor": 0.0, "verifier": None, "embedder": None}


def test_sums_that_do_not_hold_are_named() -> None:
    whole: funnels.Funnel = Counter({"finished": 3, "failed": 1, "extracted": 2, "kept": 1, "rejected": 1})
    whole["reason:cluster"] = 1
    assert funnels.problems(whole, 4, whole=True) == []
    for change, words in (
        ({"finished": 2}, "planned 4"),
        ({"finished": 9}, "more dialogues ended"),
        ({"extracted": 3}, "extracted 3"),
        ({"waiting": 1, "extracted": 3}, "never selected"),
        ({"reason:cluster": 0}, "reasons"),
    ):
        found = funnels.problems({**whole, **change}, 4, whole=True)
        assert any(words in problem for problem in found), (change, found)
