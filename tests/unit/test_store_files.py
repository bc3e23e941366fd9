"""Files appear whole or not at all, whatever fails and wherever the process dies."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from random import Random

import pytest

from culturepark.errors import RunDirError
from culturepark.store.files import REAL, disk_errors, make_dirs, write_atomically, write_new, write_view
from culturepark.store.paths import inside, safe_name
from tests.faults import Crash, FaultyFiles


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_crash_leaves_the_old_content_or_the_new(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "run.json"
    written = False
    for call in range(10):
        path.write_bytes(b"old content")
        files = FaultyFiles(tmp_path)
        files.crash_at(call)
        try:
            write_atomically(path, b"new content, longer", files)
            written = True
        except Crash:
            written = False
        files.power_loss(Random(call), keep, holes=True)
        assert path.read_bytes() in (
            {b"new content, longer"} if written else {b"old content", b"new content, longer"}
        )
    assert written


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_crash_leaves_no_new_file_or_a_whole_one(tmp_path: Path, keep: float) -> None:
    written = False
    for call in range(10):
        path = tmp_path / f"{call}.json"
        files = FaultyFiles(tmp_path)
        files.crash_at(call)
        try:
            write_new(path, [b"first half, ", b"second half"], files)
            written = True
        except Crash:
            written = False
        files.power_loss(Random(call), keep, holes=True)
        assert path.exists() or not written
        assert not path.exists() or path.read_bytes() == b"first half, second half"
    assert written


def test_a_view_is_whole_for_its_readers_and_may_be_lost_with_the_power(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    for call in range(6):
        files = FaultyFiles(tmp_path)
        write_view(path, b"old content", files)
        files.crash_at(call)
        try:
            write_view(path, b"new content, longer", files)
            written = True
        except Crash:
            written = False
        files.kill()
        assert path.read_bytes() in {b"new content, longer", b"old content"}
        assert written or path.read_bytes() == b"old content"
        assert "fsync" not in files.calls
        files.power_loss(Random(call), keep=0.5, holes=True)
        write_view(path, b"another", files)  # whatever is there now
        assert path.read_bytes() == b"another"
        assert [found.name for found in tmp_path.iterdir()] == ["status.json"]
        path.unlink()
    assert written


@pytest.mark.parametrize("call", ["create", "write", "fsync", "link", "close"])
def test_a_failure_leaves_nothing_behind_and_says_what_to_do(tmp_path: Path, call: str) -> None:
    files = FaultyFiles(tmp_path)
    files.fail(call, errno.ENOSPC)
    with pytest.raises(RunDirError) as caught:
        write_new(tmp_path / "a", b"data", files)
    assert caught.value.where == str(tmp_path / "a")
    assert caught.value.what == "the disk is full"
    assert "space" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_never_overwritten_by_a_new_one(tmp_path: Path) -> None:
    write_new(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_lost_answer_to_our_own_link_is_not_taken_for_another_writer(tmp_path: Path) -> None:
    class Twice(FaultyFiles):
        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            super().link(source, target)  # as NFS does when the first answer was lost

    write_new(tmp_path / "a", b"ours", Twice(tmp_path))
    assert (tmp_path / "a").read_bytes() == b"ours"


def test_a_check_sees_the_content_before_anybody_else_does(tmp_path: Path) -> None:
    def refuse(part: Path) -> None:
        assert part.read_bytes() == b"data"
        assert not (tmp_path / "a").exists()
        raise RunDirError("a", "not good")

    with pytest.raises(RunDirError, match="not good"):
        write_new(tmp_path / "a", b"data", check=refuse)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_really_full_disk() -> None:
    path = Path("/dev/full")
    fd = REAL.append_to(path)
    try:
        with pytest.raises(RunDirError, match="the disk is full"), disk_errors(path):
            REAL.write(fd, b"data")
    finally:
        REAL.close(fd)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:3]))
    write_atomically(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_directories_are_durable_even_if_a_killed_process_made_them(tmp_path: Path) -> None:
    files = FaultyFiles(tmp_path)
    files.crash_at(1)  # the directory is made, and not yet fsynced into its parent
    with pytest.raises(Crash):
        make_dirs(tmp_path / "log", files)
    files.kill()
    make_dirs(tmp_path / "log", files)
    files.power_loss(Random(0))
    assert (tmp_path / "log").is_dir()


def test_a_file_where_a_directory_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    with pytest.raises(RunDirError, match=r"log: a file stands"):
        make_dirs(tmp_path / "log" / "deeper")


@pytest.mark.parametrize("name", ["a", "0", "wvs7-q1", "a" * 64])
def test_good_names(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-a",
        "A",
        "a/b",
        "..",
        "../a",
        "/a",
        "a\n",
        "a\0",
        "a.b",
        "a b",
        "a" * 65,
        "\u0430",
        "a\u202eb",
        "\uff41",
    ],
)
def test_bad_names_are_refused_and_shown_harmlessly(name: str) -> None:
    with pytest.raises(RunDirError) as caught:
        safe_name(name)
    assert str(caught.value).isascii()


def test_paths_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (tmp_path / "alias").symlink_to(root)
    assert inside(tmp_path / "alias", "samples/a.parquet") == root / "samples" / "a.parquet"
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    for path in ["", ".", "..", "../run2/a", "/etc/passwd", "out/a", "a/../..", "a\0b", "loop/a"]:
        with pytest.raises(RunDirError):
            inside(root, path)
