"""Our write-ahead log against SQLite, on one disk and in one run: cost of a record, a replaced writer.

    python scripts/bench_log.py                   # both parts, in a temporary directory
    python scripts/bench_log.py --folder DIR      # on the disk of DIR

The first part appends the same records in groups, each group durable before the next (fsync): by our log,
and by SQLite with `synchronous=FULL`, with a rollback journal and with its own write-ahead log. Rounds
alternate.

The second part is what a network file system without working locks allows: a writer stops in the midst of a
group, a second one replaces it and is promised its records, then the first goes on. SQLite gets `nolock=1`
for it, which is what such a file system makes of its locks; ours gets a `flock` that excludes nobody.
"""

from __future__ import annotations

import argparse
import fcntl
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from culturepark.errors import RunDirError
from culturepark.messages import Spoke, Turn, encode
from culturepark.store.lock import RunLock
from culturepark.store.wal import Log, replay
from culturepark.usage import Usage

_TEXT = "My mother always said that elders are to be heard first, since it keeps the peace at home. " * 4
_RECORDS, _GROUPS, _ROUNDS = 6_400, (8, 64), 5
_TAKEN_OVER = 200
_TABLE = "CREATE TABLE IF NOT EXISTS record (id INTEGER PRIMARY KEY, payload BLOB NOT NULL)"
_INSERT = "INSERT INTO record (payload) VALUES (?)"


def _records(count: int) -> list[bytes]:
    turn = Turn(1, 0, _TEXT, "mock", "http://mock/v1", "stop", 1.0, Usage(1, 900, 0, 90))
    return [encode(Spoke(number, 7, turn)) for number in range(count)]


def _by_log(folder: Path, groups: list[list[bytes]]) -> None:
    log = Log.open(folder / "log", epoch=1)
    for group in groups:
        for record in group:
            log.append(record)
        log.sync()
    log.close()


def _by_sqlite(journal: str) -> Callable[[Path, list[list[bytes]]], None]:
    def write(folder: Path, groups: list[list[bytes]]) -> None:
        database = sqlite3.connect(folder / "records.sqlite", isolation_level=None)
        database.execute(f"PRAGMA journal_mode={journal}")
        database.execute("PRAGMA synchronous=FULL")
        database.execute(_TABLE)
        for group in groups:
            database.execute("BEGIN")
            database.executemany(_INSERT, [(record,) for record in group])
            database.execute("COMMIT")
        database.close()

    return write


_SUBJECTS: dict[str, Callable[[Path, list[list[bytes]]], None]] = {
    "our log": _by_log,
    "SQLite, its own log (WAL)": _by_sqlite("WAL"),
    "SQLite, rollback journal": _by_sqlite("DELETE"),
}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cost(parent: Path) -> None:
    """Print what a record costs each subject, by the size of a group."""
    records = _records(_RECORDS)
    print(f"{_RECORDS:,} records of {len(records[0])} bytes, medians of {_ROUNDS} rounds that alternate")
    for size in _GROUPS:
        groups = [records[at : at + size] for at in range(0, len(records), size)]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in _SUBJECTS}
        for _ in range(_ROUNDS):
            for name, write in _SUBJECTS.items():
                with tempfile.TemporaryDirectory(dir=parent) as folder:
                    began, cpu_s = time.monotonic(), _cpu_s()
                    write(Path(folder), groups)
                    found[name].append((time.monotonic() - began, _cpu_s() - cpu_s))
        for name, rounds in found.items():
            wall_s, cpu_s = (statistics.median(values) for values in zip(*rounds, strict=True))
            rate, cpu_us = _RECORDS / wall_s, 1e6 * cpu_s / _RECORDS
            print(
                f"  groups of {size:>2}  {name:<28} {rate:>9,.0f} records/s  {cpu_us:>6.1f} us CPU a record"
            )


def _replaced_in_sqlite(folder: Path) -> str:
    address = f"file:{folder / 'records.sqlite'}?nolock=1"
    first, second = (sqlite3.connect(address, uri=True, isolation_level=None) for _ in range(2))
    first.execute(_TABLE)
    first.execute("BEGIN")
    first.executemany(_INSERT, [(b"first" * 100,) for _ in range(_TAKEN_OVER)])
    try:
        second.execute("BEGIN")
        second.executemany(_INSERT, [(b"second" * 100,) for _ in range(_TAKEN_OVER)])
        second.execute("COMMIT")  # from here on its records are promised
        first.execute("COMMIT")
        told = "the first writer was told that it committed"
    except sqlite3.Error as error:
        told = f"the first writer got {error}"
    reader = sqlite3.connect(folder / "records.sqlite")
    try:
        sound = reader.execute("PRAGMA integrity_check(1)").fetchone()[0]
        kept = reader.execute("SELECT count(*) FROM record WHERE payload LIKE 'second%'").fetchone()[0]
    except sqlite3.Error as error:
        sound, kept = str(error), 0
    return f"{kept} of {_TAKEN_OVER} promised records are there; {told}; integrity check: {sound}"


def _replaced_in_ours(folder: Path) -> str:
    with mock.patch.object(fcntl, "flock"):
        lock = RunLock.acquire(folder)
        first = Log.open(folder / "log", epoch=lock.epoch)
        for _ in range(_TAKEN_OVER):
            first.append(b"first" * 100)
        successor = RunLock.acquire(folder)
        second = Log.open(folder / "log", epoch=successor.epoch)
        for _ in range(_TAKEN_OVER):
            second.append(b"second" * 100)
        second.sync()
        successor.check()  # from here on its records are promised
        first.sync()
        try:
            lock.check()
            told = "the first writer was told that it committed"
        except RunDirError as error:
            told = f"the first writer got {error.what!r}"
    records = [entry.payload for entry in replay(folder / "log", second.names())]
    kept = sum(record.startswith(b"second") for record in records)
    return f"{kept} of {_TAKEN_OVER} promised records are there; {told}"


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a directory on the disk to measure")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory(dir=folder) as name:
        cost(Path(name))
        print("A writer that was replaced goes on, and no lock holds it back")
        for subject, replaced in (("SQLite", _replaced_in_sqlite), ("our log", _replaced_in_ours)):
            place = Path(name) / subject.replace(" ", "-")
            place.mkdir()
            print(f"  {subject:<8} {replaced(place)}")


if __name__ == "__main__":
    main()
