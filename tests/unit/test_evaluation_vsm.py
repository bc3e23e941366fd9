"""The Values Survey Module: the arithmetic by hand, missing answers, floors, people."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from culturepark.errors import ConfigError
from culturepark.evaluation import hofstede, vsm
from culturepark.evaluation.asking import Asker
from culturepark.evaluation.measure import Measurement, compare
from culturepark.evaluation.suite import Suite
from tests.builders import cultures
from tests.evaluation_models import OptionsModel, Shares, always

NAMES = ("arabic", "german", "korean", "turkish")
GROUPS = vsm.groups_of([cultures()[name] for name in NAMES], 50)
ITEMS = vsm.read_items()


def answers(**codes: float) -> np.ndarray:
    """One person of one culture who answers 3 to all but the items named."""
    row = np.full((1, 24), 3.0)
    for name, code in codes.items():
        row[0, int(name.removeprefix("m")) - 1] = code
    return row


def test_indices_by_hand() -> None:
    assert not hofstede.raw_indices(answers()).any()
    assert hofstede.raw_indices(answers(m8=1, m10=5))[0, 2] == -140  # the official weight is 35
    assert hofstede.raw_indices(answers(m7=5, m2=1, m20=5, m23=1))[0, 0] == 240
    ranges = {"pdi": 240, "idv": 280, "mas": 280, "uai": 260, "lto": 260, "ivr": 300}
    for place, (name, formula) in enumerate(hofstede.FORMULAS.items()):
        ends = {f"m{plus}": 5.0 for _, plus, _ in formula} | {f"m{minus}": 1.0 for _, _, minus in formula}
        indices = hofstede.raw_indices(answers(**ends))[0]
        assert indices[place] == ranges[name]
        assert np.count_nonzero(indices) == 1


def test_a_missing_item_spoils_only_its_own_index() -> None:
    values = answers(m7=math.nan, m8=1, m10=5)
    indices = hofstede.raw_indices(values)[0]
    assert np.isnan(indices).tolist() == [True, False, False, False, False, False]
    # Another person's answer to it is enough.
    assert hofstede.raw_indices(np.vstack([values, answers(m7=5)]))[0, 0] == 70


def test_constants_are_fitted_on_the_other_cultures() -> None:
    raw = np.array([[0.0] * 6, [10.0] * 6, [20.0] * 6])
    published = np.array([[50.0] * 6, [62.0] * 6, [70.0] * 5 + [math.nan]])
    constants = hofstede.leave_one_out_constants(raw, published)
    assert constants[:, 0].tolist() == [51, 50, 51]
    assert constants[2, 5] == 51  # fitted all the same, and compared with nothing
    assert np.isnan(hofstede.leave_one_out_constants(raw[:1], published[:1])).all()


def test_a_shift_of_all_indices_changes_nothing() -> None:
    values = np.random.default_rng(1).integers(1, 6, (50, 3 * 24)).astype(float)
    raw = hofstede.raw_indices(values)
    exactly = [[float(value) + 17 for value in row] for row in raw]
    assert hofstede.rmse_of(values, exactly) == pytest.approx(0, abs=1e-9)
    assert hofstede.spearman_of(values, exactly) == 1
    partly = [[None if place > 1 else one for place, one in enumerate(row)] for row in exactly]
    assert hofstede.rmse_of(values, partly, culture=0) == pytest.approx(0, abs=1e-9)
    assert hofstede.euclid_of(values, exactly) == pytest.approx(33 * math.sqrt(6))
    assert hofstede.euclid_of(values, partly) == pytest.approx(33 * math.sqrt(2))


def measured(shares: Shares, **how: object) -> dict[tuple[str, str], Measurement]:
    asker = Asker(OptionsModel(shares, **how))  # type: ignore[arg-type]
    return {(m.subset, m.metric): m for m in asyncio.run(vsm.evaluate(asker, GROUPS, ITEMS))}


MIDDLES = {item.options[2] for item in ITEMS}


def test_a_constant_model_is_at_its_floor() -> None:
    found = measured(always(lambda option: option in MIDDLES))
    for subset in ("all", *NAMES):
        one = found[subset, "rmse"]
        interval = one.interval()
        assert interval.value == pytest.approx(one.floors["constant"])
        assert interval.low == pytest.approx(interval.value) == pytest.approx(interval.high)
    # It tells cultures apart not at all.
    assert found["all", "rank_correlation"].interval().value is None
    assert found["all", "rank_correlation"].floors["constant"] is None
    assert found["german", "pdi"].interval().value == 0
    assert found["all", "euclid"].interval().value == found["all", "euclid"].floors["constant"]


def test_people_differ_by_culture_and_missing_answers_are_missing() -> None:
    def shares(text: str, options: list[str]) -> list[float]:
        if "German" in text and "look up to" in text:
            return [0.0] * 5
        high = "Turkish" in text and "asks for your view" in text
        return [float(o == "hardly or not important" if high else o in MIDDLES) for o in options]

    found = measured(shares)
    assert found["turkish", "pdi"].interval().value == 70
    assert found["arabic", "pdi"].interval().value == 0
    assert found["german", "pdi"].interval().value is None
    assert found["german", "idv"].interval().value == 0
    assert found["german", "rmse"].n == 50 * 23
    assert found["german", "rmse"].invalid_rate == pytest.approx(1 / 24)
    assert found["german", "rmse"].interval().value is not None


def test_stand_ins_are_labelled() -> None:
    notes = measured(always(lambda option: option in MIDDLES))["all", "rmse"].notes
    assert any("Arab countries" in note for note in notes)
    assert set(vsm.WARNINGS) <= set(notes)


def test_people_are_the_same_again_and_enough() -> None:
    assert GROUPS[:2] == vsm.groups_of([cultures()[name] for name in NAMES[:2]], 50)
    assert sum(person.gender == "woman" for person in GROUPS[0].people) == 25
    with pytest.raises(ConfigError, match="too few"):
        vsm.groups_of([cultures()["arabic"]], 49)


def test_a_questionnaire_of_the_users_own(tmp_path: Path) -> None:
    head = "item,question,option_1,option_2,option_3,option_4,option_5\n"
    lines = [f"{n},Question {n}?,a,b,c,d,e\n" for n in range(1, 25)]
    path = tmp_path / "vsm.csv"
    path.write_text(head + "".join([*lines, "25,How old are you?,,,,,\n"]), "utf-8-sig")
    assert [item.number for item in vsm.read_items(path)] == list(range(1, 25))
    for text, what in (
        ("".join(lines), "column"),
        (head + "".join(lines[:-1]), "item 24 is missing"),
        (head + "".join([*lines, lines[0]]), "twice"),
        (head + lines[0].replace("b,c", "b,b") + "".join(lines[1:]), "item 1"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(ConfigError, match=what):
            vsm.read_items(path)
    with pytest.raises(ConfigError, match="read"):
        vsm.read_items(tmp_path / "none.csv")


def test_figures_published_for_our_cultures() -> None:
    for name in NAMES:
        assert None not in hofstede.published_table()[cultures()[name].hofstede_row]
    assert json.dumps(GROUPS[0].published) == "[80.0, 38.0, 53.0, 68.0, 23.0, 34.0]"


@pytest.mark.parametrize("each", [10, 0, -12, 48])
def test_items_are_shared_out_evenly_or_not_at_all(each: int) -> None:
    with pytest.raises(ConfigError, match="evenly"):
        vsm.groups_of([cultures()["arabic"]], 50, items_each=each)


def test_too_few_answers_to_an_item_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 people"):
        vsm.groups_of([cultures()["arabic"]], 50, items_each=8)
    assert vsm.groups_of([cultures()["arabic"]], 60, items_each=8)


def test_who_is_asked_half_of_the_items_gives_the_same_people_and_each_item_as_often() -> None:
    names = [cultures()[name] for name in NAMES]
    halves = vsm.groups_of(names, 50, items_each=12)
    assert [group.people for group in halves] == [group.people for group in GROUPS]
    for group in halves:
        assert all(len(set(places)) == 12 for places in group.asked)
        assert set(Counter(place for places in group.asked for place in places).values()) == {25}
    questions = vsm.questions_of(halves, ITEMS)
    whole = {question.id: question for question in vsm.questions_of(GROUPS, ITEMS)}
    assert len(questions) == len(whole) // 2
    assert all(whole[question.id] == question for question in questions)


def test_figures_of_halves_are_of_what_was_asked() -> None:
    halves = vsm.groups_of([cultures()[name] for name in NAMES], 50, items_each=12)
    model = OptionsModel(always(lambda option: option in MIDDLES))
    found = {(m.subset, m.metric): m for m in asyncio.run(vsm.evaluate(Asker(model), halves, ITEMS))}
    whole = measured(always(lambda option: option in MIDDLES))
    for key, one in found.items():
        assert one.interval().value == whole[key].interval().value
        assert one.floors.get("constant") == whole[key].floors.get("constant")
        assert one.n == whole[key].n // 2 == one.draws
        assert one.invalid_rate == 0
        assert any("12 of the 24 items" in note for note in one.notes)
    # Who was asked half is nobody's pair among those who were asked all.
    compared = compare("halves", list(found.values()), "whole", list(whole.values()))
    assert {(one.n_units, one.difference) for one in compared} == {(0, None)}
    # An index from half of the answers is less sure, and its floor at random knows.
    random_floors = (found["all", "rmse"].floors["random"], whole["all", "rmse"].floors["random"])
    assert random_floors[0] > random_floors[1]


def test_progress_counts_what_is_asked() -> None:
    halves = vsm.groups_of([cultures()[name] for name in NAMES], 50, items_each=12)
    suite = Suite(cultures=cultures(), groups=tuple(halves), items=ITEMS)
    assert suite.questions == len(vsm.questions_of(halves, ITEMS)) == 4 * 50 * 12
