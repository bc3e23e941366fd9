"""Docs that follow from the code are what the code says, and files that docs name exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from culturepark.settings_load import load_settings

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_the_configuration_page_is_what_the_settings_say() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_reference.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run python scripts/make_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_code_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:culturepark|actors|scripts|tests)/[\w/.-]*\w\.\w+)`?", page.read_text("utf-8"))
    named += re.findall(r"`(?:pytest )?(tests/[\w/.-]+\.py)", page.read_text("utf-8"))
    assert [one for one in dict.fromkeys(named) if not (ROOT / one).exists()] == []


@pytest.mark.parametrize("config", sorted((ROOT / "config").glob("*.toml")), ids=lambda config: config.name)
def test_every_configuration_says_how_to_run_it_and_loads(config: Path) -> None:
    text = config.read_text("utf-8")
    ways = ("culturepark generate", "ray job submit", "scripts/experiment.py")
    assert any(way in text.splitlines()[0] for way in ways)
    # Endpoints' model names are the user's to give.
    unnamed = [
        f"models.{name}.model=NAME"
        for name, model in tomllib.loads(text)["models"].items()
        if model["engine"] == "openai" and not model["model"]
    ]
    load_settings(config, unnamed)
