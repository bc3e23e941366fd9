"""The audit: does a run directory hold what it says? Every shard, every commit, every count.

Nothing is changed. Memory holds a bit for each dialogue and the opinions of one commit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from culturepark.errors import CultureParkError, RunDirError
from culturepark.messages import Outcome, decode_head
from culturepark.store import funnel as funnels
from culturepark.store.cells import Sealed
from culturepark.store.funnel import Funnel
from culturepark.store.integrity import live_segments, what_is_missing
from culturepark.store.manifest import Entry, Manifest
from culturepark.store.readers import shard_rows
from culturepark.store.rundir import SHARD_DIRS, Run, load_run
from culturepark.store.segments import Damage, scan
from culturepark.store.shards import verify_shard
from culturepark.words import plural

_MOST_NAMED = 20
"""Of the problems of one sort, at most this many are named one by one."""


class Audit(Struct):
    """What was checked, in words, and what is wrong."""

    checked: list[tuple[str, str]]
    problems: list[str]
    complete: bool = False


def check_run(root: Path) -> Audit:
    """Check a whole run directory. Raises RunDirError if there is no run at all."""
    if not (root / "run.json").exists():
        raise RunDirError(
            str(root), "there is no run here.", "Name the directory that `culturepark generate --out` made."
        )
    report = Audit([], [])
    try:
        run = load_run(root)
    except CultureParkError as error:
        report.problems.append(f"{error.where}: {error.what}")
        return report
    report.checked.append(
        ("plan", f"{plural(len(run.plan), 'dialogue')} in {plural(run.plan.n_cells, 'cell')}")
    )
    try:
        # The log before the manifest: what a writer seals in between is then seen twice, not missed.
        logged = _check_log(run, report)
        manifest = Manifest.read(root / "manifest")
    except RunDirError as error:
        report.problems.append(f"{error.where}: {error.what}")
        return report
    report.checked.append(
        ("manifest", f"{plural(len(manifest.entries), 'commit')}, each following the one before")
    )
    if missing := what_is_missing(root, manifest):
        report.problems.append(f"{missing.where}: {missing.what}")
    _Check(run, manifest, logged, report).run()
    return report


def _check_log(run: Run, report: Audit) -> dict[int, Outcome]:
    """The outcomes in the log, by number; damage and repetition become problems."""
    logged: dict[int, Outcome] = {}
    problems: list[str] = []
    for item in scan(run.root / "log", live_segments(run.root)):
        if isinstance(item, Damage):
            hint = " (a crash in the middle of a write leaves this; running again mends it)"
            problems.append(f"{item}{hint if item.kind == 'tail' else ''}")
            continue
        try:
            outcome = decode_head(item.payload)
        except msgspec.MsgspecError as error:
            problems.append(f"log segment {item.segment}, byte {item.offset}: no record ({error})")
            continue
        if not 0 <= outcome.number < len(run.plan):
            problems.append(f"the log holds dialogue {outcome.number}, which the plan does not have")
        elif not isinstance(outcome, Outcome):
            continue  # a turn or a call of a dialogue under way
        elif outcome.number in logged:
            problems.append(f"dialogue {run.plan.brief(outcome.number).id} is in the log twice")
        else:
            logged[outcome.number] = outcome
    report.checked.append(("log", f"{plural(len(logged), 'dialogue')}"))
    report.problems += _first_few(problems)
    return logged


class _Check:
    """The checks of a run whose manifest can be read."""

    def __init__(self, run: Run, manifest: Manifest, logged: Mapping[int, Outcome], report: Audit) -> None:
        self._run = run
        self._plan = run.plan
        self._manifest = manifest
        self._report = report
        self._counts: dict[str, Funnel] = {culture: Counter() for culture in run.plan.planned()}
        self._sealed = bytearray(run.plan.n_cells)
        self._unread: set[str] = set()
        for entry in manifest.entries:
            self._count_entry(entry)
        self._waiting = {n: o for n, o in logged.items() if not self._sealed[run.plan.cell_of(n)]}
        for number, outcome in self._waiting.items():
            funnels.add(self._counts[run.plan.culture_of(number)], funnels.of_outcome(outcome))

    def run(self) -> None:
        """Run every check."""
        self._shards()
        self._strays()
        self._rows()
        total: Funnel = Counter()
        for counts in self._counts.values():
            funnels.add(total, counts)
        self._report.complete = total["finished"] + total["failed"] == len(self._plan)
        self._sums(total)
        if self._summary(total):
            self._datasets()
        self._orphans()

    def _problem(self, words: str) -> None:
        self._report.problems.append(words)

    def _checked(self, name: str, words: str) -> None:
        self._report.checked.append((name, words))

    def _count_entry(self, entry: Entry) -> None:
        """Count what an entry says it sealed; a cell is sealed once."""
        facts = entry.data_as(Sealed)
        for index in facts.cells:
            if not 0 <= index < self._plan.n_cells:
                self._problem(
                    f"manifest entry {entry.number} names cell {index}, which the plan does not have"
                )
            elif self._sealed[index]:
                self._problem(f"manifest entry {entry.number} seals cell {index} a second time")
            else:
                self._sealed[index] = 1
        for culture, counts in facts.funnels.items():
            if culture in self._counts:
                funnels.add(self._counts[culture], counts)
            else:
                self._problem(f"manifest entry {entry.number} counts {culture!r}, which is not in the plan")

    def _shards(self) -> None:
        size = shards = 0
        for entry in self._manifest.entries:
            for shard in entry.shards:
                problems = verify_shard(self._run.root, shard)
                self._report.problems += problems
                if problems:
                    self._unread.add(shard.path)
                shards += 1
                size += shard.bytes
        self._checked("shards", f"{shards:,} files, {size / 1e6:,.1f} MB, sizes, hashes and row counts")

    def _strays(self) -> None:
        root, named = self._run.root, self._manifest.paths
        found = [
            path.relative_to(root).as_posix()
            for kind in SHARD_DIRS
            for path in sorted((root / kind).rglob("*"))
            if path.is_file()
        ]
        strays = [path for path in found if path not in named]
        hint = "no manifest entry names it (a crash leaves this; running again sets it aside)"
        self._report.problems += _first_few([f"{path}: {hint}" for path in strays])

    def _rows(self) -> None:
        """Each dialogue once, under its own id, in a cell of its entry; opinions belong to one."""
        seen = bytearray(len(self._plan))
        dialogues = opinions = 0
        for entry in self._manifest.entries:
            if self._unread.intersection(shard.path for shard in entry.shards):
                continue  # named already; what it holds cannot be counted
            facts = entry.data_as(Sealed)
            counts: dict[str, Funnel] = {}
            stated = self._dialogue_rows(entry, facts, seen, counts)
            found = self._opinion_rows(entry, stated, counts)
            dialogues, opinions = dialogues + len(stated), opinions + found
            self._compare(entry, facts, counts)
        self._checked("rows", f"{dialogues:,} dialogues and {opinions:,} opinions, each once")

    def _dialogue_rows(
        self, entry: Entry, facts: Sealed, seen: bytearray, counts: dict[str, Funnel]
    ) -> dict[str, int]:
        """How many opinions each dialogue of an entry says it has, by id."""
        stated: dict[str, int] = {}
        problems: list[str] = []
        cells = set(facts.cells)
        for row in self._rows_of(entry, "dialogues", ("id", "number", "culture", "status", "n_opinions")):
            number, one = row["number"], row["id"]
            if not 0 <= number < len(self._plan) or self._plan.brief(number).id != one:
                problems.append(
                    f"manifest entry {entry.number}: dialogue {one} is not in the plan as {number}"
                )
                continue
            if seen[number]:
                problems.append(f"dialogue {one} is in the shards twice")
            if self._plan.cell_of(number) not in cells:
                problems.append(f"dialogue {one} is not of the cells of manifest entry {entry.number}")
            if row["culture"] != self._plan.culture_of(number):
                problems.append(f"dialogue {one} is filed under {row['culture']!r}")
            seen[number] = 1
            stated[one] = row["n_opinions"]
            counts.setdefault(row["culture"], Counter())[row["status"]] += 1
        for index in facts.cells:
            if 0 <= index < self._plan.n_cells:
                cell = self._plan.cell(index)
                missing = [n for n in range(cell.first, cell.first + cell.size) if not seen[n]]
                problems += [
                    f"dialogue {self._plan.brief(n).id} is sealed but not in the shards" for n in missing
                ]
        self._report.problems += _first_few(problems)
        return stated

    def _opinion_rows(self, entry: Entry, stated: Mapping[str, int], counts: dict[str, Funnel]) -> int:
        ids: set[str] = set()
        found = Counter[str]()
        problems: list[str] = []
        for kind in ("samples", "rejected"):
            for row in self._rows_of(entry, kind, ("id", "dialogue_id", "culture", "kept", "rejected")):
                if row["id"] in ids:
                    problems.append(f"opinion {row['id']} is there twice")
                ids.add(row["id"])
                found[row["dialogue_id"]] += 1
                if row["kept"] != (kind == "samples"):
                    problems.append(f"opinion {row['id']} is in {kind}/ and should not be")
                into = counts.setdefault(row["culture"], Counter())
                into["extracted"] += 1
                into["kept" if row["kept"] else "rejected"] += 1
                if row["rejected"]:
                    into[f"reason:{row['rejected']}"] += 1
        problems += [
            f"dialogue {one} has {found[one]} opinions in the shards, not {stated.get(one, 0)}"
            for one in sorted({*stated, *found})
            if found[one] != stated.get(one, 0)
        ]
        self._report.problems += _first_few(problems)
        return len(ids)

    def _compare(self, entry: Entry, facts: Sealed, counts: Mapping[str, Funnel]) -> None:
        """The rows of an entry against the counts it states."""
        for culture in sorted({*facts.funnels, *counts}):
            stated, found = facts.funnels.get(culture, {}), counts.get(culture, Counter[str]())
            keys = {"finished", "failed", "extracted", "kept", "rejected"}
            keys |= {key for key in (*stated, *found) if key.startswith("reason:")}
            for key in sorted(keys):
                if stated.get(key, 0) != found[key]:
                    what = f"{culture} has {found[key]} {key.removeprefix('reason:')}"
                    self._problem(
                        f"manifest entry {entry.number}: {what} in its rows, not {stated.get(key, 0)}"
                    )

    def _rows_of(self, entry: Entry, kind: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        for shard in entry.shards:
            if shard.kind == kind:
                yield from shard_rows(self._run.root, shard, columns)

    def _sums(self, total: Funnel) -> None:
        planned = self._plan.planned()
        for culture, counts in sorted(self._counts.items()):
            for problem in funnels.problems(counts, planned[culture], self._report.complete):
                self._problem(f"{culture}: {problem}")
        seen = funnels.view(total, len(self._plan))
        owed = f" + {seen['owed']:,} owed" if seen["owed"] else ""
        waiting = f" + {seen['waiting']:,} waiting" if seen["waiting"] else ""
        self._checked(
            "counts",
            f"{seen['planned']:,} planned = {seen['finished']:,} finished + {seen['failed']:,} failed{owed}; "
            f"{seen['extracted']:,} opinions = "
            f"{seen['kept']:,} kept + {seen['rejected']:,} rejected{waiting}; "
            f"by each of {plural(len(self._counts), 'culture')}",
        )

    def _summary(self, total: Funnel) -> bool:
        """Whether `summary.json` is of this state; that of an earlier stop is no fault."""
        path = self._run.root / "summary.json"
        try:
            summary: Any = json.loads(path.read_bytes())
            stated: tuple[bool, Any, Any, Any] = (
                summary["complete"], summary["total"], summary["cultures"], summary["shards"]
            )  # fmt: skip
        except FileNotFoundError:
            if self._report.complete:
                self._problem("summary.json is missing: running again writes it")
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._problem(f"summary.json cannot be read ({type(error).__name__})")
            return False
        planned = self._plan.planned()
        found = (
            self._report.complete,
            funnels.view(total, len(self._plan)),
            {c: funnels.view(f, planned[c]) for c, f in sorted(self._counts.items())},
            {kind: [shard.path for shard in self._manifest.shards(kind)] for kind in SHARD_DIRS},
        )
        if stated == found:
            self._checked("summary.json", "agrees with what was counted")
            return True
        if stated[0] or found[0]:
            names = ("`complete`", "`total`", "`cultures`", "`shards`")
            differing = [name for name, a, b in zip(names, stated, found, strict=True) if a != b]
            self._problem(f"summary.json does not agree with what was counted, in {', '.join(differing)}")
        else:
            self._checked("summary.json", "is of an earlier stop; the run has gone on since")
        return False

    def _datasets(self) -> None:
        lines = 0
        trained = Counter(
            row["culture"]
            for entry in self._manifest.entries
            for row in self._rows_of(entry, "samples", ("culture", "messages"))
            if row["messages"]
        )
        for culture in self._counts:
            for name in ("chat", "prompt-completion"):
                path = self._run.root / "datasets" / culture / f"{name}.jsonl"
                found = self._lines(path)
                if found is not None and found != trained[culture]:
                    self._problem(f"{self._named(path)}: it has {found} lines, not {trained[culture]}")
                lines += found or 0
        self._checked(
            "datasets/", f"{lines:,} lines in {2 * len(self._counts)} files, two for each training row"
        )

    def _lines(self, path: Path) -> int | None:
        read = 0
        try:
            with path.open("rb") as file:
                for line in file:
                    read += 1
                    json.loads(line)
        except FileNotFoundError:
            self._problem(f"{self._named(path)}: it is missing")
        except (OSError, ValueError):
            self._problem(f"{self._named(path)}: line {read} is not JSON")
        else:
            return read
        return None

    def _orphans(self) -> None:
        files = [path for path in (self._run.root / "orphans").glob("*") if path.is_file()]
        if files:
            self._checked(
                "orphans/", f"{plural(len(files), 'file')} that a crash left, set aside and never read"
            )

    def _named(self, path: Path) -> str:
        return path.relative_to(self._run.root).as_posix()


def _first_few(problems: list[str]) -> list[str]:
    """The first problems of a sort, and how many there are beyond them."""
    rest = len(problems) - _MOST_NAMED
    return [*problems[:_MOST_NAMED], f"... and {rest} more like these"] if rest > 0 else problems
