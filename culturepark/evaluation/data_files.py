"""The tables that come with the evaluations, in `data/`."""

from __future__ import annotations

import csv
from importlib import resources


def read_data(name: str) -> str:
    """The text of a file in `data/`."""
    return resources.files("culturepark.evaluation").joinpath("data", name).read_text("utf-8")


def data_rows(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file in `data/`, cells by column."""
    return list(csv.DictReader(read_data(name).splitlines()))
