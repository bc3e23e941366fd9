"""Sealed training sets: split by question, the same for the same samples, and checked for leakage."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from culturepark.errors import ConfigError, RunDirError, TrainingError
from culturepark.evaluation.asking import Question, prompt_of
from culturepark.models.scripted import ScriptedEmbedder
from culturepark.prompts.training_rows import question_of, survey_messages
from culturepark.seeds import builtin_seeds
from culturepark.settings import TrainingSettings
from culturepark.settings_load import with_overrides
from culturepark.store.rundir import Run
from culturepark.training.datasets import JOINT, apportion, read_dataset, seal, verify
from culturepark.training.leakage import (
    check_contamination,
    find_overlaps,
    read_set,
    training_texts,
    words_of,
)
from culturepark.training.split import held_out_questions
from tests import builders, runs

THIRD = TrainingSettings(held_out=0.34)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run on three questions."""
    return runs.made(tmp_path_factory.mktemp("sealed") / "run")


@given(
    st.sets(st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True), max_size=40),
    st.integers(-(1 << 53), 1 << 53),
    st.floats(0, 1),
)
def test_questions_are_held_out_by_share_and_never_all(ids: set[str], seed: int, share: float) -> None:
    held = held_out_questions(ids, seed, share)
    assert held <= ids
    assert held == held_out_questions(sorted(ids, reverse=True), seed, share)
    if len(ids) >= 2 and share > 0:
        assert 1 <= len(held) < len(ids)
        assert abs(len(held) - share * len(ids)) <= 1
    else:
        assert not held


def test_no_training_row_is_about_a_held_out_question(run: Run) -> None:
    held: dict[str, tuple[str, ...]] = {}
    for name in ("arabic", "korean", JOINT):
        folder, facts = seal(run, name, THIRD)
        held[name] = facts.held_out
        origins = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        chats = [
            json.loads(line)
            for part in ("train", "held-out")
            for line in (folder / f"{part}.jsonl").read_text().splitlines()
        ]
        assert len(chats) == len(origins) == facts.n_train + facts.n_held_out
        for chat, origin in zip(chats, origins, strict=True):
            assert (origin["question"] in facts.held_out) == (origin["split"] == "held-out")
            seed = next(seed for seed in run.plan.seeds if seed.id == origin["question"])
            assert seed.statement in chat["messages"][1]["content"]
        statement = {seed.id: seed.statement for seed in run.plan.seeds}
        train = (folder / "train.jsonl").read_text()
        assert not any(json.dumps(statement[one])[1:-1] in train for one in facts.held_out)
        pairs = (folder / "train-completion.jsonl").read_text().splitlines()
        assert [json.loads(pair)["completion"] for pair in pairs] == [
            chat["messages"][-1]["content"] for chat in chats[: facts.n_train]
        ]
    assert len(set(held.values())) == 1, "the same questions are held out for every culture"


def test_the_joint_set_is_all_cultures(run: Run) -> None:
    parts = [seal(run, name, THIRD)[1] for name in ("arabic", "korean")]
    joint = seal(run, JOINT, THIRD)[1]
    assert joint.n_train == sum(part.n_train for part in parts)
    assert joint.counts["train"] == {k: v for part in parts for k, v in part.counts["train"].items()}


def test_the_same_samples_give_the_same_folder(run: Run, tmp_path: Path) -> None:
    folder, facts = seal(run, "arabic", THIRD)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert seal(run, "arabic", THIRD) == (folder, facts)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    again = runs.made(tmp_path / "again")
    assert seal(again, "arabic", THIRD)[1] == facts
    assert seal(run, "arabic", TrainingSettings(held_out=0.0))[1].hash != facts.hash


def test_a_changed_dataset_is_found_and_made_anew(tmp_path: Path) -> None:
    run = runs.made(tmp_path / "run")
    folder, facts = seal(run, "arabic", THIRD)
    (folder / "train.jsonl").write_text("{}\n")
    with pytest.raises(RunDirError, match="changed after it was sealed"):
        verify(folder)
    assert seal(run, "arabic", THIRD) == (folder, facts)
    assert verify(folder) == read_dataset(folder) == facts


