from __future__ import annotations

import csv
import io
import pickle
from pathlib import Path

import msgspec
import pytest

from culturepark.errors import SeedError
from culturepark.seeds import Option, Seed, builtin_seeds, import_globalopinionqa, import_wvs
from culturepark.seeds.jsonl import read_seeds

HEADER = ["version", "B_COUNTRY", "B_COUNTRY_ALPHA", "D_INTERVIEW", "W_WEIGHT", "Q33_3", "Q33", "Q27", "Q122"]
ROWS = [
    ["v6", "400", "JOR", "1", "1.0", "3", "1", "1.0", "0"],
    ["v6", "400", "JOR", "2", "3.0", "3", "5", "2", "-4"],
    ["v6", "400", "JOR", "3", "1.0", "3", "-1", "2", "-4"],
    ["v6", "156", "CHN", "4", "1.0", "3", "", "-2", "-4"],
]
ITEMS = tuple(s for s in builtin_seeds() if s.id in ("wvs7-q27", "wvs7-q33", "wvs7-q122", "wvs7-q233"))


def wvs(
    tmp_path: Path, rows: list[list[str]], header: list[str] = HEADER, delimiter: str = ",", notes: str = ""
) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([header, *rows])
    path = tmp_path / "wvs.csv"
    path.write_text(notes + text.getvalue(), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize(
    ("delimiter", "notes"), [(",", ""), (";", ""), (",", 'A copy; see\n"the codebook, page 3\n')]
)
def test_wvs_counts_by_country(tmp_path: Path, delimiter: str, notes: str) -> None:
    result = import_wvs(wvs(tmp_path, ROWS, delimiter=delimiter, notes=notes), ITEMS)
    by_id = {seed.id: seed.answers for seed in result.seeds}
    assert result.rows == 4
    assert result.countries == {"JOR": 3, "CHN": 1}
    assert result.skipped_items == ("wvs7-q233",)
    # Q33 is the five-point item, not its three-point recode Q33_3.
    assert by_id["wvs7-q33"]["JOR"].shares == {1: 0.5, 5: 0.5}
    assert by_id["wvs7-q33"]["JOR"].missing == {"dont_know": 1}
    assert by_id["wvs7-q33"]["CHN"].missing == {"blank": 1}
    assert by_id["wvs7-q27"]["JOR"].shares == pytest.approx({1: 1 / 3, 2: 2 / 3})
    assert by_id["wvs7-q27"]["JOR"].weighted_shares is None
    # A 0 is an answer on this item's scale, and nobody in China was asked it.
    assert by_id["wvs7-q122"]["JOR"].shares == {0: 1.0}
    assert not by_id["wvs7-q122"]["CHN"].asked
    assert by_id["wvs7-q122"]["CHN"].missing == {"not_asked": 1}


def test_wvs_weights(tmp_path: Path) -> None:
    result = import_wvs(wvs(tmp_path, ROWS), ITEMS, countries=["JOR"], weighted=True)
    answers = next(s for s in result.seeds if s.id == "wvs7-q33").answers
    assert set(answers) == {"JOR"}
    assert answers["JOR"].shares == {1: 0.5, 5: 0.5}
    assert answers["JOR"].weighted_shares == {1: 0.25, 5: 0.75}


def test_wvs_takes_items_beyond_the_built_in_ones(tmp_path: Path) -> None:
    happy = Seed("wvs7-q46", "I am happy.", (Option(1, "very"), Option(2, "not at all")))
    rows = [[*row, "1"] for row in ROWS]
    result = import_wvs(wvs(tmp_path, rows, [*HEADER, "Q46"]), [happy])
    assert result.seeds[0].answers["JOR"].shares == {1: 1.0}
    with pytest.raises(SeedError, match="names no item of WVS"):
        import_wvs(wvs(tmp_path, ROWS), [msgspec.structs.replace(happy, id="happy")])


def changed(row: int, column: str, value: str) -> list[list[str]]:
    rows = [list(r) for r in ROWS]
    rows[row][HEADER.index(column)] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (changed(1, "Q27", "7"), r"line 3: Q27: the answer 7 is not on"),
        (changed(1, "Q27", "0"), r"line 3: Q27: the answer 0 is not on"),
        (changed(1, "Q27", "1.5"), r"line 3: Q27: '1.5' is no answer code"),
        (changed(1, "Q27", "nan"), r"line 3: Q27: 'nan' is no answer code"),
        (changed(1, "Q27", "inf"), r"line 3: Q27: 'inf' is no answer code"),
        (changed(2, "D_INTERVIEW", "1"), r"line 4: interview 1 came before"),
        (changed(2, "D_INTERVIEW", ""), r"line 4: the interview has no id"),
        (changed(0, "B_COUNTRY_ALPHA", " "), r"line 2: the country is blank"),
        (changed(0, "W_WEIGHT", "-1"), r"line 2: W_WEIGHT: '-1' is no weight"),
        (changed(0, "W_WEIGHT", ""), r"line 2: W_WEIGHT: '' is no weight"),
        (changed(3, "W_WEIGHT", "nan"), r"line 5: W_WEIGHT: 'nan' is no weight"),
        ([ROWS[0], ROWS[1][:5]], r"line 3: the row has 5 columns and the header 9"),
        ([], r"holds no interview"),
    ],
)
def test_wvs_names_the_line_at_fault(tmp_path: Path, rows: list[list[str]], fault: str) -> None:
    with pytest.raises(SeedError, match=fault):
        import_wvs(wvs(tmp_path, rows), ITEMS, weighted=True)


