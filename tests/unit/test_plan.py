"""The plan: numbers that become dialogues, the same everywhere, and no dialogue where nobody was asked."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from culturepark.errors import ConfigError
from culturepark.plan import Brief, Plan
from culturepark.seeds import builtin_seeds
from culturepark.settings import Settings
from culturepark.settings_load import decode_settings
from tests import builders

ALL = {"kinds": ["cross", "in-culture", "direct"], "dialogues_per_question": 6}


def test_ids_are_unique_and_the_same_settings_give_the_same_briefs() -> None:
    plan, again = builders.plan(plan=ALL), builders.plan(plan=ALL)
    briefs = [plan.brief(n) for n in range(len(plan))]
    assert len({brief.id for brief in briefs}) == len(plan) == len(briefs)
    assert briefs == [again.brief(n) for n in reversed(range(len(plan)))][::-1]
    assert plan.fingerprint == again.fingerprint
    assert plan.find(briefs[123].id) == 123
    assert plan.find("d0") is None


def test_another_seed_gives_other_people_and_other_ids() -> None:
    one, two = builders.small_plan(seed=1), builders.small_plan(seed=2)
    assert one.fingerprint != two.fingerprint
    assert not {one.brief(n).id for n in range(4)} & {two.brief(n).id for n in range(4)}
    assert [one.brief(n).speakers for n in range(4)] != [two.brief(n).speakers for n in range(4)]


ROOMS = {
    "per_question": st.integers(1, 23),
    "cell": st.integers(1, 9),
    "delegates": st.lists(st.sampled_from(["arabic", "chinese", "korean"]), min_size=1, unique=True),
    # The last two were never asked in one of these countries.
    "questions": st.lists(
        st.sampled_from(["wvs7-q27", "wvs7-q28", "wvs7-q125", "wvs7-q36"]), min_size=1, unique=True
    ),
}


def plan_of(
    per_question: int, cell: int, delegates: list[str], questions: list[str], shard: str = "1/1"
) -> Plan | None:
    """A plan; None if some culture has nothing to talk about."""
    room = {"cultures": delegates, "questions": questions, "dialogues_per_question": per_question}
    kinds = ["cross", "in-culture", "direct"]
    try:
        return builders.plan(plan={**room, "kinds": kinds, "shard": shard}, refine={"cell_dialogues": cell})
    except ConfigError as error:
        if error.where != "$.plan.cultures":
            raise
        return None


def assert_cells_partition_the_numbers(plan: Plan, cell: int) -> None:
    seen: list[int] = []
    places: dict[str, list[int]] = {}
    for index in range(plan.n_cells):
        one = plan.cell(index)
        assert one.index == index
        assert 1 <= one.size <= cell
        for number in range(one.first, one.first + one.size):
            assert plan.cell_of(number) == index
            brief = plan.brief(number)
            assert (brief.culture, brief.seed.id, brief.cell) == (one.culture, one.seed_id, index)
            assert plan.culture_of(number) == one.culture
            assert plan.utterances_of(number) == brief.utterances
        seen += range(one.first, one.first + one.size)
        places.setdefault(one.culture, []).append(one.place)
    assert sorted(seen) == list(range(len(plan)))
    for ranks in places.values():
        assert sorted(ranks) == list(range(len(ranks)))
    briefs = [plan.brief(n) for n in range(len(plan))]
    assert plan.planned() == Counter(brief.culture for brief in briefs)
    assert plan.kinds() == Counter(brief.kind for brief in briefs)
    assert list(plan.planned()) == [d.id for d in plan.delegates]
    for culture in plan.planned():
        assert plan.questions_of(culture) == len({b.seed.id for b in briefs if b.culture == culture})
    for number in (-1, len(plan)):
        with pytest.raises(IndexError):
            plan.cell_of(number)


@settings(max_examples=60, deadline=None)
@given(**ROOMS)
def test_cells_partition_the_numbers(
    per_question: int, cell: int, delegates: list[str], questions: list[str]
) -> None:
    plan = plan_of(per_question, cell, delegates, questions)
    if plan is None:  # and then one of these is asked alone
        assert set(questions) <= {"wvs7-q125", "wvs7-q36"}
        return
    assert_cells_partition_the_numbers(plan, cell)
    assert plan.planned() == {
        d: per_question * sum((d, q) not in plan.unasked for q in questions) for d in delegates
    }


def by_cell(plan: Plan, culture: str) -> list[list[Brief]]:
    """The dialogues of each cell of a culture, in the order of its cells, without their numbers."""
    cells = sorted(
        (cell for i in range(plan.n_cells) if (cell := plan.cell(i)).culture == culture),
        key=lambda cell: cell.place,
    )
    return [
        [msgspec.structs.replace(plan.brief(n), number=0, cell=0) for n in range(c.first, c.first + c.size)]
        for c in cells
    ]


@settings(max_examples=60, deadline=None)
@given(**ROOMS, parts=st.integers(1, 7))
def test_parts_share_the_plan_out_in_whole_cells(
    per_question: int, cell: int, delegates: list[str], questions: list[str], parts: int
) -> None:
    whole = plan_of(per_question, cell, delegates, questions)
    if whole is None:
        return
    if parts > whole.n_cells:
        with pytest.raises(ConfigError, match="make no"):
            plan_of(per_question, cell, delegates, questions, f"1/{parts}")
        return
    shared = [plan_of(per_question, cell, delegates, questions, f"{i}/{parts}") for i in range(1, parts + 1)]
    plans = [plan for plan in shared if plan is not None]
    assert len(plans) == parts
    for plan in plans:
        assert_cells_partition_the_numbers(plan, cell)
    # Laid end to end, the parts are the whole, culture by culture and cell by cell: nothing is
    # missing, nothing is there twice, and a culture is cut only where a part ends.
    for culture in delegates:
        laid = [cell for plan in plans for cell in by_cell(plan, culture)]
        assert laid == by_cell(whole, culture)
    together = [culture for plan in plans for culture in plan.planned()]
    assert len(together) <= len(delegates) + parts - 1
    sizes = [plan.n_cells for plan in plans]
    assert max(sizes) - min(sizes) <= 1
    assert len({plan.fingerprint for plan in plans}) == parts


def test_what_was_never_asked_gives_no_dialogue_and_is_listed() -> None:
    plan = builders.plan(plan={"dialogues_per_question": 1})
    unasked = set(plan.unasked)
    assert {("chinese", "wvs7-q125"), ("chinese", "wvs7-q224"), ("arabic", "wvs7-q36")} <= unasked
    assert Counter(culture for culture, _ in plan.unasked) == {"chinese": 18, "arabic": 2}
    held = {(plan.brief(n).culture, plan.brief(n).seed.id) for n in range(len(plan))}
    assert not held & unasked
    assert len(held) + len(unasked) == 8 * 50
    assert all(plan.brief(n).answers.asked for n in range(len(plan)))


def test_ten_million_dialogues_are_planned_at_once() -> None:
    # 380 pairs of culture and question
    of = builders.settings(plan={"dialogues_per_question": 30_000})
    tracemalloc.start()
    began = time.perf_counter()
    plan = builders.plan(of)
    took_s = time.perf_counter() - began
    brief = plan.brief(len(plan) - 1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(plan) > 10_000_000
    assert plan.cell_of(brief.number) == plan.n_cells - 1
    part = builders.plan(plan={"dialogues_per_question": 30_000, "shard": "2/64"})
    assert abs(len(part) * 64 / len(plan) - 1) < 0.01
    assert took_s < 2
    assert peak_bytes < 4 << 20


def test_everything_that_may_vary_does() -> None:
    plan = builders.plan(plan=ALL)
    briefs = [plan.brief(n) for n in range(len(plan))]
    talks = [b for b in briefs if b.kind == "cross"]
    assert Counter(b.kind for b in briefs).keys() == {"cross", "in-culture", "direct"}
    for question in {b.seed.id for b in talks}:
        assert {b.style for b in talks if b.seed.id == question} == {"self-guided", "free-chat"}
    openers = Counter(b.speakers[0].culture == "english" for b in talks)
    assert 0.4 < openers[True] / len(talks) < 0.6
    pairings = Counter(tuple(p.gender for p in b.speakers) for b in talks)
    assert len(pairings) == 4
    assert min(pairings.values()) > len(talks) / 8
    # One does not decide the other.
    assert len({(b.style, b.speakers[0].culture == "english") for b in talks}) == 4


def test_who_takes_part_and_whose_opinions_count() -> None:
    plan = builders.small_plan(
        kinds=["cross", "in-culture", "direct"], dialogues_per_question=24, utterances=6
    )
    kinds = {kind: [b for n in range(24) if (b := plan.brief(n)).kind == kind] for kind in ALL["kinds"]}
    for brief in kinds["cross"]:
        (delegate,) = brief.delegates
        assert {p.culture for p in brief.speakers} == {"english", "arabic"}
        assert brief.speakers[delegate].culture == "arabic"
        assert brief.stances[delegate] is not None
        assert brief.stances[1 - delegate] is None
        assert brief.utterances == 6
    for brief in kinds["in-culture"]:
        assert brief.delegates == (0, 1)
        assert None not in brief.stances
        assert brief.speakers[0].name != brief.speakers[1].name
        assert {p.culture for p in brief.speakers} == {"arabic"}
    for brief in kinds["direct"]:
        assert (brief.utterances, brief.delegates, len(brief.speakers)) == (1, (0,), 1)
    assert all(kinds.values())


def test_stances_come_up_as_often_as_people_hold_them() -> None:
    plan = builders.small_plan(kinds=["in-culture"], dialogues_per_question=3000, seed=5)
    codes = Counter(s.code for n in range(3000) for s in plan.brief(n).stances if s)
    shares = plan.brief(0).answers.shares
    assert set(codes) == {code for code, share in shares.items() if share > 0}
    for code, share in shares.items():
        assert codes[code] / 6000 == pytest.approx(share, abs=0.025)


def test_mode_and_paper_give_everybody_one_answer() -> None:
    for method in ("mode", "paper"):
        plan = builders.small_plan(stance=method, dialogues_per_question=12)
        assert len({s.code for n in range(12) for s in plan.brief(n).stances if s}) == 1


def test_native_language_is_the_delegates() -> None:
    assert builders.small_plan(language="native").brief(0).language == builders.cultures()["arabic"].language
    assert builders.small_plan().brief(0).language == "English"


def test_agents_are_needed_only_where_somebody_speaks() -> None:
    assert builders.small_plan().agent_cultures() == ["english", "arabic"]
    assert builders.small_plan(kinds=["in-culture", "direct"]).agent_cultures() == ["arabic"]
    own = builders.small_plan(kinds=["in-culture"], cultures=["german"], contact="german")
    assert own.agent_cultures() == ["german"]


BASE: dict[str, Any] = {
    "models": {
        "chat": {"engine": "openai", "model": "m", "profile": "full"},
        "vectors": {"engine": "openai", "model": "v"},
        "other": {"engine": "scripted"},
    },
    "roles": {"speaker": "chat", "embedder": "vectors"},
}

IDENTITY: list[dict[str, Any]] = [
    {"models": {"chat": {"model": "another"}}},
    {"models": {"chat": {"engine": "scripted"}}},
    {"models": {"chat": {"profile": "small"}}},
    {"models": {"chat": {"path": "/models/x.gguf"}}},
    {"models": {"chat": {"hub": "o/n:x.gguf"}}},
    {"models": {"vectors": {"dimensions": 64}}},
    *({"roles": {role: "other"}} for role in ("speaker", "extractor", "verifier", "rewriter", "embedder")),
    {"plan": {"cultures": ["arabic"]}},
    {"plan": {"contact": "german", "cultures": ["arabic", "turkish"]}},
    {"plan": {"questions": ["wvs7-q28"]}},
    {"plan": {"dialogues_per_question": 5}},
    {"plan": {"kinds": ["cross"]}},
    {"plan": {"styles": ["free-chat"]}},
    {"plan": {"pairings": ["man-man"]}},
    {"plan": {"openers": ["contact"]}},
    {"plan": {"utterances": 12}},
    {"plan": {"stance": "mode"}},
    {"plan": {"weighted": True}},
    {"plan": {"language": "native"}},
    {"plan": {"direct_reasons": 9}},
    {"plan": {"seed": 2}},
    {"plan": {"shard": "1/2"}},
    {"plan": {"shard": "2/2"}},
    {"sampling": {"speaker": {"temperature": 0.1}}},
    {"sampling": {"rewriter": {"max_tokens": 9}}},
    {"sampling": {"verifier": {"top_p": 0.5}}},
    {"refine": {"enabled": False}},
    {"refine": {"rewrite": False}},
    {"refine": {"train_on_novel": False}},
    {"refine": {"min_words": 4}},
    {"refine": {"near_duplicate": 0.9}},
    {"refine": {"clusters": 3}},
    {"refine": {"cell_dialogues": 8}},
    {"refine": {"faults": {"drop_novel": True}}},
    {"refine": {"faults": {"verify_old_text": True}}},
    {"refine": {"faults": {"keep_longest": True}}},
]
SERVING: list[dict[str, Any]] = [
    # Where seeds and cultures are found; what is in them counts, see below.
    {"plan": {"seeds": ["builtin", "mine.jsonl"]}},
    {"plan": {"culture_files": ["mine"]}},
    {"models": {"chat": {"base_urls": ["http://localhost:1/v1"]}}},
    {"models": {"chat": {"api_key_env": "ANOTHER"}}},
    {"models": {"chat": {"parallel": 3, "threads": 2, "gpu_layers": 1, "price_prompt": 1.0}}},
    {"limits": {"dialogues_in_flight": 3, "deadline_s": 5.0, "retries": 1, "breaker": 2, "drain_s": 1.0}},
    {"actors": {"agents_per_culture": 3, "refiners": 2}},
    {"store": {"shard_dialogues": 7, "shard_mb": 1}},
]


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in change.items():
        out[key] = merged(base.get(key, {}), value) if isinstance(value, dict) else value
    return out


def fingerprint(change: dict[str, Any]) -> str:
    return Plan(
        decode_settings(merged(BASE, change), "test"), builtin_seeds(), builders.cultures()
    ).fingerprint


def test_the_fingerprint_changes_with_what_is_generated_and_with_nothing_else() -> None:
    base = fingerprint({})
    prints = [fingerprint(change) for change in IDENTITY]
    assert len({base, *prints}) == 1 + len(prints)
    assert {fingerprint(change) for change in SERVING} == {base}
    # The table above leaves no field of plan and refine out.
    for room in ("plan", "refine"):
        changed = {key for change in (*IDENTITY, *SERVING) for key in change.get(room, {})}
        kind = {f.name: f.type for f in msgspec.structs.fields(Settings)}[room]
        assert changed == set(kind.__struct_fields__)


def test_the_fingerprint_changes_with_the_seeds_and_cultures() -> None:
    of = builders.settings(plan={"cultures": ["arabic"]})
    seeds = list(builtin_seeds())
    base = Plan(of, seeds, builders.cultures()).fingerprint
    seeds[3] = msgspec.structs.replace(seeds[3], statement="Another thing.")
    assert Plan(of, seeds, builders.cultures()).fingerprint != base
    changed = dict(builders.cultures())
    changed["turkish"] = msgspec.structs.replace(changed["turkish"], demonym="Other")
    assert Plan(of, builtin_seeds(), changed).fingerprint == base  # it takes no part
    changed["arabic"] = msgspec.structs.replace(changed["arabic"], demonym="Other")
    assert Plan(of, builtin_seeds(), changed).fingerprint != base
