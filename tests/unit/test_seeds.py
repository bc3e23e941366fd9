from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from culturepark.errors import SeedError
from culturepark.seeds import (
    Answers,
    Option,
    Seed,
    builtin_seeds,
    check_seed,
    draw,
    load_seeds,
    read_seeds,
    stance_of,
    write_seeds,
)

BY_ID = {seed.id: seed for seed in builtin_seeds()}

AGREE4 = Seed(
    id="tea",
    statement="Tea tastes better than coffee.",
    options=tuple(
        Option(c, label) for c, label in enumerate(("agree a lot", "agree", "disagree", "disagree a lot"), 1)
    ),
    scale="agree4",
    answers={"X": Answers("X", {1: 0.5, 2: 0.3, 3: 0.15, 4: 0.05})},
)


def with_shares(shares: dict[int, float], **changes: object) -> Seed:
    return msgspec.structs.replace(AGREE4, answers={"X": Answers("X", shares)}, **changes)


# Built-in seeds


def test_fifty_built_in_seeds_hold_the_answers_of_fourteen_countries() -> None:
    assert len(builtin_seeds()) == 50
    for seed in builtin_seeds():
        assert {"JOR", "BGD", "CHN", "DEU", "KOR", "BRA", "ARG", "TUR", "EGY"} <= seed.answers.keys()
        assert len(seed.answers) == 14
        for answers in seed.answers.values():
            assert not answers.asked or math.fsum(answers.shares.values()) == pytest.approx(1, abs=1e-5)
            assert sum(answers.missing.values()) == answers.n_missing


def test_interviews_of_a_country_add_up_on_every_item() -> None:
    rows = {
        "JOR": 1203,
        "BGD": 1200,
        "CHN": 3036,
        "DEU": 1528,
        "KOR": 1245,
        "BRA": 1762,
        "ARG": 1003,
        "TUR": 2415,
    }
    for seed in builtin_seeds():
        for country, n in rows.items():
            answers = seed.answers[country]
            assert (answers.n_valid or 0) + (answers.n_missing or 0) == n


def test_items_that_were_never_asked_have_no_answer() -> None:
    def never(country: str) -> set[int]:
        return {int(s.id.removeprefix("wvs7-q")) for s in builtin_seeds() if not s.answers[country].asked}

    assert never("CHN") == {125, *range(132, 139), *range(224, 234)}
    assert never("JOR") == {36, 226}
    for country in ("BGD", "DEU", "KOR", "BRA", "ARG", "TUR"):
        assert not never(country)


def test_sides_follow_what_the_survey_codes_mean() -> None:
    assert [BY_ID["wvs7-q28"].side(c) for c in (1, 2, 3, 4)] == ["for", "for", "against", "against"]
    assert [BY_ID["wvs7-q33"].side(c) for c in (1, 3, 5)] == ["for", "between", "against"]
    assert [BY_ID["wvs7-q124"].side(c) for c in (0, 1, 2)] == ["against", "between", "for"]
    assert [BY_ID["wvs7-q158"].side(c) for c in (1, 4, 5, 6, 7, 10)] == [
        "against",
        "against",
        "between",
        "between",
        "for",
        "for",
    ]


def test_a_digest_changes_with_a_share_and_not_with_the_order() -> None:
    digest = Answers("X", {1: 0.5, 2: 0.5}, missing={"a": 1, "b": 2}).digest()
    assert digest == Answers("X", {2: 0.5, 1: 0.5}, missing={"b": 2, "a": 1}).digest()
    assert digest != Answers("X", {1: 0.6, 2: 0.4}, missing={"a": 1, "b": 2}).digest()
    assert len(digest) == 16


# Checks


