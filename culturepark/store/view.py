"""Looking into a run directory, finished or not, while changing nothing in it.

Shards hold what is selected and sealed; the log holds what has ended since. A reader sees both.
"""

# pyarrow ships no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from culturepark.errors import ConfigError, RunDirError
from culturepark.messages import Outcome, decode_head
from culturepark.store import funnel as funnels
from culturepark.store.cells import Sealed
from culturepark.store.funnel import Funnel
from culturepark.store.integrity import live_segments
from culturepark.store.manifest import Manifest
from culturepark.store.readers import rows
from culturepark.store.rows import about_of, dialogue_row, opinion_row
from culturepark.store.rundir import load_run
from culturepark.store.segments import replay

_LOOKED_AT = 20_000
"""Opinions looked at when choosing what to show."""


class View:
    """One look at a run directory.

    `funnels` holds counts by culture of all that is durable; opinions in the log count as waiting.
    Raises RunDirError if the directory holds no run, or a damaged one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = load_run(root)
        self.plan = self.run.plan
        # The log before the manifest: what a writer seals in between is then seen twice, not missed.
        heads = (decode_head(entry.payload) for entry in replay(root / "log", live_segments(root)))
        logged = [head for head in heads if isinstance(head, Outcome)]
        self.manifest = Manifest.read(root / "manifest")
        self.funnels: dict[str, Funnel] = {culture: Counter() for culture in self.plan.planned()}
        sealed: set[int] = set()
        for entry in self.manifest.entries:
            facts = entry.data_as(Sealed)
            sealed.update(facts.cells)
            for culture, counts in facts.funnels.items():
                funnels.add(self.funnels[culture], counts)
        self.logged: dict[int, Outcome] = {}
        for outcome in logged:
            if not 0 <= outcome.number < len(self.plan):
                what = f"it holds dialogue {outcome.number}, which the plan does not have."
                raise RunDirError(str(root / "log"), what, "This log belongs to another run.")
            if self.plan.cell_of(outcome.number) not in sealed and outcome.number not in self.logged:
                self.logged[outcome.number] = outcome
                culture = self.plan.culture_of(outcome.number)
                funnels.add(self.funnels[culture], funnels.of_outcome(outcome))
        self.sealed = len(sealed) == self.plan.n_cells
        """Whether every cell is in the shards."""

    @property
    def total(self) -> Funnel:
        """Counts of all cultures together."""
        total: Funnel = Counter()
        for funnel in self.funnels.values():
            funnels.add(total, funnel)
        return total

    @property
    def ended(self) -> int:
        """Dialogues that finished or failed."""
        return self.total["finished"] + self.total["failed"]

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do: all is in shards, and the summary is written."""
        return self.sealed and (self.root / "summary.json").is_file()

    # --- dialogues and opinions as rows

    def dialogue(self, wanted: str) -> dict[str, Any]:
        """The row of the dialogue whose id begins with `wanted`. Raises ConfigError."""
        ids = (row["id"] for row in rows(self.root, self.manifest, "dialogues", ("id",)))
        logged = {self.plan.brief(number).id: number for number in self.logged}
        found = _the_one((*ids, *logged), wanted, "dialogue")
        if found in logged:
            outcome = self.logged[logged[found]]
            return self._row(outcome)
        return next(self._where("dialogues", "id", found))

    def opinions_of(self, dialogue: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of a dialogue's opinions, kept or not, in the order they were said."""
        if dialogue["number"] in self.logged:
            return list(self._logged_opinions(self.logged[dialogue["number"]]))
        found = [
            row
            for kind in ("samples", "rejected")
            for row in self._where(kind, "dialogue_id", dialogue["id"])
        ]
        return sorted(found, key=lambda row: (row["turn"], row["start"], row["id"]))

    def opinion(self, wanted: str) -> dict[str, Any]:
        """The row of the opinion with this id, or with this beginning of one. Raises ConfigError."""
        logged = {row["id"]: row for o in self.logged.values() for row in self._logged_opinions(o)}
        where: dict[str, str] = {}
        for kind in ("samples", "rejected"):
            ids = (row["id"] for row in rows(self.root, self.manifest, kind, ("id",)))
            where.update((one, kind) for one in ids if _fits(one, wanted))
        found = _the_one((*where, *logged), wanted, "sample")
        return logged[found] if found in logged else next(self._where(where[found], "id", found))

    def samples(self, limit: int) -> list[dict[str, Any]]:
        """Some of the samples, of as many cultures as there are."""
        by_culture: dict[str, list[dict[str, Any]]] = {}
        columns = ("id", "culture", "verdict", "messages", "persona", "dialogue_id")
        for row in islice(rows(self.root, self.manifest, "samples", columns), _LOOKED_AT):
            chosen = by_culture.setdefault(row["culture"], [])
            if len(chosen) < limit:
                chosen.append(row)
        turns = [row for place in range(limit) for of in by_culture.values() for row in of[place : place + 1]]
        return turns[:limit]

    def telling_dialogue(self) -> dict[str, Any] | None:
        """A dialogue worth showing: finished, between cultures, with opinions of several fates."""
        verdicts: dict[str, set[str]] = {}
        kept = Counter[str]()
        for kind in ("samples", "rejected"):
            seen = rows(self.root, self.manifest, kind, ("dialogue_id", "first_verdict", "kept"))
            for row in islice(seen, _LOOKED_AT):
                verdicts.setdefault(row["dialogue_id"], set()).add(row["first_verdict"] or "")
                kept[row["dialogue_id"]] += row["kept"]
        columns = ("id", "kind", "status", "number")
        best, best_rank = None, (False, False, False, 0, 0)
        for row in islice(rows(self.root, self.manifest, "dialogues", columns), _LOOKED_AT):
            rank = (
                row["status"] == "finished",
                row["kind"] == "cross",
                kept[row["id"]] > 0,
                len(verdicts.get(row["id"], ())),
                -row["number"],
            )
            if best is None or rank > best_rank:
                best, best_rank = row["id"], rank
        if best is not None:
            return next(self._where("dialogues", "id", best))
        for outcome in self.logged.values():
            if not outcome.failed:
                return self._row(outcome)
        return None

    def some_failures(self, limit: int) -> list[dict[str, Any]]:
        """Some of the failed dialogues, with id, failure and reason."""
        columns = ("id", "status", "failure", "reason")
        sealed = rows(self.root, self.manifest, "dialogues", columns)
        found = list(islice((row for row in sealed if row["status"] == "failed"), limit))
        logged = (o for o in self.logged.values() if o.failed)
        found += [self._row(o) for o in islice(logged, limit)]
        return found[:limit]

    def _row(self, outcome: Outcome) -> dict[str, Any]:
        brief = self.plan.brief(outcome.number)
        return dialogue_row(brief, outcome, about_of(brief, self.run.facts))

    def _where(self, kind: str, column: str, value: str) -> Iterator[dict[str, Any]]:
        for shard in self.manifest.shards(kind):
            path = self.root / shard.path
            try:
                filters = [(column, "==", value)]
                # Nothing in the path is a column: a run may lie in a folder named like `a=b`.
                table: Any = pq.read_table(path, filters=filters, partitioning=None)  # pyright: ignore[reportArgumentType]
                yield from table.to_pylist()
            except (OSError, pa.ArrowException) as error:
                what = f"it cannot be read: {error}."
                raise RunDirError(str(path), what, "Run `culturepark check` on the directory.") from None

    def _logged_opinions(self, outcome: Outcome) -> Iterator[dict[str, Any]]:
        brief = self.plan.brief(outcome.number)
        about = about_of(brief, self.run.facts)
        for opinion in outcome.opinions:
            yield opinion_row(brief, opinion, None, about, self.run.facts, self.plan.cultures)


def _fits(one: str, wanted: str) -> bool:
    """Whether `wanted` is a beginning of the id `one`, or of its dialogue with the rest in full:
    `d265f-t4-o1` is enough for `d265f4fe8c10103a0cf4d-t4-o1`."""
    if one.startswith(wanted):
        return True
    dialogue, _, rest = one.partition("-")
    begins, dash, ends = wanted.partition("-")
    return bool(dash) and dialogue.startswith(begins) and rest == ends


def _the_one(ids: Iterable[str], wanted: str, kind: str) -> str:
    found = [one for one in ids if wanted and _fits(one, wanted)]
    if wanted in found:
        return wanted
    if len(found) == 1:
        return found[0]
    if found:
        what = f"{len(found)} ids begin with {wanted!r}: {', '.join(found[:3])}, ..."
        raise ConfigError(f"--{kind}", what, "Give more of the id.")
    what = f"nothing here has an id that begins with {wanted[:80]!r}."
    raise ConfigError(
        f"--{kind}", what, "`culturepark show DIR` names some; one that has not ended has no words yet."
    )
