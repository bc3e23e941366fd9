"""Shards and manifest: a commit happened wholly or not at all, and every damaged file is named."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec import Struct

from culturepark.errors import RunDirError
from culturepark.store.manifest import Manifest, Shard
from culturepark.store.shards import commit_table, quarantine_strays, verify_shard
from tests.faults import Crash, FaultyFiles


class Facts(Struct):
    segment: int
    cultures: dict[str, int]


def table(rows: int = 3, start: int = 0) -> pa.Table:
    return pa.table(
        {"id": list(range(start, start + rows)), "text": [f"row {start + n}" for n in range(rows)]}
    )


def shard(path: str) -> Shard:
    return Shard(path, 1, 2, "ab", "samples")


def commit(root: Path, manifest: Manifest, number: int, files: FaultyFiles) -> None:
    shards = [
        commit_table(root, f"{kind}/{number:06d}.parquet", table(start=number), kind, files)
        for kind in ("samples", "rejected")
    ]
    manifest.append(shards, {"number": number})


def test_entries_come_back_with_their_shards_and_facts(tmp_path: Path) -> None:
    manifest = Manifest.open(tmp_path / "manifest", epoch=3)
    manifest.append([shard("samples/1.parquet"), shard("rejected/1.parquet")], Facts(7, {"korean": 2}))
    manifest.append([], None)
    again = Manifest.open(tmp_path / "manifest", epoch=4)
    again.append([shard("samples/2.parquet")])
    entries = Manifest.read(tmp_path / "manifest").entries
    assert [(entry.number, entry.epoch) for entry in entries] == [(1, 3), (2, 3), (3, 4)]
    assert entries[0].shards == (shard("samples/1.parquet"), shard("rejected/1.parquet"))
    assert entries[0].data_as(Facts) == Facts(7, {"korean": 2})
    assert entries == again.entries
    assert again.paths == {"samples/1.parquet", "rejected/1.parquet", "samples/2.parquet"}
    assert [item.path for item in again.shards("samples")] == [
        "samples/1.parquet",
        "rejected/1.parquet",
        "samples/2.parquet",
    ]


def test_reading_changes_nothing_and_gives_no_right_to_write(tmp_path: Path) -> None:
    manifest = Manifest.read(tmp_path / "manifest")
    assert manifest.entries == ()
    with pytest.raises(RunDirError, match="opened for reading"):
        manifest.append([])
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_of_an_entry_is_found_and_the_file_named(tmp_path: Path) -> None:
    manifest = Manifest.open(tmp_path, epoch=1)
    manifest.append([shard("samples/1.parquet")], {"n": 1})
    manifest.append([shard("samples/2.parquet")], {"n": 2})
    path = tmp_path / "000001.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(RunDirError) as caught:
                Manifest.read(tmp_path)
            assert caught.value.where == str(path)
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(RunDirError, match="damaged"):
            Manifest.read(tmp_path)
    path.write_bytes(whole)
    assert len(Manifest.read(tmp_path).entries) == 2


def test_a_missing_or_foreign_entry_is_named(tmp_path: Path) -> None:
    for run in ("a", "b"):
        manifest = Manifest.open(tmp_path / run, epoch=1)
        for number in range(3):
            manifest.append([shard(f"samples/{run}{number}.parquet")])
    shutil.copy(tmp_path / "b" / "000002.json", tmp_path / "a" / "000002.json")
    with pytest.raises(RunDirError, match=r"000002\.json: this entry does not follow"):
        Manifest.read(tmp_path / "a")
    shutil.copy(tmp_path / "a" / "000001.json", tmp_path / "a" / "000002.json")
    with pytest.raises(RunDirError, match=r"000002\.json: this entry does not follow"):
        Manifest.read(tmp_path / "a")
    (tmp_path / "a" / "000002.json").unlink()
    with pytest.raises(RunDirError, match=r"000002\.json: this entry of the manifest is missing"):
        Manifest.open(tmp_path / "a", epoch=2)


def test_a_newer_format_is_refused_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from culturepark.store import manifest as module

    manifest = Manifest.open(tmp_path, epoch=1)
    monkeypatch.setattr(module, "SCHEMA", 0)
    manifest.append([])
    with pytest.raises(RunDirError, match="has format 1, and this version reads format 0"):
        Manifest.read(tmp_path)


def test_two_writers_cannot_both_commit(tmp_path: Path) -> None:
    old = Manifest.open(tmp_path, epoch=1)
    new = Manifest.open(tmp_path, epoch=2)
    new.append([shard("samples/new.parquet")])
    with pytest.raises(RunDirError, match="another process has committed"):
        old.append([shard("samples/old.parquet")])
    with pytest.raises(RunDirError, match="an earlier commit failed"):
        old.append([shard("samples/old.parquet")])
    assert Manifest.read(tmp_path).paths == {"samples/new.parquet"}


def test_a_shard_is_named_once(tmp_path: Path) -> None:
    manifest = Manifest.open(tmp_path, epoch=1)
    manifest.append([shard("a")])
    for shards in ([shard("a")], [shard("b"), shard("b")]):
        with pytest.raises(ValueError):
            manifest.append(shards)
    manifest.append([shard("b")])


def test_a_shard_is_what_was_given_and_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    first = commit_table(tmp_path, "samples/1.parquet", table(), "samples")
    second = commit_table(tmp_path, "samples/2.parquet", table(), "samples")
    assert (first.rows, first.sha256) == (3, second.sha256)
    assert pq.read_table(tmp_path / "samples" / "1.parquet").equals(table())
    assert verify_shard(tmp_path, first) == []
    empty = commit_table(tmp_path, "samples/3.parquet", table(0), "samples")
    assert verify_shard(tmp_path, empty) == []


def test_a_shard_is_never_overwritten_and_never_outside(tmp_path: Path) -> None:
    first = commit_table(tmp_path, "samples/1.parquet", table(), "samples")
    with pytest.raises(RunDirError, match="a file of this name exists"):
        commit_table(tmp_path, "samples/1.parquet", table(5), "samples")
    assert verify_shard(tmp_path, first) == []
    for path in ("../out.parquet", "/out.parquet"):
        with pytest.raises(RunDirError, match="out of"):
            commit_table(tmp_path, path, table(), "samples")


def test_what_is_wrong_with_a_shard_is_told(tmp_path: Path) -> None:
    good = commit_table(tmp_path, "samples/1.parquet", table(), "samples")
    path = tmp_path / "samples" / "1.parquet"
    whole = path.read_bytes()
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert verify_shard(tmp_path, good) == [
            "samples/1.parquet: its content has changed (the sha256 differs)"
        ]
    path.write_bytes(whole[:-1])
    assert verify_shard(tmp_path, good) == [
        f"samples/1.parquet: it has {len(whole) - 1} bytes, not {len(whole)}"
    ]
    path.unlink()
    assert verify_shard(tmp_path, good) == ["samples/1.parquet: it is missing"]
    path.mkdir()
    assert "cannot be read" in verify_shard(tmp_path, good)[0]
    outside = Shard("../x", 1, 1, "", "samples")
    assert "leads out of" in verify_shard(tmp_path, outside)[0]


def test_a_shard_that_reads_back_wrong_is_not_published(tmp_path: Path) -> None:
    class Lossy(FaultyFiles):
        def write(self, fd: int, data: bytes | memoryview) -> None:
            super().write(fd, bytes(data[:-9]) + bytes(9))

    with pytest.raises(RunDirError, match="read back, this is not what was written"):
        commit_table(tmp_path, "samples/1.parquet", table(), "samples", Lossy(tmp_path))
    assert list((tmp_path / "samples").iterdir()) == []


def test_a_full_disk_leaves_no_shard_and_no_entry(tmp_path: Path) -> None:
    files = FaultyFiles(tmp_path)
    manifest = Manifest.open(tmp_path / "manifest", 1, files)
    files.space_bytes = 500
    with pytest.raises(RunDirError, match="the disk is full"):
        commit(tmp_path, manifest, 1, files)
    assert list((tmp_path / "samples").iterdir()) == []
    files.fail("write", errno.ENOSPC)
    with pytest.raises(RunDirError, match=r"000001\.json: the disk is full"):
        manifest.append([])
    assert Manifest.read(tmp_path / "manifest").entries == ()


def test_strays_are_moved_aside_and_committed_files_stay(tmp_path: Path) -> None:
    manifest = Manifest.open(tmp_path / "manifest", epoch=1)
    kept = commit_table(tmp_path, "samples/kept.parquet", table(), "samples")
    manifest.append([kept])
    commit_table(tmp_path, "samples/stray.parquet", table(), "samples")
    (tmp_path / "samples" / "korean").mkdir()
    left_over = [
        "samples/a.parquet.12.part",
        "samples/korean/b.parquet",
        "manifest/000002.json.34.part",
        "run.json.56.part",
    ]
    for path in left_over:
        (tmp_path / path).write_text(path)
    (tmp_path / "orphans").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path)
    strays = quarantine_strays(tmp_path / "alias", ["samples", "rejected"], manifest)
    assert [stray.path for stray in strays] == sorted([*left_over, "samples/stray.parquet"])
    for stray in strays:
        assert not (tmp_path / stray.path).exists()
        assert stray.moved_to.startswith("orphans/")
        assert (tmp_path / stray.moved_to).is_file()
    assert verify_shard(tmp_path, kept) == []
    assert quarantine_strays(tmp_path, ["samples"], manifest) == []


def test_committed_shards_stay_when_their_directory_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "samples").symlink_to("elsewhere")
    manifest = Manifest.open(tmp_path / "manifest", epoch=1)
    manifest.append([commit_table(tmp_path, "samples/1.parquet", table(), "samples")])
    assert quarantine_strays(tmp_path, ["samples"], manifest) == []


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_power_loss_at_every_step_of_a_commit(tmp_path: Path, keep: float) -> None:
    random = Random(3)
    step, finished = 0, False
    while not finished:
        root = tmp_path / str(step)
        root.mkdir()
        files = FaultyFiles(root)
        files.crash_at(step)
        committed = 0
        try:
            manifest = Manifest.open(root / "manifest", 1, files)
            for number in (1, 2):
                commit(root, manifest, number, files)
                committed = number
            finished = True
        except Crash:
            step += 1
        files.power_loss(random, keep, holes=step % 2 == 0)
        manifest = Manifest.open(root / "manifest", 2, files)
        assert len(manifest.entries) in {committed, committed + (not finished)}
        for entry in manifest.entries:
            assert [problem for item in entry.shards for problem in verify_shard(root, item)] == []
        files.crash_at(random.randint(0, 8))
        try:
            quarantine_strays(root, ["samples", "rejected"], manifest, files)
        except Crash:
            files.power_loss(random, keep)
        files.kill()
        quarantine_strays(root, ["samples", "rejected"], manifest, files)
        files.power_loss(random)
        present = {path.relative_to(root).as_posix() for path in root.glob("[sr]*/*")}
        assert present == manifest.paths
        manifest = Manifest.open(root / "manifest", 3, files)
        commit(root, manifest, len(manifest.entries) + 1, files)
    assert step > 25


def test_an_entry_seen_after_a_kill_is_durable(tmp_path: Path) -> None:
    files = FaultyFiles(tmp_path)
    manifest = Manifest.open(tmp_path / "manifest", 1, files)
    files.fail("fsync_dir")
    with pytest.raises(RunDirError):
        manifest.append([], {"n": 1})
    files.kill()
    assert len(Manifest.open(tmp_path / "manifest", 2, files).entries) == 1
    files.power_loss(Random(0))
    assert len(Manifest.read(tmp_path / "manifest").entries) == 1
