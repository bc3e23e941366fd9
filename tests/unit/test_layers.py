"""What import-linter cannot see: imports by name, words that had several meanings, the size of the root."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NAMED_ACTORS = {
    ("culturepark/launch.py", "actors.driver"),
    ("culturepark/training/subprocess_backend.py", "actors.ray_train"),
}
"""Modules of actors that culturepark names: the driver is imported, `ray_train` is run as a program."""
_MOST_IN_ROOT = 18
"""Modules that may lie in the root of culturepark: among more of them it is hard to find the right one."""

TAKE = r"""
# On the wire and on disk the moderator's incarnation number keeps the name it had.
culturepark/messages.py
  On disk are the tags `outcome`, `spoke` and `step` and their fields' names, `take` for a term among them;
  term: int = msgspec.field(name="take")
  term: int = msgspec.field(name="take")
culturepark/store/head.py
  term: int | None = msgspec.field(name="take")
actors/moderator.py
  "started", planned=progress.planned, ended=progress.ended, begun=len(in_progress), take=term
# What models read, and patterns over what they say.
culturepark/prompts/small.py
  "Thank you, {other}. What I take from this is that",
culturepark/text.py
  r"i look forward|please (?:share|tell|come|accept|take|have|sit|ask|continue)|"
  r"take care(?: of yoursel(?:f|ves))?|see you(?: (?:soon|later|again|then|tomorrow|next (?:time|week)))*|"
  "thank", "bye", "farewell", "take care", "see you", "gracias", "hasta ",
"""
"""Lines on which the word `take` may stand, below the names of their files, without their indentation."""

OTHERS = ""
"""Lines on which the other words may stand."""


def listed(text: str) -> Iterator[tuple[str, str]]:
    """File and line of each line of such a list."""
    place = ""
    for line in text.splitlines():
        if line.startswith("  "):
            yield place, line.strip()
        elif not line.startswith("#"):
            place = line


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def lines_with(pattern: str) -> list[tuple[str, str]]:
    """File and line of each line of the source that matches, in all of its docstrings and comments too."""
    found: list[tuple[str, str]] = []
    for path in sources("culturepark", "actors"):
        lines = path.read_text("utf-8").splitlines()
        place = path.relative_to(ROOT).as_posix()
        found += [(place, line.strip()) for line in lines if re.search(pattern, line)]
    return found


def actors_named(code: str) -> Iterator[str]:
    """String constants that name the package of actors or a module of it, however they are used."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            package, _, rest = node.value.partition(".")
            if package == "actors" and not rest[:1].isspace():
                yield node.value


@pytest.mark.parametrize(
    "code",
    [
        'import importlib\nimportlib.import_module("actors.driver")',
        'from importlib import import_module\nimport_module(name="actors")',
        '__import__("actors.driver")',
        'part = "driver"\nimportlib.import_module(f"actors.{part}")',
        'DRIVER = "actors.driver"\nimport_module(DRIVER)',
        'load = import_module\nload("actors.driver")',
        'import sys\nsys.modules["actors.driver"]',
    ],
)
def test_a_module_of_actors_that_is_named_is_seen(code: str) -> None:
    assert list(actors_named(code))


def test_launch_and_ray_train_are_the_ways_back_to_actors() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in sources("culturepark")
        for name in actors_named(path.read_text("utf-8"))
    }
    assert found == NAMED_ACTORS


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"(?<![A-Za-z])take(?![A-Za-z])", TAKE),
        (r"(?i)(?<![A-Za-z])(?:seat|pulse|lean|resting|knee)(?![A-Za-z])", OTHERS),
    ],
    ids=["take", "others"],
)
def test_words_of_our_own_are_gone(pattern: str, allowed: str) -> None:
    found, may = Counter(lines_with(pattern)), Counter(listed(allowed))
    more, gone = found - may, may - found
    assert not more, "say it with a plain verb or the field's term, or list the line if a model reads it"
    assert not gone, "these lines are no longer there: take them off the list"


def test_the_root_of_culturepark_stays_small() -> None:
    assert len(list((ROOT / "culturepark").glob("*.py"))) <= _MOST_IN_ROOT