def test_wvs_refuses_a_file_that_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(SeedError, match="no line of the first 50 is a header"):
        import_wvs(wvs(tmp_path, ROWS, notes="note\n" * 50), ITEMS)
    with pytest.raises(SeedError, match="none of the wanted items"):
        import_wvs(wvs(tmp_path, [r[:5] for r in ROWS], HEADER[:5]), ITEMS)
    with pytest.raises(SeedError, match="no column W_WEIGHT"):
        import_wvs(wvs(tmp_path, ROWS, [h.replace("W_WEIGHT", "S017") for h in HEADER]), ITEMS, weighted=True)
    with pytest.raises(SeedError, match="the column Q27 comes twice"):
        import_wvs(wvs(tmp_path, ROWS, [h.replace("Q122", "Q27") for h in HEADER]), ITEMS)
    with pytest.raises(SeedError, match="no interview is from DEU"):
        import_wvs(wvs(tmp_path, ROWS), ITEMS, countries=["JOR", "DEU"])
    with pytest.raises(SeedError, match="cannot be read"):
        import_wvs(tmp_path / "absent.csv", ITEMS)
    (tmp_path / "cut.csv").write_bytes(wvs(tmp_path, ROWS).read_bytes()[:-5])
    with pytest.raises(SeedError, match=r"cut\.csv: line 5: "):
        import_wvs(tmp_path / "cut.csv", ITEMS)
    (tmp_path / "wvs.zip").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(SeedError, match="not UTF-8"):
        import_wvs(tmp_path / "wvs.zip", ITEMS)


# GlobalOpinionQA

OPTIONS = "['Good', 'Bad', 'DK/Refused']"


def selections(**countries: list[float]) -> str:
    return f"defaultdict(<class 'list'>, {countries!r})"


def goqa(tmp_path: Path, *rows: tuple[str, str, str, str]) -> Path:
    path = tmp_path / "global_opinions.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("question", "selections", "options", "source"), *rows])
    return path


def test_goqa_renormalises_and_keeps_what_it_drops(tmp_path: Path) -> None:
    path = goqa(tmp_path, ("How is\nit {today}?", selections(Belgium=[0.6, 0.2, 0.2]), OPTIONS, "GAS"))
    (seed,) = import_globalopinionqa(path).seeds
    assert seed.statement == "How is it {today}?"
    assert seed.options == (Option(1, "Good"), Option(2, "Bad"))
    assert seed.scale == "nominal"
    assert seed.survey == "Pew Global Attitudes Survey"
    assert seed.answers["Belgium"].shares == pytest.approx({1: 0.75, 2: 0.25})
    assert seed.answers["Belgium"].missing == {"DK/Refused": 0.2}


@pytest.mark.parametrize(
    "junk",
    [
        "Don't know",
        "Don\u2019t know (DO NOT READ)",
        "No answer",
        "Missing; Not available",
        "Refused",
        "DK",
        "Not asked",
    ],
)
def test_goqa_knows_options_without_an_opinion(tmp_path: Path, junk: str) -> None:
    path = goqa(tmp_path, ("Q?", selections(X=[0.1, 0.5, 0.4]), repr([junk, "No", "Not at all"]), "GAS"))
    (seed,) = import_globalopinionqa(path).seeds
    assert [(o.code, o.label) for o in seed.options] == [(2, "No"), (3, "Not at all")]