def test_an_empty_dataset_is_one_clear_error(tmp_path: Path) -> None:
    none = runs.made(tmp_path / "none", ended=0)
    with pytest.raises(TrainingError, match="no sample with a training row is sealed yet"):
        seal(none, "arabic", THIRD)
    unrefined = builders.run_in(tmp_path / "unrefined", runs.settings(refine={"enabled": False}))
    with pytest.raises(TrainingError, match="refines nothing"):
        seal(unrefined, "arabic", THIRD)
    assert not list((none.root / "training" / "datasets").glob("*"))


def test_other_trainers_find_their_files(run: Run) -> None:
    folder, facts = seal(run, "arabic", THIRD)
    listed = json.loads((folder / "dataset_info.json").read_text())
    assert [one["file_name"] for one in listed.values()] == ["train.jsonl", "held-out.jsonl"]
    llama_factory = (folder / "llama-factory.yaml").read_text()
    assert all(f'"{name}"' in llama_factory for name in listed)
    axolotl = (folder / "axolotl.yaml").read_text()
    assert str(folder / "train.jsonl") in axolotl
    assert "test_datasets" in axolotl
    card = (folder / "README.md").read_text()
    assert facts.hash in card
    assert all(f"`{one}`" in card for one in facts.held_out)
    # Both refuse an evaluation set without rows.
    whole, _ = seal(run, "arabic", TrainingSettings(held_out=0.0))
    assert list(json.loads((whole / "dataset_info.json").read_text())) == ["culturepark-arabic"]
    assert "test_datasets" not in (whole / "axolotl.yaml").read_text()
    assert "eval_dataset" not in (whole / "llama-factory.yaml").read_text()


def test_exports_follow_the_settings(run: Run) -> None:
    folder, facts = seal(run, "arabic", THIRD)
    assert seal(run, "arabic", msgspec.structs.replace(THIRD, rank=5)) == (folder, facts)
    assert "lora_r: 5" in (folder / "axolotl.yaml").read_text()


# --- leakage


TRAINING = [
    "How do you see this: Old people should live with their grown children, if they can.",
    "We drink tea with every guest that comes to the house.",
    "父母年老以后应当和成年的子女住在一起。",
]


def test_words_are_found_whatever_their_dress() -> None:
    sets = {
        "exam": [
            "OLD people should live with their grown children if they can!",
            "Ｗe drink tea with every guest — that comes to the house",
            "年老以后应当和成年的子女住",
            "Nobody should have to wait for a doctor.",
            "tea",
        ]
    }
    found = {match.item: match for match in find_overlaps(TRAINING, sets)}
    assert set(found) == set(sets["exam"][:3])
    assert all(match.look == "exact" for match in found.values())
    assert found[sets["exam"][0]].found == TRAINING[0]
    assert found[sets["exam"][2]].found == TRAINING[2]


def test_parts_are_found_by_their_share() -> None:
    most = "Please say: old people should live with their grown children, if they can, or not."
    little = (
        "Old people should live with their grown children only where nobody else at all has room for them."
    )
    found = find_overlaps(TRAINING, {"exam": [most, little]})
    assert [(match.look, match.item) for match in found] == [("n-gram", most)]
    assert 0.5 <= found[0].score < 1
    assert found[0].found == TRAINING[0]


@given(st.lists(st.text(max_size=40), max_size=6), st.text(max_size=40))
def test_what_is_in_the_training_rows_is_found(texts: list[str], item: str) -> None:
    found = find_overlaps([*texts, item], {"exam": [item]})
    assert bool(words_of(item)) == any(match.look == "exact" for match in found)


async def test_the_nearest_text_is_shown_in_any_case() -> None:
    sets = {"exam": ["completely different words about nothing known"], "none": []}
    report = await check_contamination(TRAINING, sets, ScriptedEmbedder(), min_cosine=1.01)
    assert not report.matches
    assert report.nearest["exam"].found in TRAINING
    assert report.items == {"exam": 1, "none": 0}
    same = await check_contamination(TRAINING, {"exam": [TRAINING[1]]}, ScriptedEmbedder())
    assert {match.look for match in same.matches} == {"exact", "embedding"}