@pytest.mark.parametrize(
    ("seed", "fault"),
    [
        (with_shares({1: 0.5, 2: 0.4}), "sum to 0.9"),
        (with_shares({1: 1.5, 2: -0.5}), "is 1.5"),
        (with_shares({1: math.nan, 2: 1.0}), "is nan"),
        (with_shares({1: 0.5, 9: 0.5}), "code 9"),
        (with_shares({1: 1.0}, id="Tea"), "not a seed id"),
        (with_shares({1: 1.0}, id="tea\n"), "not a seed id"),
        (with_shares({1: 1.0}, statement=" "), "blank"),
        (with_shares({1: 1.0}, options=AGREE4.options[:1]), "1 options"),
        (with_shares({1: 1.0}, options=AGREE4.options[:1] * 2), "same code"),
        (with_shares({1: 1.0}, options=(Option(-2, "no answer"), Option(1, "yes"))), "negative"),
        (with_shares({1: 1.0}, options=AGREE4.options[:3]), "agree4 has 4 options"),
        (msgspec.structs.replace(AGREE4, answers={"X": Answers("X", {}, n_valid=-1)}), "count"),
        (
            msgspec.structs.replace(AGREE4, answers={"X": Answers("X", {1: 1.0}, weighted_shares={1: 0.5})}),
            "sum to 0.5",
        ),
    ],
)
def test_a_seed_that_does_not_hold_is_refused(seed: Seed, fault: str) -> None:
    with pytest.raises(SeedError, match=fault):
        check_seed(seed, "here")


def test_a_question_never_asked_is_a_good_seed() -> None:
    check_seed(with_shares({}), "here")


# JSONL