def test_goqa_counts_are_no_answers_and_numbers_are_labels(tmp_path: Path) -> None:
    path = goqa(tmp_path, ("Q?", selections(X=[0.5, 0.5, 1000]), "[0.0, 1.5, 'Total N=']", "GAS"))
    (seed,) = import_globalopinionqa(path).seeds
    assert [o.label for o in seed.options] == ["0", "1.5"]
    assert seed.answers["X"].shares == {1: 0.5, 2: 0.5}


def test_goqa_never_takes_a_partial_sample_for_the_nation(tmp_path: Path) -> None:
    by_label = {"China": [1.0, 0.0, 0.0], "China (Non-national sample)": [0.0, 1.0, 0.0]}
    path = goqa(tmp_path, ("Q?", f"defaultdict(<class 'list'>, {by_label!r})", OPTIONS, "GAS"))
    (seed,) = import_globalopinionqa(path).seeds
    assert seed.answers["China"].shares == {1: 1.0, 2: 0.0}
    assert seed.answers["China (Non-national sample)"].shares == {1: 0.0, 2: 1.0}


def test_goqa_reports_what_it_leaves_out(tmp_path: Path) -> None:
    result = import_globalopinionqa(
        goqa(
            tmp_path,
            (
                "Q?",
                selections(A=[0.5, 0.5, 0.0], B=[0.5, 0.5], C=[0.5, 0.1, 0.1], D=[0, 0, 1]),
                OPTIONS,
                "GAS",
            ),
            ("Q?", selections(A=[0.1, 0.9, 0.0], E=[0.2, 0.8, 0.0]), OPTIONS, "GAS"),
            ("Q?", selections(A=[0.1, 0.9]), "['Good', 'Bad']", "WVS"),
            ("", selections(A=[0.5, 0.5, 0.0]), OPTIONS, "GAS"),
            ("R?", selections(A=[0.5, 1.5, -1.0]), OPTIONS, "GAS"),
            ("S?", selections(A=[0.5, 0.5]), "['Good', 'DK']", "GAS"),
        )
    )
    first, second = result.seeds
    assert first.answers["A"].shares == {1: 0.5, 2: 0.5}  # not the later year's
    assert set(first.answers) == {"A", "E"}
    assert first.id != second.id
    assert result.overlaps == (second.id,)
    assert result.rows == 6
    assert result.countries == {"A": 2, "E": 1}
    assert result.left_out == {
        "distributions of the wrong length": 1,
        "distributions with a sum outside 0.98 to 1.02": 1,
        "distributions without an opinion": 1,
        "repeated answers": 1,
        "rows without a question": 1,
        "distributions with a value that is no share": 1,
        "rows with no usable country": 1,
        "rows with fewer than two options": 1,
    }


def test_goqa_ids_are_stable(tmp_path: Path) -> None:
    path = goqa(tmp_path, ("How is it?", selections(Belgium=[0.6, 0.2, 0.2]), OPTIONS, "GAS"))
    assert import_globalopinionqa(path).seeds[0].id == "goqa-8405013959c6"


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("{'X': __import__('os').getcwd()}", OPTIONS),  # code is never run
        ("defaultdict(<class 'list'>, {'X': [0.5", OPTIONS),
        ("nothing", OPTIONS),
        ("{'X': " + "[" * 5000 + "]" * 5000 + "}", OPTIONS),
        ("{" + " " * 100_001 + "}", OPTIONS),
        ("{1: [0.5, 0.5, 0.0]}", OPTIONS),
        (selections(X=[0.5, 0.5, 0.0]), "['Good', None, 'Bad']"),
    ],
)
def test_goqa_names_the_line_that_cannot_be_read(tmp_path: Path, cell: str, options: str) -> None:
    good = ("Two\nlines?", selections(X=[0.5, 0.5, 0.0]), OPTIONS, "GAS")
    with pytest.raises(SeedError, match=r"global_opinions\.csv: line 4: "):
        import_globalopinionqa(goqa(tmp_path, good, ("Q?", cell, options, "GAS")))


def test_goqa_refuses_another_file(tmp_path: Path) -> None:
    with pytest.raises(SeedError, match="header lacks"):
        import_globalopinionqa(wvs(tmp_path, ROWS))
    with pytest.raises(SeedError, match="no usable question"):
        import_globalopinionqa(goqa(tmp_path))


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self._made = made

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self._made,)  # pyright: ignore[reportReturnType]


def test_a_pickle_by_another_name_is_refused_and_never_loaded(tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "seeds.jsonl"
    path.write_bytes(pickle.dumps(_Trap(made)))
    with pytest.raises(SeedError, match="not a seed"):
        read_seeds(path)
    assert not made.exists()
    pickle.loads(path.read_bytes())
    assert made.exists()  # so it would have shown