async def test_held_out_questions_are_not_in_the_training_rows(run: Run) -> None:
    folder, facts = seal(run, JOINT, THIRD)
    texts = training_texts(folder)
    by_id = {seed.id: seed.statement for seed in run.plan.seeds}
    trained = [one for one in by_id if one in builders.THREE and one not in facts.held_out]
    sets = {"held out": [by_id[one] for one in facts.held_out], "trained": [by_id[one] for one in trained]}
    report = await check_contamination(texts, sets)
    assert not report.of("held out", "exact")
    assert len(report.of("trained", "exact")) == len(trained)


def test_evaluation_sets_are_read_in_their_formats(tmp_path: Path) -> None:
    texts = ["One text, with a comma.", "Another."]
    files = {name: tmp_path / name for name in ("a.jsonl", "a.csv", "a.tsv", "a.txt")}
    files["a.jsonl"].write_text("".join(json.dumps({"statement": text}) + "\n" for text in texts))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with files[name].open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    files["a.txt"].write_text("\n".join(texts))
    assert [read_set(path) for path in files.values()] == [texts] * 4
    files["a.jsonl"].write_text('{"label": 1}\n')
    files["a.csv"].write_text("id,label\n1,2\n")
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(ConfigError, match=name):
            read_set(files[name])


def test_survey_rows_are_answered_as_people_did(run: Run) -> None:
    _, before = seal(run, JOINT, THIRD)
    folder, facts = seal(run, JOINT, msgspec.structs.replace(THIRD, survey_rows=20))
    assert facts.hash != before.hash
    assert facts.n_held_out == before.n_held_out
    origins = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    chats = [json.loads(line)["messages"] for line in (folder / "train.jsonl").read_text().splitlines()]
    pairs = zip(chats, origins[: facts.n_train], strict=True)
    surveyed = [(chat, origin) for chat, origin in pairs if not origin["sample"]]
    trained = [seed for seed in run.plan.seeds if seed.id not in facts.held_out]
    assert len(surveyed) == facts.survey_rows == facts.n_train - before.n_train == 20 * 2 * len(trained)
    for seed in trained:
        for culture in ("arabic", "korean"):
            people = seed.people(run.plan.cultures[culture].survey_keys)
            assert people is not None
            of = [chat for chat, one in surveyed if (one["culture"], one["question"]) == (culture, seed.id)]
            answers = Counter(chat[-1]["content"].partition(". ")[2] for chat in of)
            for option, share in zip(seed.options, people, strict=True):
                assert abs(answers[f"{option.label}."] - 20 * share) < 1
            for _, asked, answer in of:
                assert answer["content"].removesuffix(".") in asked["content"].splitlines()
            assert len({asked["content"] for _, asked, _ in of}) > 1


def test_without_samples_the_survey_alone_is_trained_on(run: Run) -> None:
    _, both = seal(run, "korean", msgspec.structs.replace(THIRD, survey_rows=20))
    folder, facts = seal(run, "korean", msgspec.structs.replace(THIRD, survey_rows=20, samples=False))
    assert facts.n_train == facts.survey_rows == both.survey_rows
    assert facts.n_held_out == both.n_held_out
    origins = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert not any(origin["sample"] for origin in origins if origin["split"] == "train")
    card = (folder / "README.md").read_text()
    assert "from answers of people in a survey" in card
    assert "Nobody said this" not in card
    with pytest.raises(TrainingError, match="asked none"):
        seal(run, "korean", msgspec.structs.replace(THIRD, samples=False))
    with pytest.raises(ConfigError, match="nothing to tune on"):
        with_overrides(run.settings, ["training.samples=false"])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(sum), st.integers(0, 500))
def test_what_is_apportioned_is_whole_and_near_to_its_share(shares: list[float], count: int) -> None:
    parts = apportion(shares, count)
    assert sum(parts) == count
    for part, share in zip(parts, shares, strict=True):
        assert abs(part - share / sum(shares) * count) < 1 + 1e-9


def test_survey_rows_mark_options_as_evaluations_do() -> None:
    seed = next(seed for seed in builtin_seeds() if len(seed.options) == 10)
    question = Question("q", "", question_of(seed), tuple(option.label for option in seed.options))
    order = list(reversed(range(10)))
    _, asked, answer = survey_messages(seed, order, 0, "Korean")
    assert prompt_of(question, order).messages()[-1] == asked
    assert answer["content"] == f"9. {seed.options[0].label}."
