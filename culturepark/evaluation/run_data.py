"""What a run has made, read from its shards: dialogues with what they took, opinions with their vectors."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from culturepark.ports import Vectors
from culturepark.store.manifest import Manifest
from culturepark.store.readers import rows
from culturepark.store.rundir import Run
from culturepark.usage import Usage

T = TypeVar("T")

TASK = "quality"
ALL = "all"
"""The subset of all cultures."""


class Talk(Struct, frozen=True):
    """One dialogue that is in the shards. `stances` are the answers that its delegates drew. `usage` is
    what was told, by role; `untold` an estimate of what calls took that told nothing."""

    id: str
    number: int
    culture: str
    question: str
    stances: tuple[int, ...]
    usage: dict[str, Usage]
    untold: dict[str, Usage] = {}

    def tokens(self, roles: Iterable[str]) -> int:
        """Tokens of these roles, prompt and completion, told and estimated."""
        return sum(tokens_of(of[role]) for role in roles for of in (self.usage, self.untold) if role in of)


class Opinion(Struct, frozen=True):
    """One opinion, kept or rejected for a reason. `vector` is None if it was rejected before selection."""

    id: str
    talk: str
    culture: str
    statement: str
    stance: str
    text: str
    verdict: str
    kept: bool
    rejected: str
    vector: Vectors | None


class RunData(Struct, frozen=True):
    """Dialogues in the order of the plan, and their opinions in the same order. `owed` counts planned
    dialogues that are not in the shards. `silent` are roles whose tokens are in no sum; None: nobody has
    looked yet (`with_estimates`)."""

    run: Run
    talks: tuple[Talk, ...]
    opinions: tuple[Opinion, ...]
    owed: int
    silent: frozenset[str] | None = None

    @property
    def kept(self) -> list[Opinion]:
        """The samples."""
        return [one for one in self.opinions if one.kept]

    @property
    def cultures(self) -> list[str]:
        """Those with a dialogue, in order of the plan."""
        there = {talk.culture for talk in self.talks}
        return [culture for culture in self.run.plan.planned() if culture in there]

    @property
    def usage(self) -> dict[str, Usage]:
        """What was told, by role."""
        return _by_role(talk.usage for talk in self.talks)

    @property
    def untold(self) -> dict[str, Usage]:
        """The estimate of what was not, by role."""
        return _by_role(talk.untold for talk in self.talks)

    def only(self, cultures: Iterable[str]) -> RunData:
        """What was made for these cultures."""
        wanted, planned = frozenset(cultures), self.run.plan.planned()
        talks = tuple(talk for talk in self.talks if talk.culture in wanted)
        return replace(
            self,
            talks=talks,
            opinions=tuple(one for one in self.opinions if one.culture in wanted),
            owed=sum(n for culture, n in planned.items() if culture in wanted) - len(talks),
        )

    def up_to(self, tokens: int, roles: frozenset[str]) -> RunData:
        """The first dialogues of the plan that together take no more tokens of these roles than that."""
        chosen: list[Talk] = []
        for talk in self.talks:
            tokens -= talk.tokens(roles)
            if tokens < 0:
                break
            chosen.append(talk)
        ids = {talk.id for talk in chosen}
        return replace(self, talks=tuple(chosen), opinions=tuple(o for o in self.opinions if o.talk in ids))


def tokens_of(usage: Usage) -> int:
    """Prompt and completion."""
    return usage.prompt_tokens + usage.completion_tokens


def _by_role(of: Iterable[dict[str, Usage]]) -> dict[str, Usage]:
    found: dict[str, Usage] = {}
    for usage in of:
        for role, one in usage.items():
            found[role] = found.get(role, Usage()) + one
    return dict(sorted(found.items()))


# --- what nobody told


def is_silent(usage: Usage) -> bool:
    """Whether a role's tokens are unknown, since most of its calls told nothing: an estimate would be a guess
    at most of them. A budget judges likewise (`budget.py`), but sees lost calls apart; shards do not."""
    told = usage.calls - usage.unreported
    return bool(usage.unreported) and (usage.unreported > told or not tokens_of(usage))


def with_estimates(made: RunData) -> RunData:
    """The same, each call that told nothing taken for the average one of its role in this run, but for
    roles that are silent. Looks once: what is cut from the result keeps its estimates."""
    if made.silent is not None:
        return made
    usage = made.usage
    silent = frozenset(role for role, of in usage.items() if is_silent(of))
    talks = tuple(replace(talk, untold=_untold(talk, usage, silent)) for talk in made.talks)
    return replace(made, talks=talks, silent=silent)


def _untold(talk: Talk, told: Mapping[str, Usage], silent: frozenset[str]) -> dict[str, Usage]:
    return {
        role: _average(told[role], usage.unreported)
        for role, usage in talk.usage.items()
        if usage.unreported and role not in silent
    }


def _average(of: Usage, calls: int) -> Usage:
    """So many calls like those that told what they took."""
    times = calls / (of.calls - of.unreported)
    tokens = (round(times * one) for one in (of.prompt_tokens, of.cached_tokens, of.completion_tokens))
    return Usage(calls, *tokens)


# --- read


_TALK = ("id", "number", "culture", "seed_id", "speakers", "usage")
_OPINION = (
    "id", "dialogue_id", "culture", "statement", "persona", "text", "verdict", "kept", "rejected",
    "embedding", "number", "turn", "start",
)  # fmt: skip


def read(run: Run) -> RunData:
    """What the manifest of a run names. Raises RunDirError for a shard that cannot be read."""
    manifest = Manifest.read(run.root / "manifest")
    talks = [_talk(row) for row in rows(run.root, manifest, "dialogues", _TALK)]
    found = [
        ((row["number"], row["turn"], row["start"], row["id"]), _opinion(row))
        for kind in ("samples", "rejected")
        for row in rows(run.root, manifest, kind, _OPINION)
    ]
    found.sort(key=lambda pair: pair[0])
    return RunData(
        run,
        tuple(sorted(talks, key=lambda talk: talk.number)),
        tuple(opinion for _, opinion in found),
        len(run.plan) - len(talks),
    )


def _talk(row: dict[str, Any]) -> Talk:
    stances = (speaker["stance_code"] for speaker in row["speakers"])
    usage = {one.pop("role"): Usage(**one) for one in row["usage"]}
    held = tuple(code for code in stances if code is not None)
    return Talk(row["id"], row["number"], row["culture"], row["seed_id"], held, usage)


def _opinion(row: dict[str, Any]) -> Opinion:
    vector = np.array(row["embedding"], dtype=np.float32) if row["embedding"] else None
    return Opinion(
        row["id"],
        row["dialogue_id"],
        row["culture"],
        row["statement"],
        row["persona"]["stance_label"] or "",
        row["text"],
        row["verdict"] or "",
        row["kept"],
        row["rejected"],
        vector,
    )


class Turn(Struct, frozen=True):
    """A delegate's turn with what was said before it, oldest first and without names: speakers take turns.
    `meets` says whether the other speaker is of another culture."""

    id: str
    talk: str
    culture: str
    other: str
    statement: str
    before: tuple[str, ...]
    text: str

    @property
    def meets(self) -> bool:
        """Whether the other speaker is of another culture."""
        return self.other != self.culture


def sampled_turns(made: RunData, at_most: int, rng_seed: int) -> list[Turn]:
    """A drawn sample of the delegates' turns that something was said before, of finished dialogues."""
    manifest = Manifest.read(made.run.root / "manifest")
    ids = {talk.id for talk in made.talks}
    columns = ("id", "culture", "status", "statement", "speakers", "turns")
    found = (
        turn
        for row in rows(made.run.root, manifest, "dialogues", columns)
        if row["id"] in ids and row["status"] == "finished"
        for turn in _turns(row)
    )
    return sampled(found, at_most, rng_seed, lambda turn: turn.id)


def _turns(row: dict[str, Any]) -> Iterable[Turn]:
    speakers, turns = row["speakers"], row["turns"]
    for place, turn in enumerate(turns):
        if place == 0 or speakers[turn["speaker"]]["stance_code"] is None:
            continue
        other = speakers[1 - turn["speaker"]]["culture"] if len(speakers) > 1 else row["culture"]
        before = tuple(one["text"] for one in turns[:place])
        identity = f"{row['id']}-t{turn['number']}"
        yield Turn(identity, row["id"], row["culture"], other, row["statement"], before, turn["text"])


def sampled(of: Iterable[T], at_most: int, rng_seed: int, id_of: Callable[[T], str]) -> list[T]:
    """As many of these, drawn by the hash of their ids: whatever else there is, and in whichever order."""

    def rank(one: T) -> bytes:
        return hashlib.sha256(f"{rng_seed}:{id_of(one)}".encode()).digest()

    return heapq.nsmallest(at_most, of, key=rank)


def vectors_of(opinions: Sequence[Opinion]) -> Vectors:
    """One row an opinion; all have a vector."""
    found = [one.vector for one in opinions if one.vector is not None]
    return np.stack(found) if found else np.zeros((0, 0), dtype=np.float32)
