"""A run's data, read from its shards: dialogues with their usage, opinions with their vectors."""

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
from culturepark.usage import Usage, reports_usage, sum_by_role

T = TypeVar("T")

TASK = "quality"
ALL = "all"
"""The subset of all cultures."""


class DialogueData(Struct, frozen=True):
    """One dialogue that is in the shards. `stances` are the answers that its delegates drew. `usage` is the
    reported one, by role; `estimated` is an estimate for the calls whose usage was not reported."""

    id: str
    number: int
    culture: str
    question: str
    stances: tuple[int, ...]
    usage: dict[str, Usage]
    estimated: dict[str, Usage] = {}

    def tokens(self, roles: Iterable[str]) -> int:
        """Tokens of these roles, prompt and completion, reported and estimated."""
        return sum(of[role].tokens for role in roles for of in (self.usage, self.estimated) if role in of)


class Opinion(Struct, frozen=True):
    """One opinion, kept or rejected for a reason. `vector` is None if it was rejected before selection."""

    id: str
    dialogue_id: str
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
    dialogues that are not in the shards. `unmetered` are roles whose tokens are in no sum; None: not
    determined yet (`with_estimated_usage`)."""

    run: Run
    dialogues: tuple[DialogueData, ...]
    opinions: tuple[Opinion, ...]
    owed: int
    unmetered: frozenset[str] | None = None

    @property
    def kept(self) -> list[Opinion]:
        """The samples."""
        return [one for one in self.opinions if one.kept]

    @property
    def cultures(self) -> list[str]:
        """Those with a dialogue, in order of the plan."""
        there = {dialogue.culture for dialogue in self.dialogues}
        return [culture for culture in self.run.plan.planned() if culture in there]

    @property
    def usage(self) -> dict[str, Usage]:
        """The reported usage, by role."""
        return _by_role(dialogue.usage for dialogue in self.dialogues)

    @property
    def estimated(self) -> dict[str, Usage]:
        """The estimated usage of the other calls, by role."""
        return _by_role(dialogue.estimated for dialogue in self.dialogues)

    def only(self, cultures: Iterable[str]) -> RunData:
        """The data of these cultures."""
        wanted, planned = frozenset(cultures), self.run.plan.planned()
        dialogues = tuple(dialogue for dialogue in self.dialogues if dialogue.culture in wanted)
        return replace(
            self,
            dialogues=dialogues,
            opinions=tuple(one for one in self.opinions if one.culture in wanted),
            owed=sum(n for culture, n in planned.items() if culture in wanted) - len(dialogues),
        )

    def up_to(self, tokens: int, roles: frozenset[str]) -> RunData:
        """The first dialogues of the plan that together cost no more than `tokens` of these roles."""
        chosen: list[DialogueData] = []
        for dialogue in self.dialogues:
            tokens -= dialogue.tokens(roles)
            if tokens < 0:
                break
            chosen.append(dialogue)
        ids = {dialogue.id for dialogue in chosen}
        return replace(
            self, dialogues=tuple(chosen), opinions=tuple(o for o in self.opinions if o.dialogue_id in ids)
        )


def _by_role(of: Iterable[dict[str, Usage]]) -> dict[str, Usage]:
    return dict(sorted(sum_by_role(pair for usage in of for pair in usage.items()).items()))


# --- usage that was not reported


def with_estimated_usage(run_data: RunData) -> RunData:
    """The same, where each call without reported usage counts as the average one of its role in this run,
    except for roles that are unmetered: their endpoint reports no usage, so that an estimate would be a guess
    (lost calls included, which shards do not tell apart). Estimates are made once: a part of the result
    keeps them."""
    if run_data.unmetered is not None:
        return run_data
    usage = run_data.usage
    unmetered = frozenset(role for role, of in usage.items() if not reports_usage(of))
    dialogues = tuple(
        replace(dialogue, estimated=_estimated(dialogue, usage, unmetered)) for dialogue in run_data.dialogues
    )
    return replace(run_data, dialogues=dialogues, unmetered=unmetered)


def _estimated(
    dialogue: DialogueData, reported: Mapping[str, Usage], unmetered: frozenset[str]
) -> dict[str, Usage]:
    return {
        role: _average(reported[role], usage.unreported)
        for role, usage in dialogue.usage.items()
        if usage.unreported and role not in unmetered
    }


def _average(of: Usage, calls: int) -> Usage:
    """The usage of `calls` calls like the average reported one."""
    factor = calls / of.reported
    tokens = (round(factor * one) for one in (of.prompt_tokens, of.cached_tokens, of.completion_tokens))
    return Usage(calls, *tokens)


# --- read


_DIALOGUE = ("id", "number", "culture", "seed_id", "speakers", "usage")
_OPINION = (
    "id", "dialogue_id", "culture", "statement", "persona", "text", "verdict", "kept", "rejected",
    "embedding", "number", "turn", "start",
)  # fmt: skip


def read_run_data(run: Run) -> RunData:
    """The data of a run's sealed shards. Raises RunDirError for a shard that cannot be read."""
    manifest = Manifest.read(run.root / "manifest")
    dialogues = [_dialogue(row) for row in rows(run.root, manifest, "dialogues", _DIALOGUE)]
    found = [
        ((row["number"], row["turn"], row["start"], row["id"]), _opinion(row))
        for kind in ("samples", "rejected")
        for row in rows(run.root, manifest, kind, _OPINION)
    ]
    found.sort(key=lambda pair: pair[0])
    return RunData(
        run,
        tuple(sorted(dialogues, key=lambda dialogue: dialogue.number)),
        tuple(opinion for _, opinion in found),
        len(run.plan) - len(dialogues),
    )


def _dialogue(row: dict[str, Any]) -> DialogueData:
    stances = (speaker["stance_code"] for speaker in row["speakers"])
    usage = {one.pop("role"): Usage(**one) for one in row["usage"]}
    held = tuple(code for code in stances if code is not None)
    return DialogueData(row["id"], row["number"], row["culture"], row["seed_id"], held, usage)


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
    """A delegate's turn with what was said before it, oldest first and without names: speakers alternate."""

    id: str
    dialogue_id: str
    culture: str
    other: str
    statement: str
    before: tuple[str, ...]
    text: str

    @property
    def meets(self) -> bool:
        """Whether the other speaker is of another culture."""
        return self.other != self.culture


def sampled_turns(run_data: RunData, at_most: int, rng_seed: int) -> list[Turn]:
    """A random sample of the delegates' turns in finished dialogues, without first turns."""
    manifest = Manifest.read(run_data.run.root / "manifest")
    ids = {dialogue.id for dialogue in run_data.dialogues}
    columns = ("id", "culture", "status", "statement", "speakers", "turns")
    found = (
        turn
        for row in rows(run_data.run.root, manifest, "dialogues", columns)
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
    """At most `at_most` of these, chosen by the hash of their ids: independent of their order, and stable
    when others are added (bottom-k sampling)."""

    def rank(one: T) -> bytes:
        return hashlib.sha256(f"{rng_seed}:{id_of(one)}".encode()).digest()

    return heapq.nsmallest(at_most, of, key=rank)


def vectors_of(opinions: Sequence[Opinion]) -> Vectors:
    """One row for each opinion; all have a vector."""
    found = [one.vector for one in opinions if one.vector is not None]
    return np.stack(found) if found else np.zeros((0, 0), dtype=np.float32)
