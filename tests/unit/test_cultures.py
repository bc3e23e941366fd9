"""The registry of cultures, its refusals, and the people drawn from it."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culturepark.cultures import Persona, culture_named, describe, draw_persona, load_cultures
from culturepark.errors import ConfigError
from culturepark.paths import config_dir

SHIPPED = load_cultures()

TENTH = """\
id = "ukrainian"
name = "Ukrainian"
demonym = "Ukrainian"
country = "Ukraine"
language = "Ukrainian"
survey_keys = []

[personas]
women = ["Oksana", "Iryna"]
men = ["Taras", "Andriy"]

[personas.ages]
"60+" = 1
"18-59" = 3

[personas.places]
"city" = 0.7
"village" = 0.3

[personas.occupations]
"electrician" = 1.0
"urban planner" = 1.0
"student" = 1.0
"retired" = 2.0
"""


def test_the_nine_shipped_cultures_load_sorted() -> None:
    assert list(SHIPPED) == [
        "arabic", "bengali", "chinese", "english", "german", "korean", "portuguese", "spanish", "turkish",
    ]  # fmt: skip
    for culture in SHIPPED.values():
        pool = culture.personas
        assert len(pool.women) == len(pool.men) == 12
        assert sum(pool.places.values()) == pytest.approx(1)
        assert "SP.URB.TOTL.IN.ZS" in pool.source
        assert "\n" not in pool.source
        assert culture.survey_keys
        assert culture.hofstede_row


def test_a_culture_is_added_by_one_file(tmp_path: Path) -> None:
    (tmp_path / "ukrainian.toml").write_text(TENTH)
    both = load_cultures(extra=[tmp_path])
    assert list(both) == sorted([*SHIPPED, "ukrainian"])
    assert both["ukrainian"].personas.ages == {"60+": 1.0, "18-59": 3.0}
    assert list(load_cultures(tmp_path)) == ["ukrainian"]


def test_a_copied_file_with_a_new_id_is_a_new_culture(tmp_path: Path) -> None:
    original = (config_dir() / "cultures" / "german.toml").read_text()
    (tmp_path / "swabian.toml").write_text(original.replace('id = "german"', 'id = "swabian"'))
    assert "swabian" in load_cultures(extra=[tmp_path])


def test_an_id_may_not_be_defined_twice(tmp_path: Path) -> None:
    (tmp_path / "german.toml").write_text((config_dir() / "cultures" / "german.toml").read_text())
    with pytest.raises(ConfigError, match="already defined") as caught:
        load_cultures(extra=[tmp_path])
    assert caught.value.where == f"{tmp_path / 'german.toml'}: $.id"


OCCUPATIONS = TENTH[TENTH.index("[personas.occupations]") :]

BROKEN = {
    "not toml": ('id = "ukrainian"', "id = ", "", "line 1"),
    "unknown key": ('name = "Ukrainian"', 'name = "U"\nnaem = "U"', "$.naem", "no such key"),
    "unknown pool key": ("[personas]", "[personas]\ngirls = []", "$.personas.girls", "no such key"),
    "missing key": ('demonym = "Ukrainian"', "", "$.demonym", "missing"),
    "number for text": ('name = "Ukrainian"', "name = 3", "$.name", "must be text"),
    "text for list": ('["Oksana", "Iryna"]', '"Oksana"', "$.personas.women", "must be a list"),
    "text for share": ("0.7", '"most"', "$.personas.places", "must be a number"),
    "id is not the stem": ('id = "ukrainian"', 'id = "ukraine"', "$.id", "name of its file"),
    "id is no slug": ('id = "ukrainian"', 'id = "Ukrainian"', "$.id", "cannot be an id"),
    "id ends in a line break": ('id = "ukrainian"', r'id = "ukrainian\n"', "$.id", "cannot be an id"),
    "empty demonym": ('demonym = "Ukrainian"', 'demonym = ""', "$.demonym", "empty"),
    "empty person": ('"Iryna"', '""', "$.personas.women", "empty"),
    "line break": ('"Iryna"', r'"Iry\nna"', "$.personas.women", "line break"),
    "duplicate name": ('"Andriy"', '"Taras"', "$.personas.men", '"Taras" stands here more than once'),
    "one name": ('"Taras", ', "", "$.personas.men", "two names"),
    "no name": ('["Taras", "Andriy"]', "[]", "$.personas.men", "two names"),
    "negative": ("0.7", "-0.7", '$.personas.places."city"', "-0.7"),
    "infinite": ("0.7", "inf", '$.personas.places."city"', "inf"),
    "not a number": ("0.7", "nan", '$.personas.places."city"', "nan"),
    "all zero": ("= 0.7\n", "= 0\n", "$.personas.places", "above 0"),
    "empty table": ('"60+" = 1\n"18-59" = 3', "", "$.personas.ages", "above 0"),
    "no age band": ('"60+"', '"old"', '$.personas.ages."old"', "not an age band"),
    "nobody works": (
        OCCUPATIONS, "[personas.occupations]\nstudent = 1\nretired = 1", "$.personas.occupations", "neither",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "key", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_by_file_and_key(
    tmp_path: Path, old: str, new: str, key: str, says: str
) -> None:
    text = TENTH.replace('"village" = 0.3', '"village" = 0')
    assert old in text
    path = tmp_path / "ukrainian.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_cultures(tmp_path)
    assert caught.value.where == (f"{path}: {key}" if key else str(path))
    assert says in caught.value.what
    assert caught.value.fix


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes('name = "Türkiye"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        load_cultures(tmp_path)


def test_a_folder_without_cultures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no culture"):
        load_cultures(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        load_cultures(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("arabc", "arabic"), ("Korean", "korean"), ("Jordan", "arabic"), ("brasil", "portuguese")],
)
def test_an_unknown_culture_is_answered_with_the_likely_one(asked: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        culture_named(SHIPPED, asked, "$.plan.delegates[0]")
    assert caught.value.where == "$.plan.delegates[0]"
    assert f'Did you mean "{meant}"?' in caught.value.fix
    assert ", ".join(SHIPPED) in caught.value.fix


def test_an_unknown_culture_with_no_near_one_still_lists_the_known() -> None:
    assert culture_named(SHIPPED, "german") is SHIPPED["german"]
    with pytest.raises(ConfigError) as caught:
        culture_named(SHIPPED, "zzzz")
    assert "Did you mean" not in caught.value.fix
    assert "arabic" in caught.value.fix


@given(
    culture=st.sampled_from(list(SHIPPED.values())),
    gender=st.sampled_from(["woman", "man"]),
    seed=st.integers(0, 2**64),
)
def test_two_people_of_one_culture(culture, gender, seed) -> None:
    first = draw_persona(culture, gender, random.Random(seed))
    assert first == draw_persona(culture, gender, random.Random(seed))
    second = draw_persona(culture, gender, random.Random(seed), avoid_name=first.name)
    assert second.name != first.name
    pool = culture.personas
    for person in (first, second):
        assert person.name in (pool.women if gender == "woman" else pool.men)
        assert (person.culture, person.gender) == (culture.id, gender)
        assert person.occupation != "retired" or person.age == "60-79"
        assert person.occupation != "student" or person.age == "18-29"


def test_draws_follow_the_shares(tmp_path: Path) -> None:
    (tmp_path / "ukrainian.toml").write_text(TENTH)
    culture = load_cultures(tmp_path)["ukrainian"]
    rng = random.Random(7)
    people = [draw_persona(culture, "man", rng) for _ in range(4000)]
    places = Counter(person.place for person in people)
    ages = Counter(person.age for person in people)
    assert places["city"] / len(people) == pytest.approx(0.7, abs=0.03)
    assert ages["18-59"] / len(people) == pytest.approx(0.75, abs=0.03)
    # The oldest band is the one with the highest years, wherever it stands in the file.
    assert {person.age for person in people if person.occupation == "retired"} == {"60+"}
    assert {person.age for person in people if person.occupation == "student"} == {"18-59"}
    old = Counter(person.occupation for person in people if person.age == "60+")
    assert old["retired"] / old.total() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    ("culture", "occupation", "place", "phrase"),
    [
        ("arabic", "nurse", "city", "a Jordanian woman aged 30-44 who lives in a city and works as a nurse"),
        ("spanish", "retired", "city", "an Argentine woman aged 30-44 who lives in a city and is retired"),
        ("english", "student", "city", "an American woman aged 30-44 who lives in a city and is a student"),
        (
            "korean", "homemaker", "rural area",
            "a South Korean woman aged 30-44 who lives in a rural area and is a homemaker",
        ),
        (
            "german", "electrician", "university town",
            "a German woman aged 30-44 who lives in a university town and works as an electrician",
        ),
    ],
)  # fmt: skip
def test_a_description_reads_well(culture: str, occupation: str, place: str, phrase: str) -> None:
    person = Persona(culture, "Rania", "woman", "30-44", place, occupation)
    assert describe(person, SHIPPED[culture]) == f"Rania, {phrase}"


@pytest.mark.parametrize(
    ("demonym", "article"),
    [
        ("Ukrainian", "a"),
        ("Uzbek", "an"),
        ("European", "a"),
        ("Uruguayan", "a"),
        ("Indian", "an"),
        ("Thai", "a"),
    ],
)
def test_the_article_follows_the_sound(tmp_path: Path, demonym: str, article: str) -> None:
    (tmp_path / "ukrainian.toml").write_text(TENTH.replace('demonym = "Ukrainian"', f'demonym = "{demonym}"'))
    culture = load_cultures(tmp_path)["ukrainian"]
    person = draw_persona(culture, "man", random.Random(0))
    assert f", {article} {demonym} man aged" in describe(person, culture)


def test_every_shipped_persona_has_a_plain_description() -> None:
    for culture in SHIPPED.values():
        for occupation in culture.personas.occupations:
            for place in culture.personas.places:
                phrase = describe(Persona(culture.id, "Kim", "man", "45-59", place, occupation), culture)
                words = phrase.replace(",", "").split()
                for article, word in pairwise(words):
                    # None of the shipped words is an exception to spelling.
                    if article in ("a", "an"):
                        assert (article == "an") == (word[0].lower() in "aeiou"), phrase
                assert not any(f"a {state}" in phrase for state in ("retired", "unemployed"))
                assert phrase.count(" works as ") + phrase.count(" is ") == 1