def test_seeds_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    write_seeds(path, builtin_seeds())
    assert read_seeds(path) == builtin_seeds()
    assert [p.name for p in tmp_path.iterdir()] == ["seeds.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    write_seeds(path, [AGREE4])
    with pytest.raises(SeedError, match="twice"):
        write_seeds(path, [AGREE4, AGREE4])
    assert read_seeds(path) == (AGREE4,)
    assert [p.name for p in tmp_path.iterdir()] == ["seeds.jsonl"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            b'{"id": "b", "statement": "S", "options": [{"code": "1", "label": "x"}]}',
            "line 2: .*Expected `int`",
        ),
        (b'{"id": "b", "statement": "S", "option": []}', "line 2: .*unknown field"),
        (b'{"id": "b", "statem', "line 2: "),
        (b'{"id": "b\xff"}', "line 2: "),
        (msgspec.json.encode(AGREE4), "line 2: .*already used on line 1"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, fault: str) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(msgspec.json.encode(AGREE4) + b"\n" + line + b"\n")
    with pytest.raises(SeedError, match=f"seeds.jsonl: {fault}"):
        read_seeds(path)


def test_empty_and_absent_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(SeedError, match="holds no seed"):
        read_seeds(tmp_path / "empty.jsonl")
    with pytest.raises(SeedError, match=r"absent\.jsonl"):
        read_seeds(tmp_path / "absent.jsonl")


def test_sources_join_and_never_share_an_id(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    write_seeds(path, [AGREE4])
    assert load_seeds(["builtin", str(path)]) == (*builtin_seeds(), AGREE4)
    write_seeds(path, [BY_ID["wvs7-q27"]])
    with pytest.raises(SeedError, match=r"wvs7-q27 is also in builtin"):
        load_seeds(["builtin", str(path)])
    with pytest.raises(SeedError, match="no source"):
        load_seeds([])


# Drawing a stance


def test_draws_follow_the_distribution_and_minorities_appear() -> None:
    rng, n = random.Random(7), 20_000
    for seed, country in (
        (BY_ID["wvs7-q28"], "JOR"),
        (BY_ID["wvs7-q158"], "DEU"),
        (BY_ID["wvs7-q124"], "TUR"),
    ):
        answers = seed.answers[country]
        counts = Counter(draw(seed, answers, "distribution", rng) for _ in range(n))
        chi2 = sum(
            (counts[code] - n * share) ** 2 / (n * share) for code, share in answers.shares.items() if share
        )
        # 99.99 % of true draws stay below 33.7 at nine degrees of freedom, the most here.
        assert chi2 < 33.7
        assert set(counts) == {code for code, share in answers.shares.items() if share}


def test_the_same_seed_draws_the_same_stances() -> None:
    seed = BY_ID["wvs7-q28"]
    first, second = (
        [draw(seed, seed.answers["BRA"], "distribution", rng) for _ in range(50)]
        for rng in (random.Random("a"), random.Random("a"))
    )
    assert first == second


@pytest.mark.parametrize(
    ("shares", "mode", "paper"),
    [
        ({1: 0.4, 2: 0.4, 3: 0.1, 4: 0.1}, 1, 1),  # a tie goes to the lower code; the mean 1.9 is cut to 1
        ({1: 0.0, 2: 0.1, 3: 0.1, 4: 0.8}, 4, 3),
        ({1: 0.333333, 2: 0.333333, 3: 0.333333}, 1, 2),  # rounded shares, yet the mean is 2
        ({4: 1.0}, 4, 4),
    ],
)
def test_mode_and_paper(shares: dict[int, float], mode: int, paper: int) -> None:
    rng = random.Random(1)
    before = rng.getstate()
    assert draw(AGREE4, Answers("X", shares), "mode", rng) == mode
    assert draw(AGREE4, Answers("X", shares), "paper", rng) == paper
    assert draw(with_shares({}, scale="nominal"), Answers("X", shares), "paper", rng) == mode
    assert rng.getstate() == before


def test_weights_are_used_when_asked_for_and_there() -> None:
    answers = Answers("X", {1: 0.9, 2: 0.1}, weighted_shares={1: 0.1, 2: 0.9})
    rng = random.Random(1)
    assert draw(AGREE4, answers, "mode", rng) == 1
    assert draw(AGREE4, answers, "mode", rng, weighted=True) == 2
    assert draw(AGREE4, AGREE4.answers["X"], "mode", rng, weighted=True) == 1


def test_nobody_holds_a_stance_on_what_was_never_asked() -> None:
    seed = BY_ID["wvs7-q226"]
    for method in ("distribution", "mode", "paper"):
        with pytest.raises(SeedError, match=r"never asked in (China|Jordan)"):
            draw(seed, seed.answers["CHN"], method, random.Random(1))


# Words


@pytest.mark.parametrize(
    ("seed_id", "code", "opening"),
    [
        ("wvs7-q28", 1, "I strongly agree that kids are worse off when their mum holds a paid job, because"),
        ("wvs7-q28", 3, "I think that kids do just as well when their mum holds a paid job, because"),
        ("wvs7-q39", 3, "I am in two minds about whether, without a job, a person becomes idle, because"),
        (
            "wvs7-q162",
            7,
            "I agree that I get by from day to day without needing any knowledge of science, because",
        ),
        (
            "wvs7-q132",
            1,
            "I would say that, around where I live, it is very common that people get robbed, because",
        ),
        (
            "wvs7-q224",
            3,
            "I would say that, at elections here, it is seldom the case that the count is honest, because",
        ),
    ],
)
def test_openings_read_naturally(seed_id: str, code: int, opening: str) -> None:
    assert stance_of(BY_ID[seed_id], BY_ID[seed_id].answers["DEU"], code).opening == opening


def test_every_stance_has_an_opening_that_leads_to_a_reason() -> None:
    for seed in builtin_seeds():
        openings: set[tuple[str, str | None]] = set()
        for option in seed.options:
            stance = stance_of(seed, seed.answers["DEU"], option.code)
            assert stance.opening.endswith(", because")
            # One reason is asked for, and no full stop ends the sentence before it.
            assert stance.opening.count(", because") == 1
            assert "." not in stance.opening
            assert stance.share == seed.answers["DEU"].shares[option.code]
            openings.add((stance.opening, stance.side))
        # An opening belongs to one side only, and opposite ends never sound alike.
        assert len(openings) == len({opening for opening, _ in openings})
        assert len({side for _, side in openings}) >= 2


@pytest.mark.parametrize(
    ("statement", "clause"),
    [
        ("Kids need rest.", "kids need rest"),
        ("TV does harm.", "TV does harm"),
        ("I'm proud of my work.", "I'm proud of my work"),
        ("South Korea is safe.", "South Korea is safe"),
        (
            "Germany should let in whoever loves Germany today.",
            "Germany should let in whoever loves Germany today",
        ),
        ("A good life is a quiet one!", "a good life is a quiet one"),
    ],
)
def test_names_keep_their_capital_within_a_sentence(statement: str, clause: str) -> None:
    seed = with_shares({1: 1.0}, statement=statement)
    assert stance_of(seed, seed.answers["X"], 1).opening == f"I strongly agree that {clause}, because"


def test_without_a_negation_the_statement_is_disagreed_with() -> None:
    stance = stance_of(AGREE4, AGREE4.answers["X"], 4)
    assert stance.opening == "I strongly disagree that tea tastes better than coffee, because"
    assert stance.side == "against"


def test_a_nominal_answer_is_given_by_its_label() -> None:
    seed = with_shares({1: 1.0}, scale="nominal", options=(Option(1, "Mint"), Option(2, "Lemon")))
    stance = stance_of(seed, seed.answers["X"], 2)
    assert (stance.opening, stance.side, stance.share) == ('My answer is "Lemon", because', None, 0.0)
