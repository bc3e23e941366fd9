from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from culturepark.seeds import builtin_seeds, import_wvs

ITEMS = [seed for seed in builtin_seeds() if seed.id in ("wvs7-q27", "wvs7-q33", "wvs7-q122", "wvs7-q158")]


def field(codes: list[int]) -> st.SearchStrategy[str]:
    missing = st.sampled_from(["-1", "-2", "-3", "-4", "-5", "-99", "-4.0", "", " "])
    return st.one_of(
        missing, st.sampled_from(codes).flatmap(lambda c: st.sampled_from([f"{c}", f"{c}.0", f" {c}"]))
    )


interviews = st.lists(
    st.tuples(
        st.sampled_from(["JOR", "CHN", "DEU"]),
        st.floats(0.01, 9).map(repr),
        *(field([option.code for option in seed.options]) for seed in ITEMS),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(rows=interviews, delimiter=st.sampled_from(",;"))
def test_wvs_import_agrees_with_counting_by_hand(rows: list[tuple[str, ...]], delimiter: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wvs.csv"
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            names = [seed.id.removeprefix("wvs7-").upper() for seed in ITEMS]
            writer.writerow(["D_INTERVIEW", "B_COUNTRY_ALPHA", "W_WEIGHT", *names])
            writer.writerows([number, *row] for number, row in enumerate(rows))
        result = import_wvs(path, ITEMS, weighted=True)

    assert result.rows == len(rows)
    for item, seed in enumerate(result.seeds):
        for country in {row[0] for row in rows}:
            people = [row for row in rows if row[0] == country]
            valid = [
                (int(float(row[2 + item])), float(row[1]))
                for row in people
                if row[2 + item].strip() and float(row[2 + item]) >= 0
            ]
            answers = seed.answers[country]
            assert answers.n_valid == len(valid)
            assert (
                (answers.n_valid or 0) + (answers.n_missing or 0) == len(people) == result.countries[country]
            )
            assert sum(answers.missing.values()) == answers.n_missing
            assert answers.asked == bool(valid)
            assert all(code >= 0 for code in answers.shares)
            weight = sum(w for _, w in valid)
            assert answers.shares == pytest.approx(
                {code: sum(c == code for c, _ in valid) / len(valid) for code, _ in valid}
            )
            assert answers.weighted_shares == pytest.approx(
                {code: sum(w for c, w in valid if c == code) / weight for code, _ in valid}
            )
