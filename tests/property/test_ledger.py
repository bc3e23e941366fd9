"""The ledger: whatever the order, the duplicates and the crashes, the same rows come out once."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from culturepark.errors import RunDirError
from culturepark.messages import (
    RECORD_BYTES,
    Outcome,
    OutcomeStored,
    Spoke,
    Step,
    Turn,
    decode_outcome,
    encode,
    stored,
)
from culturepark.settings import Settings
from culturepark.store import funnel as funnels
from culturepark.store.cells import Sealed
from culturepark.store.integrity import live_segments
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.manifest import Manifest
from culturepark.store.readers import rows
from culturepark.store.rundir import SHARD_DIRS, Run
from culturepark.store.segments import MAX_PAYLOAD_BYTES, replay
from culturepark.usage import Usage
from tests import builders


def settings_of(shard_dialogues: int = 2000) -> Settings:
    return builders.settings(
        plan={
            "cultures": ["arabic", "korean"],
            "questions": list(builders.THREE[:2]),
            "kinds": ["cross", "in-culture"],
            "dialogues_per_question": 5,
            "utterances": 2,
        },
        refine={"cell_dialogues": 2, "clusters": 2, "near_duplicate": 0.95},
        store={"shard_dialogues": shard_dialogues},
    )


class Disk:
    """A run directory whose writer may die at any moment."""

    def __init__(self, root: Path, of: Settings) -> None:
        self.run: Run = builders.run_in(root, of)
        self.lock = RunLock.acquire(root)
        self.ledger = Ledger(self.run, self.lock)

    def crash(self) -> None:
        """The writer is gone without a word; another one continues."""
        self.lock.release()
        self.lock = RunLock.acquire(self.run.root)
        self.ledger = Ledger(self.run, self.lock)

    def finish(self) -> dict[str, list[dict[str, Any]]]:
        """Close, and read all rows back by what does not depend on when they were written."""
        self.ledger.close()
        self.lock.release()
        manifest = Manifest.read(self.run.root / "manifest")
        return {
            kind: sorted(rows(self.run.root, manifest, kind), key=lambda r: r["id"]) for kind in SHARD_DIRS
        }

    def on_disk(self) -> Counter[int]:
        """How often each dialogue is in the manifest or, beside it, in the log."""
        manifest = Manifest.read(self.run.root / "manifest")
        seen = Counter(row["number"] for row in rows(self.run.root, manifest, "dialogues", ("number",)))
        cells = {index for entry in manifest.entries for index in entry.data_as(Sealed).cells}
        for entry in replay(self.run.root / "log", live_segments(self.run.root)):
            number = decode_outcome(entry.payload).number
            if self.run.plan.cell_of(number) not in cells:
                seen[number] += 1
        return seen


def undisturbed(of: Settings) -> dict[str, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(Path(folder) / "run", of)
        for outcome in builders.outcomes(disk.run.plan):
            disk.ledger.append(encode(outcome))
        return disk.finish()


EXPECTED: dict[str, list[dict[str, Any]]] = {}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), shard_dialogues=st.sampled_from([1, 4, 2000]), calm=st.integers(2, 12))
def test_disturbance_changes_nothing(seed: int, shard_dialogues: int, calm: int) -> None:
    if not EXPECTED:
        EXPECTED.update(undisturbed(settings_of()))
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(Path(folder) / "run", settings_of(shard_dialogues))
        outcomes = builders.outcomes(disk.run.plan)
        owed = [*outcomes, *dice.sample(outcomes, 6)]
        dice.shuffle(owed)
        acknowledged: set[int] = set()
        while owed:
            outcome = owed.pop()
            known = disk.ledger.has(outcome.number)
            new = disk.ledger.append(encode(outcome))
            assert not (known and new)
            if not dice.randrange(3):
                done = disk.ledger.sync()
                assert not acknowledged & set(done)
                acknowledged |= set(done)
            if not dice.randrange(calm):
                disk.crash()
                # Nothing that was acknowledged is lost; what was not is asked for again.
                assert acknowledged <= {o.number for o in outcomes if disk.ledger.has(o.number)}
                bits = np.unpackbits(np.frombuffer(disk.ledger.done(), np.uint8), count=len(outcomes))
                assert [bool(bit) for bit in bits] == [disk.ledger.has(n) for n in range(len(outcomes))]
                owed += [o for o in outcomes if not disk.ledger.has(o.number) and o not in owed]
                acknowledged = {n for n in range(len(outcomes)) if bits[n]}
        found = disk.finish()
        assert disk.on_disk() == dict.fromkeys(range(len(outcomes)), 1)
        for kind in SHARD_DIRS:
            assert found[kind] == EXPECTED[kind]
        for culture, planned in disk.run.plan.planned().items():
            assert funnels.problems(disk.ledger.funnels[culture], planned, whole=True) == []


def test_the_rows_hold_what_was_said_and_decided(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of())
    outcomes = builders.outcomes(disk.run.plan)
    for outcome in outcomes:
        disk.ledger.append(encode(outcome))
    found = disk.finish()
    assert [row["number"] for row in sorted(found["dialogues"], key=lambda r: r["number"])] == list(range(20))
    by_id = {row["id"]: row for row in (*found["samples"], *found["rejected"])}
    extracted = [opinion for outcome in outcomes for opinion in outcome.opinions]
    assert len(by_id) == len(extracted) == len(found["samples"]) + len(found["rejected"])
    reasons = {row["rejected"] for row in found["rejected"]}
    assert reasons >= {"cluster", "near_duplicate", "too_short", "contradicts"}
    for opinion in extracted:
        row = by_id[opinion.id]
        assert row["text"] == opinion.text
        assert bool(row["rejected"]) != row["kept"]
        assert len(row["messages"]) == (3 if row["kept"] else 0)
        assert np.float32(row["embedding"]).tobytes() == opinion.vector
        if row["instead"]:
            assert by_id[row["instead"]]["culture"] == row["culture"]
    failed = [row for row in found["dialogues"] if row["status"] == "failed"]
    assert failed
    assert all(row["failure"] == "timeout" and row["reason"] for row in failed)


def test_a_cell_waits_for_its_predecessor_whichever_was_faster(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of(shard_dialogues=1))
    plan = disk.run.plan
    outcomes = builders.outcomes(plan)
    first, *later = [plan.cell(i) for i in range(plan.n_cells) if plan.cell(i).culture == "arabic"]
    for cell in later:
        for number in range(cell.first, cell.first + cell.size):
            disk.ledger.append(encode(outcomes[number]))
    disk.ledger.sync()
    assert not Manifest.read(disk.run.root / "manifest").entries
    assert disk.ledger.waiting == sum(cell.size for cell in later)
    for number in range(first.first, first.first + first.size):
        disk.ledger.append(encode(outcomes[number]))
    disk.ledger.sync()
    assert disk.ledger.waiting == 0
    assert (
        sum(disk.ledger.funnels["arabic"][key] for key in ("finished", "failed")) == plan.planned()["arabic"]
    )


def test_what_is_sealed_leaves_the_log(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of(shard_dialogues=4))
    for outcome in builders.outcomes(disk.run.plan):
        disk.ledger.append(encode(outcome))
        disk.ledger.sync()
    disk.finish()
    assert not list(replay(disk.run.root / "log", live_segments(disk.run.root)))
    assert len(list((disk.run.root / "log").iterdir())) == 1


def test_a_log_of_another_run_is_refused(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of())
    stranger = msgspec.structs.replace(builders.outcomes(disk.run.plan)[0], number=19)
    disk.ledger.append(encode(stranger))
    disk.ledger.sync()
    disk.lock.release()
    small = builders.settings(
        plan={"cultures": ["arabic"], "questions": ["wvs7-q28"], "dialogues_per_question": 2}
    )
    other = builders.run_in(tmp_path / "other", small)
    for name in ("log", "manifest"):
        (tmp_path / "other" / name).symlink_to(tmp_path / "run" / name)
    with RunLock.acquire(other.root) as lock, pytest.raises(RunDirError, match="dialogue 19"):
        Ledger(other, lock)


def test_a_writer_that_was_replaced_cannot_go_on(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of())
    outcome = builders.outcomes(disk.run.plan)[0]
    disk.ledger.append(encode(outcome))
    disk.lock.release()
    with RunLock.acquire(disk.run.root), pytest.raises(RunDirError):
        disk.ledger.sync()


def test_old_bytes_still_read() -> None:
    """An outcome as the first version of the format wrote it."""
    raw = (Path(__file__).parent.parent / "data" / "outcome-schema1.msgpack").read_bytes()
    outcome = decode_outcome(raw)
    assert (outcome.number, outcome.schema, outcome.failed) == (7, 1, "")
    assert [(t.number, t.speaker) for t in outcome.turns] == [(1, 0), (2, 1)]
    assert outcome.turns[0].usage.cached_tokens == 2
    opinion = outcome.opinions[0]
    assert (opinion.first_verdict, opinion.verdict, opinion.rewritten) == ("contradicts", "entails", True)
    assert np.frombuffer(opinion.vector, np.float32).tolist() == [0.5, -0.5]
    assert outcome.usage["speaker"].calls == 2
    assert outcome.notes == ("turn 2: a note",)
    assert isinstance(outcome, Outcome)


def said(number: int, turn: int, term: int = 7, text: str = "so it is") -> bytes:
    return encode(Spoke(number, term, Turn(turn, (turn - 1) % 2, text, usage=Usage(1, 10, 0, 5))))


def test_a_dialogue_under_way_is_known_by_its_turns_and_paid_calls(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of())
    disk.ledger.begin(7)
    step = Step(number=3, key=b"k", role="verifier", usage=Usage(1, 100), text="entails")
    records = [said(3, 1), said(3, 2), said(3, 2), said(3, 4), said(4, 1, term=6), encode(step), encode(step)]
    for raw in records:  # a turn comes twice, one skips another, one is of another term
        disk.ledger.append(raw)
    disk.ledger.sync()
    disk.crash()
    (begun,) = disk.ledger.begin(8)
    assert (begun.number, [t.number for t in begun.turns]) == (3, [1, 2])
    assert begun.steps == (step,)
    assert disk.ledger.spent() == {"speaker": Usage(2, 20, 0, 10), "verifier": Usage(1, 100)}
    disk.ledger.append(said(3, 3, term=7))  # from before the crash: another conductor conducts now
    disk.ledger.append(said(3, 3, term=8, text="and goes on"))
    disk.ledger.sync()
    (begun,) = disk.ledger.in_progress([3, 4])
    assert [t.text for t in begun.turns] == ["so it is", "so it is", "and goes on"]
    # Its outcome says what it took in all; nothing of it is counted twice.
    usage = {"speaker": Usage(3, 30, 0, 15), "verifier": Usage(1, 100)}
    disk.ledger.append(encode(Outcome(3, begun.turns, usage=usage)))
    disk.ledger.sync()
    assert disk.ledger.in_progress([3]) == []
    assert disk.ledger.spent() == usage
    disk.ledger.append(said(3, 4, term=8))
    disk.crash()
    assert disk.ledger.spent() == usage


def test_turns_count_on_after_the_collector_alone_was_restarted(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of(shard_dialogues=1))
    disk.ledger.begin(7)
    disk.ledger.append(said(19, 1))
    disk.ledger.sync()
    disk.crash()  # the moderator lives on, and does not begin again
    disk.ledger.append(said(19, 2))
    for outcome in builders.outcomes(disk.run.plan)[:19]:  # segments come and go; the term stays
        disk.ledger.append(encode(outcome))
        disk.ledger.sync()
    disk.crash()
    disk.ledger.append(said(19, 3))
    disk.ledger.append(said(19, 4, term=6))  # of a moderator that was replaced
    disk.ledger.sync()
    disk.crash()
    (begun,) = disk.ledger.begin(8)
    assert [turn.number for turn in begun.turns] == [1, 2, 3]
    disk.ledger.append(said(19, 4, term=7))
    assert len(disk.ledger.in_progress([19])[0].turns) == 3


def test_no_turn_is_accepted_while_no_term_is_known(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of())
    with pytest.raises(RunDirError, match="no moderator has begun"):
        disk.ledger.append(said(3, 1))


def test_what_calls_took_that_brought_nothing_is_counted_once(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of())
    disk.ledger.begin(7)
    lost = [Step(3, key, "speaker", Usage(2, 20, unreported=1), only_usage=True) for key in (b"a", b"b")]
    for one in (*lost, lost[0]):
        disk.ledger.append(encode(one))
    disk.ledger.sync()
    assert disk.ledger.spent() == {"speaker": Usage(4, 40, unreported=2)}
    disk.crash()
    (begun,) = disk.ledger.begin(8)
    assert (begun.number, begun.turns, begun.steps) == (3, (), tuple(lost))
    usage = {"speaker": Usage(5, 50, unreported=2)}
    disk.ledger.append(encode(Outcome(3, (), usage=usage)))
    disk.ledger.append(encode(lost[0]))  # late
    disk.ledger.sync()
    assert disk.ledger.spent() == usage


def test_an_outcome_that_no_record_can_hold_is_a_failed_one(tmp_path: Path) -> None:
    assert RECORD_BYTES == MAX_PAYLOAD_BYTES
    turns = tuple(Turn(i + 1, i % 2, "x" * (4 << 20), usage=Usage(1)) for i in range(16))
    disk = Disk(tmp_path / "run", settings_of())
    disk.ledger.begin(1)
    raw = encode(Outcome(3, turns, usage={"speaker": Usage(16)}))
    assert stored(raw) == OutcomeStored(3, "too_large")  # what the conductor is told
    recorded = disk.ledger.append(raw)
    assert recorded is not None
    assert (recorded.failed, recorded.turns, recorded.usage) == ("too_large", (), {"speaker": Usage(16)})
    assert "max_tokens" in recorded.reason
    disk.ledger.sync()


def test_a_segment_stays_while_a_dialogue_that_began_in_it_is_under_way(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run", settings_of(shard_dialogues=1))
    outcomes = builders.outcomes(disk.run.plan)
    disk.ledger.begin(7)
    disk.ledger.append(said(len(outcomes) - 1, 1))
    for outcome in outcomes[:-1]:
        disk.ledger.append(encode(outcome))
        disk.ledger.sync()
    disk.crash()
    (begun,) = disk.ledger.begin(8)
    assert (begun.number, len(begun.turns)) == (len(outcomes) - 1, 1)
