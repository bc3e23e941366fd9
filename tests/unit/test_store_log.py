"""The log: what a crash, a flipped bit, a full disk and a failed fsync leave of it, byte by byte."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import threading
import tracemalloc
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import pytest

from culturepark.errors import RunDirError
from culturepark.store.segments import (
    MAX_PAYLOAD_BYTES,
    SEGMENT_HEADER,
    Damage,
    LogEntry,
    list_segments,
    replay,
    scan,
    segment_of,
)
from culturepark.store.wal import Log
from tests.faults import Crash, FaultyFiles

HEAD_BYTES = 8
PAYLOADS = [b"the first record", b"", b"x" * 40, b"the fourth", b"the last record"]


def write_log(directory: Path, *segments: list[bytes]) -> None:
    log = Log.open(directory)
    for number, payloads in enumerate(segments):
        if number:
            log.rotate()
        for payload in payloads:
            log.append(payload)
    log.close()


def payloads_of(directory: Path) -> list[bytes]:
    return [entry.payload for entry in replay(directory)]


def damage_of(directory: Path) -> list[Damage]:
    return [item for item in scan(directory) if isinstance(item, Damage)]


def offsets(payloads: list[bytes]) -> list[int]:
    """Where each record begins, and where the last one ends."""
    places = [len(SEGMENT_HEADER)]
    for payload in payloads:
        places.append(places[-1] + HEAD_BYTES + len(payload))
    return places


def path_of(directory: Path, number: int = 1) -> Path:
    """The segment of this number that counts."""
    return next(directory / name for name in list_segments(directory) if segment_of(name)[0] == number)


def put_back(segment: Path, content: bytes) -> None:
    """Make this the only segment of the log."""
    for path in segment.parent.glob("*.wal"):
        path.unlink()
    segment.write_bytes(content)


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_records_come_back_in_order_with_their_places(tmp_path: Path) -> None:
    write_log(tmp_path / "log", PAYLOADS[:2], PAYLOADS[2:])
    write_log(tmp_path / "log", [b"after reopening"])
    first, second = offsets(PAYLOADS[:2]), offsets([*PAYLOADS[2:], b"after reopening"])
    places = [(1, at) for at in first[:-1]] + [(2, at) for at in second[:-1]]
    assert [
        (item.segment, item.offset) for item in scan(tmp_path / "log") if isinstance(item, LogEntry)
    ] == places
    assert payloads_of(tmp_path / "log") == [*PAYLOADS, b"after reopening"]


def test_the_format_on_disk_is_fixed(tmp_path: Path) -> None:
    # Logs of earlier versions must stay readable: these bytes never change.
    write_log(tmp_path / "log", [b"abc"])
    content = path_of(tmp_path / "log").read_bytes()
    assert content.hex() == "435057414c01c9e7" + "03000000" + "335de166" + "616263"


def test_a_log_cut_at_any_byte_of_its_last_record_loses_that_record_only(tmp_path: Path) -> None:
    write_log(tmp_path / "log", PAYLOADS)
    segment = path_of(tmp_path / "log")
    whole = segment.read_bytes()
    start, end = offsets(PAYLOADS)[-2:]
    for cut in range(start + 1, end):
        put_back(segment, whole[:cut])
        log = Log.open(tmp_path / "log")
        log.append(b"new")
        log.close()
        (damage,) = log.damage
        assert damage == Damage("tail", 1, start, cut - start, damage.saved)
        assert (tmp_path / damage.saved).read_bytes() == whole[start:cut]
        assert damage.saved.startswith("orphans/000001-0001.wal.at-")
        assert payloads_of(tmp_path / "log") == [*PAYLOADS[:-1], b"new"]
        assert damage_of(tmp_path / "log") == []


@pytest.mark.parametrize("record", range(len(PAYLOADS)))
def test_a_flipped_bit_is_named_and_costs_one_record(tmp_path: Path, record: int) -> None:
    write_log(tmp_path / "log", PAYLOADS)
    segment = path_of(tmp_path / "log")
    whole = segment.read_bytes()
    start, end = offsets(PAYLOADS)[record : record + 2]
    kind = "tail" if record == len(PAYLOADS) - 1 else "record"
    kept = PAYLOADS[:record] + PAYLOADS[record + 1 :]
    for byte in range(start, end):
        for bit in range(8):
            segment.write_bytes(whole)
            flip(segment, byte, bit)
            assert damage_of(tmp_path / "log") == [Damage(kind, 1, start, end - start)]
            assert payloads_of(tmp_path / "log") == kept
    damaged = segment.read_bytes()
    log = Log.open(tmp_path / "log")
    log.close()
    assert (tmp_path / log.damage[0].saved).read_bytes() == damaged[start:end]
    assert payloads_of(tmp_path / "log") == kept
    assert Log.open(tmp_path / "log").damage == ()


def test_a_wrong_length_that_leads_to_a_record_costs_no_good_one(tmp_path: Path) -> None:
    # One flipped bit makes 1016 into 2040, which ends just where the record after the next begins.
    records = [bytes([number]) * 1016 for number in range(4)]
    write_log(tmp_path / "log", records)
    flip(path_of(tmp_path / "log"), offsets(records)[1] + 1, 2)
    assert payloads_of(tmp_path / "log") == [records[0], records[2], records[3]]


def test_a_payload_that_looks_like_records_is_never_served_as_such(tmp_path: Path) -> None:
    write_log(tmp_path / "forged", [b"forged 1", b"forged 2"])
    forged = path_of(tmp_path / "forged").read_bytes()[len(SEGMENT_HEADER) :]
    write_log(tmp_path / "log", [b"one", forged, b"three"])
    segment = path_of(tmp_path / "log")
    whole = segment.read_bytes()
    start, end = offsets([b"one", forged, b"three"])[1:3]
    for byte in range(start, end):
        segment.write_bytes(whole)
        flip(segment, byte, 3)
        assert payloads_of(tmp_path / "log") == [b"one", b"three"]


def test_damage_over_several_records(tmp_path: Path) -> None:
    places = offsets(PAYLOADS)
    write_log(tmp_path / "log", PAYLOADS, [b"next segment"])
    segment = path_of(tmp_path / "log")
    whole = segment.read_bytes()
    flip(segment, places[2] + 20, 0)
    flip(segment, places[3] + 10, 0)  # two neighbours: lengths are whole, so the next is found
    assert damage_of(tmp_path / "log") == [Damage("record", 1, places[2], places[4] - places[2])]
    assert payloads_of(tmp_path / "log") == [*PAYLOADS[:2], PAYLOADS[4], b"next segment"]
    segment.write_bytes(whole[: places[1]] + bytes(30) + whole[places[1] + 30 :])  # zeros over a length
    rest = Damage("rest", 1, places[1], places[-1] - places[1])
    assert damage_of(tmp_path / "log") == [rest]
    log = Log.open(tmp_path / "log")
    assert str(log.damage[0]).startswith(f"log segment 000001: damaged rest at byte {places[1]}")
    assert (tmp_path / log.damage[0].saved).stat().st_size == rest.bytes
    assert payloads_of(tmp_path / "log") == [PAYLOADS[0], b"next segment"]
    assert damage_of(tmp_path / "log") == []


def test_every_flipped_bit_of_the_header_is_found_and_costs_nothing(tmp_path: Path) -> None:
    write_log(tmp_path / "log", PAYLOADS)
    segment = path_of(tmp_path / "log")
    for byte in range(len(SEGMENT_HEADER)):
        for bit in range(8):
            flip(segment, byte, bit)
            assert damage_of(tmp_path / "log") == [Damage("header", 1, 0, 8)]
            assert payloads_of(tmp_path / "log") == PAYLOADS
            flip(segment, byte, bit)
    flip(segment, 0, 0)
    Log.open(tmp_path / "log").close()
    assert damage_of(tmp_path / "log") == []
    assert payloads_of(tmp_path / "log") == PAYLOADS


def test_another_format_is_refused_not_repaired(tmp_path: Path) -> None:
    write_log(tmp_path / "log", PAYLOADS)
    segment = path_of(tmp_path / "log")
    newer = bytes.fromhex("435057414c02aad7") + segment.read_bytes()[8:]
    segment.write_bytes(newer)
    with pytest.raises(RunDirError, match="has format 2"):
        Log.open(tmp_path / "log")
    assert segment.read_bytes() == newer


@pytest.mark.parametrize("size", range(8))
def test_a_segment_shorter_than_its_header(tmp_path: Path, size: int) -> None:
    write_log(tmp_path / "log", [b"one"], [])
    path_of(tmp_path / "log", 2).write_bytes(SEGMENT_HEADER[:size])
    log = Log.open(tmp_path / "log")
    assert [(damage.kind, damage.segment, damage.bytes) for damage in log.damage] == [("tail", 2, size)]
    log.append(b"two")
    log.close()
    assert payloads_of(tmp_path / "log") == [b"one", b"two"]


def test_a_missing_segment_is_reported(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [b"one"], [b"two"], [b"three"])
    path_of(tmp_path / "log", 2).unlink()
    log = Log.open(tmp_path / "log")
    assert log.damage == (Damage("missing", 2, 0, 0),)
    assert str(log.damage[0]) == "log segment 000002 is missing"
    assert payloads_of(tmp_path / "log") == [b"one", b"three"]


def test_segments_are_dropped_oldest_first_and_never_the_last(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [b"one"], [b"two"], [b"three"])
    log = Log.open(tmp_path / "log")
    for wrong in (2, 3, 4):
        with pytest.raises(ValueError):
            log.drop(wrong)
    log.drop(1)
    log.drop(2)
    with pytest.raises(ValueError):
        log.drop(3)
    assert log.segments() == (3,)
    assert damage_of(tmp_path / "log") == []
    assert payloads_of(tmp_path / "log") == [b"three"]


def test_foreign_files_are_left_alone_and_unfinished_ones_removed(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [b"one"])
    others = ["1.wal", "0000001.wal", "000001-1.wal", "000002-0009.wal.abcd.part", "notes.txt"]
    unfinished = ["000002.wal.abcd.part", "000002-0001.wal.abcd.part", "what.part"]
    for name in (*others, *unfinished):
        (tmp_path / "log" / name).write_text("x")
    log = Log.open(tmp_path / "log")
    assert log.segments() == (1,)
    assert log.damage == ()
    log.remove_replaced()
    assert {path.name for path in (tmp_path / "log").iterdir()} == {*others, "000001-0002.wal"}


def test_readers_change_nothing(tmp_path: Path) -> None:
    assert list(scan(tmp_path / "log")) == []
    assert list(tmp_path.iterdir()) == []
    write_log(tmp_path / "log", PAYLOADS)
    segment = path_of(tmp_path / "log")
    segment.write_bytes(segment.read_bytes()[:-1])
    before = segment.read_bytes()
    assert len(damage_of(tmp_path / "log")) == 1
    assert segment.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_size_tells_what_the_file_will_have(tmp_path: Path) -> None:
    log = Log.open(tmp_path / "log")
    assert log.size_bytes == len(SEGMENT_HEADER)
    log.append(b"12345")
    assert log.size_bytes == len(SEGMENT_HEADER) + HEAD_BYTES + 5
    log.sync()
    assert log.size_bytes == path_of(tmp_path / "log").stat().st_size
    log.rotate()
    assert (log.segment, log.size_bytes) == (2, len(SEGMENT_HEADER))


def test_one_write_and_one_fsync_a_sync_and_none_without_records(tmp_path: Path) -> None:
    files = FaultyFiles(tmp_path)
    log = Log.open(tmp_path / "log", files)
    for payload in PAYLOADS:
        log.append(payload)
    files.calls.clear()
    log.sync()
    log.sync()
    assert files.calls == ["write", "fsync"]


def test_a_record_beyond_the_bound_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    log = Log.open(tmp_path / "log")
    with pytest.raises(ValueError):
        log.append(bytes(MAX_PAYLOAD_BYTES + 1))
    log.append(b"small")
    log.close()
    assert payloads_of(tmp_path / "log") == [b"small"]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_after_a_failure_nothing_more_is_written(tmp_path: Path, call: str) -> None:
    files = FaultyFiles(tmp_path)
    log = Log.open(tmp_path / "log", files)
    log.append(b"acknowledged")
    log.sync()
    log.append(b"in doubt")
    files.fail(call)
    with pytest.raises(RunDirError, match="the disk reported an error"):
        log.sync()
    calls = len(files.calls)
    for act in (log.sync, log.rotate, lambda: log.append(b"more")):
        with pytest.raises(RunDirError, match="an earlier write failed"):
            act()
    assert len(files.calls) == calls  # above all: a failed fsync is not tried again
    log.close()
    Log.open(tmp_path / "log", files)
    seen = payloads_of(tmp_path / "log")
    assert seen[0] == b"acknowledged"
    files.power_loss(Random(0))
    assert payloads_of(tmp_path / "log") == seen


def test_an_interrupt_in_the_middle_of_a_write_poisons_the_log(tmp_path: Path) -> None:
    class Interrupted(FaultyFiles):
        def write(self, fd: int, data: bytes | memoryview) -> None:
            super().write(fd, data)
            if b"in doubt" in bytes(data):
                raise KeyboardInterrupt

    log = Log.open(tmp_path / "log", Interrupted(tmp_path))
    log.append(b"in doubt")
    with pytest.raises(KeyboardInterrupt):
        log.sync()
    with pytest.raises(RunDirError, match="KeyboardInterrupt"):
        log.append(b"more")


def test_a_full_disk_stops_cleanly_and_the_run_resumes_when_space_is_freed(tmp_path: Path) -> None:
    files = FaultyFiles(tmp_path)
    log = Log.open(tmp_path / "log", files)
    files.space_bytes = 3000
    acknowledged: list[bytes] = []

    def fill() -> None:
        for number in range(100):
            record = b"%03d" % number * 30
            log.append(record)
            log.sync()
            acknowledged.append(record)

    with pytest.raises(RunDirError) as caught:
        fill()
    assert caught.value.what == "the disk is full"
    assert caught.value.where.endswith("000001-0001.wal")
    log.close()
    assert len(acknowledged) > 20
    with pytest.raises(RunDirError, match="the disk is full"):
        Log.open(tmp_path / "log", files)
    assert payloads_of(tmp_path / "log") == acknowledged
    files.space_bytes = None
    log = Log.open(tmp_path / "log", files)
    assert [damage.kind for damage in log.damage] == ["tail"]
    log.append(b"after")
    log.sync()
    files.power_loss(Random(0))
    assert payloads_of(tmp_path / "log") == [*acknowledged, b"after"]


def test_no_space_for_a_new_segment_fails_the_log_and_keeps_the_old_one(tmp_path: Path) -> None:
    files = FaultyFiles(tmp_path)
    log = Log.open(tmp_path / "log", files)
    log.append(b"one")
    files.fail("create", errno.ENOSPC)
    with pytest.raises(RunDirError, match="the disk is full"):
        log.rotate()
    with pytest.raises(RunDirError, match="the disk is full"):
        log.append(b"two")
    files.power_loss(Random(0))
    assert payloads_of(tmp_path / "log") == [b"one"]


def test_a_segment_begun_by_another_process_is_not_overwritten(tmp_path: Path) -> None:
    log = Log.open(tmp_path / "log")
    (tmp_path / "log" / "000002-0001.wal").write_bytes(b"another's")
    with pytest.raises(RunDirError, match="another process"):
        log.rotate()
    assert (tmp_path / "log" / "000002-0001.wal").read_bytes() == b"another's"


def test_records_may_be_appended_while_another_thread_syncs(tmp_path: Path) -> None:
    log = Log.open(tmp_path / "log")
    done = threading.Event()

    def syncing() -> None:
        while not done.is_set():
            log.sync()
            log.rotate()

    thread = threading.Thread(target=syncing)
    thread.start()
    records = [b"%d" % number for number in range(3000)]
    for record in records:
        log.append(record)
    done.set()
    thread.join()
    size = log.size_bytes
    log.close()
    assert payloads_of(tmp_path / "log") == records
    assert (tmp_path / "log" / log.names()[-1]).stat().st_size == size


def test_opening_a_log_needs_little_memory(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [bytes(100_000)] * 200)
    tracemalloc.start()
    Log.open(tmp_path / "log").close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000_000


def test_a_segment_that_reads_differently_the_second_time_is_not_rewritten(tmp_path: Path) -> None:
    write_log(tmp_path / "log", PAYLOADS)
    segment = path_of(tmp_path / "log")

    class Unsteady(FaultyFiles):
        def create(self, path: Path) -> int:
            flip(segment, 20, 0)
            return super().create(path)

    with pytest.raises(RunDirError, match="two readings of this file differ"):
        Log.open(tmp_path / "log", Unsteady(tmp_path))
    flip(segment, 20, 0)
    assert payloads_of(tmp_path / "log") == PAYLOADS


def write_until_killed(directory: Path, acknowledged: Connection) -> None:
    log = Log.open(directory)
    for number in itertools.count():
        log.append(b"%d" % number)
        if number % 7 == 6:
            log.sync()
            acknowledged.send(number)
        if number % 70 == 69:
            log.rotate()


def test_a_killed_process_loses_nothing_acknowledged(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=write_until_killed, args=(tmp_path / "log", there))
    process.start()
    last = 0
    while last < 300:
        last = here.recv()
    process.kill()
    process.join()
    while here.poll():
        last = here.recv()
    Log.open(tmp_path / "log").close()
    seen = payloads_of(tmp_path / "log")
    assert len(seen) > last
    assert seen == [b"%d" % number for number in range(len(seen))]


def work(directory: Path, files: FaultyFiles, acknowledged: list[bytes], sent: list[bytes]) -> None:
    """What a collector does, in short. Dropping leaves the acknowledged records to another process."""
    log = Log.open(directory, files)
    for batch in range(4):
        for number in range(3):
            sent.append(b"%d.%d" % (batch, number) * 9)
            log.append(sent[-1])
        if batch % 2:
            log.rotate()
        else:
            log.sync()
        acknowledged[:] = sent
    del acknowledged[:6], sent[:6]
    log.drop(1)
    log.close()


@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_power_loss_at_every_step_and_again_at_every_step_of_the_recovery(
    tmp_path: Path, keep: float
) -> None:
    random = Random(7)
    files = FaultyFiles(tmp_path)
    work(tmp_path / "warm", files, [], [])
    steps = len(files.calls)
    assert steps > 20
    for step in range(steps):
        for second in (0, 2, 4, 6, 8, 12, 100):
            directory = tmp_path / f"{step}-{second}" / "log"
            directory.parent.mkdir()
            files = FaultyFiles(directory.parent)
            files.crash_at(step)
            acknowledged: list[bytes] = []
            sent: list[bytes] = []
            with pytest.raises(Crash):
                work(directory, files, acknowledged, sent)
            files.power_loss(random, keep, holes=second % 4 == 0)
            files.crash_at(second)
            try:
                Log.open(directory, files)
            except Crash:
                files.power_loss(random, keep, holes=second % 4 == 0)
            files.kill()
            Log.open(directory, files)
            seen = payloads_of(directory)
            files.power_loss(random)
            assert payloads_of(directory) == seen
            assert damage_of(directory) == []
            if acknowledged and acknowledged[0] not in seen[:1]:
                assert seen[6:7] == acknowledged[:1]  # the drop was not yet durable
                seen = seen[6:]
            assert seen[: len(acknowledged)] == acknowledged
            extra = iter(sent[len(acknowledged) :])
            assert all(record in extra for record in seen[len(acknowledged) :])
