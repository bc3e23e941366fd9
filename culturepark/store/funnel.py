"""The funnel: counts of everything that happened, by culture, that add up by construction.

A funnel is a Counter with flat keys, so that funnels add and subtract. `view` nests it for readers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec.structs import asdict

from culturepark.messages import Outcome
from culturepark.pricing import cost
from culturepark.refine.select import Choice
from culturepark.settings import Settings
from culturepark.usage import Usage, UsageByRole

Funnel = Counter[str]
_USAGE = Usage.__struct_fields__


def of_outcome(outcome: Outcome) -> Funnel:
    """What one ended dialogue adds. Its candidates count as `waiting` until their cell is selected."""
    funnel: Funnel = Counter()
    funnel["finished" if not outcome.failed else "failed"] += 1
    if outcome.failed:
        funnel[f"failure:{outcome.failed}"] += 1
    funnel["turns"] += len(outcome.turns)
    for label in (label for turn in outcome.turns for label in turn.health):
        funnel[f"health:{label}"] += 1
    funnel["unreadable_extractions"] += len(outcome.notes)
    for opinion in outcome.opinions:
        funnel["extracted"] += 1
        if opinion.first_verdict:
            funnel[f"verdict:{opinion.first_verdict}"] += 1
        funnel["rewritten"] += opinion.rewritten
        if opinion.rejected:
            funnel["rejected"] += 1
            funnel[f"reason:{opinion.rejected}"] += 1
        else:
            funnel["waiting"] += 1
    add(funnel, of_usage(outcome.usage))
    return funnel


def of_choices(choices: Iterable[Choice]) -> Funnel:
    """What selecting a cell adds, and subtracts from `waiting`."""
    funnel: Funnel = Counter()
    for choice in choices:
        funnel["waiting"] -= 1
        if choice.kept:
            funnel["kept"] += 1
        else:
            funnel["rejected"] += 1
            funnel[f"reason:{choice.reason}"] += 1
    return funnel


def add(into: Funnel, other: Mapping[str, int]) -> None:
    """Add in place, keeping counts of zero and below."""
    for key, count in other.items():
        into[key] += count


def view(funnel: Mapping[str, int], planned: int) -> dict[str, Any]:
    """One culture's counts for readers."""
    finished, failed = funnel.get("finished", 0), funnel.get("failed", 0)
    return {
        "planned": planned,
        "finished": finished,
        "failed": failed,
        "owed": planned - finished - failed,
        "failures": _below(funnel, "failure:"),
        "turns": funnel.get("turns", 0),
        "health": _below(funnel, "health:"),
        "extracted": funnel.get("extracted", 0),
        "unreadable_extractions": funnel.get("unreadable_extractions", 0),
        "first_verdicts": _below(funnel, "verdict:"),
        "rewritten": funnel.get("rewritten", 0),
        "kept": funnel.get("kept", 0),
        "rejected": funnel.get("rejected", 0),
        "waiting": funnel.get("waiting", 0),
        "rejections": _below(funnel, "reason:"),
    }


def usage_view(funnel: Mapping[str, int], settings: Settings) -> dict[str, Any]:
    """Usage and its cost by role, for readers. Unknown prices and unreported tokens make money unknown
    (None), never zero."""
    return {
        role: {**asdict(usage), "money": cost(usage, settings.prices_of(role))}
        for role, usage in usage_of(funnel).items()
    }


def usage_of(funnel: Mapping[str, int]) -> UsageByRole:
    """The usage by role that a funnel counts."""
    roles = sorted({key.split(":")[1] for key in funnel if key.startswith("usage:")})
    return {
        role: Usage(**{field: funnel.get(f"usage:{role}:{field}", 0) for field in _USAGE}) for role in roles
    }


def of_usage(by_role: Mapping[str, Usage]) -> Funnel:
    """Usage by role, as a funnel counts it."""
    return Counter(
        {
            f"usage:{role}:{field}": getattr(usage, field)
            for role, usage in by_role.items()
            for field in _USAGE
        }
    )


def problems(funnel: Mapping[str, int], planned: int, whole: bool) -> list[str]:
    """Sums that do not hold. `whole`: every planned dialogue should have ended."""
    seen = view(funnel, planned)
    found: list[str] = []
    if whole and seen["owed"]:
        found.append(f"planned {planned} is not finished {seen['finished']} + failed {seen['failed']}")
    if seen["owed"] < 0:
        found.append(f"more dialogues ended than were planned: {-seen['owed']}")
    if seen["extracted"] != seen["kept"] + seen["rejected"] + seen["waiting"]:
        found.append(
            f"extracted {seen['extracted']} is not kept {seen['kept']} + rejected {seen['rejected']}"
            f" + waiting {seen['waiting']}"
        )
    if whole and seen["waiting"]:
        found.append(f"{seen['waiting']} opinions were never selected from")
    if sum(seen["rejections"].values()) != seen["rejected"]:
        found.append("the reasons of rejected opinions do not add up to their number")
    return found


def _below(funnel: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {key[len(prefix) :]: n for key, n in sorted(funnel.items()) if key.startswith(prefix) and n}
