"""What culturepark costs and how fast it is, beside the bare minimum, on this machine.

    python scripts/bench.py                      every section; with --repeats 1 an hour on two cores
    python scripts/bench.py subjects --json FILE the four subjects alone, as a table and as JSON

Sections:
  subjects   the same dialogues by four subjects in turn: `bare` (aiohttp and msgspec in one process, nothing
             kept: the limit), `dialogues` (culturepark without refinement), `refinement` (culturepark
             whole) and `sdk` (AsyncOpenAI without actors: the usual way)
  flight     2,000 dialogues in flight with 1 s replies, beside `bare`; 10,000 with 5 s replies
  growth     1,000, 4,000 and 16,000 dialogues: CPU per turn, beside what every run takes, and memory
  volume     41,000 samples of all eight cultures with refinement, the published method's whole volume
  collector  samples/s that the collector makes durable; and a disk whose every fsync takes 100 ms
  start      from the command to the first model call, and what it is spent on
  limit      an endpoint that works on 64 requests at once and lets others wait in silence: how much of its
             rate the adaptive limit reaches, and how many requests it keeps in flight
  embedded   whole runs on the model of this machine, against its engine by itself (`bench_embedded.py`)
  prefix     prompt tokens evaluated and time, with prefixes used again and not, on the same engine

But in the last two, model calls go to `mock_endpoint.py` on loopback, in a process of its own whose CPU
does not count. CPU is that of the whole process tree, Ray's own processes included, to the end of the
command; for all subjects alike without what came before the first fifth of the calls, in which processes
are still starting. Nothing is left behind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ray
from measuring import ROOT, Measured, Mock, measure, mock_endpoint, tree_of
from rich.console import Console
from rich.table import Table

from scripts.bench_collector import collector_rate, slow_disk
from scripts.bench_embedded import compare, prefix_cache, print_head

SUBJECTS = ("bare", "dialogues", "refinement", "sdk")
UTTERANCES = 14
QUESTIONS_BY_EIGHT = 380
"""Dialogues of one round of the built-in questions for the eight cultures: never-asked items give none."""
VOLUME_ROUNDS = 24
"""The preset's own."""
EIGHT = ("arabic", "bengali", "chinese", "german", "korean", "portuguese", "spanish", "turkish")

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
"""Into a file or a pipe as wide as the table of subjects needs."""


def generate_command(
    mock: Mock, out: Path, *, refine: bool, in_flight: int, rounds: int, config: str = "", **more: Any
) -> list[str]:
    """`culturepark generate` against the mock endpoint, `rounds` dialogues for each culture and question; a
    `config` keeps its plan and its refinement in all else."""
    sets = {
        "models.chat.engine": '"openai"',
        "models.chat.profile": '"full"',
        "models.chat.model": '"mock"',
        "models.chat.base_urls": f'["{mock.url}/v1"]',
        "models.embedder.engine": '"openai"',
        "models.embedder.model": '"mock"',
        "models.embedder.base_urls": f'["{mock.url}/v1"]',
        "plan.cultures": json.dumps(EIGHT),
        "plan.questions": "[]",
        "plan.dialogues_per_question": rounds,
        "plan.utterances": UTTERANCES,
        "limits.dialogues_in_flight": in_flight,
        "limits.requests_in_flight": 40_000,
        # The mock has no limit to find, and how a limit is found is measured elsewhere (tests/unit).
        "limits.adaptive": "false",
        "refine.enabled": str(refine).lower(),
        # The mock says much the same again and again: looked at as ever, but no reason to end a dialogue.
        "health.looping": '"keep"',
        "health.dies_in_thanks": '"keep"',
        "actors.agents_per_culture": 1,
        "actors.refiners": 1,
        **more,
    }
    if config:
        sets = {key: value for key, value in sets.items() if not key.startswith(("plan.", "refine."))}
        sets["plan.dialogues_per_question"] = rounds
    command = [
        sys.executable,
        "-m",
        "culturepark",
        "generate",
        *([config] if config else []),
        "--out",
        str(out),
    ]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    return command


def run_subject(
    subject: str,
    mock: Mock,
    rounds: int,
    in_flight: int,
    watch: Callable[[int], None] = lambda _: None,
    **more: Any,
) -> Measured:
    """Measure one subject once."""
    dialogues = rounds * QUESTIONS_BY_EIGHT
    if subject in ("bare", "sdk"):
        script = str(ROOT / "scripts" / "bench_subjects.py")
        return measure(
            [sys.executable, script, subject, mock.url, str(dialogues), str(in_flight)], mock, watch
        )
    with tempfile.TemporaryDirectory(prefix="culturepark-bench-") as folder:
        command = generate_command(
            mock,
            Path(folder, "run"),
            refine=subject == "refinement",
            in_flight=in_flight,
            rounds=rounds,
            **more,
        )
        return measure(command, mock, watch)


# --- sections


def subjects(repeats: int, quick: bool) -> dict[str, Any]:
    """The four subjects, interleaved."""
    rounds = {"bare": 20, "dialogues": 20, "refinement": 4, "sdk": 3}
    if quick:
        rounds = {"bare": 4, "dialogues": 4, "refinement": 1, "sdk": 1}
    in_flight = {"bare": 2000, "dialogues": 2000, "refinement": 400, "sdk": 500}
    found: dict[str, list[Measured]] = {subject: [] for subject in SUBJECTS}
    with mock_endpoint("--latency-s", "0.2") as mock:
        for repeat in range(repeats):
            for subject in SUBJECTS:
                one = run_subject(subject, mock, rounds[subject], in_flight[subject])
                found[subject].append(one)
                console.print(
                    f"  {repeat + 1}/{repeats} {subject:<10} {one.cpu_ms_per_call:.3f} CPU ms a call,"
                    f" {one.calls_per_s:,.0f} calls/s"
                )
    ratios = {
        subject: [
            one.cpu_ms_per_call / bare.cpu_ms_per_call
            for one, bare in zip(found[subject], found["bare"], strict=True)
        ]
        for subject in SUBJECTS[1:]
    }
    result: dict[str, Any] = {
        "subjects": {subject: _figures(runs) for subject, runs in found.items()},
        "ratio": {subject: _spread(values) for subject, values in ratios.items()},
    }
    table = Table("subject", "calls", "CPU ms a call", "to bare", "calls/s", "peak RSS MB", "most in flight")
    for subject in SUBJECTS:
        of = result["subjects"][subject]
        ratio = "1" if subject == "bare" else _text(result["ratio"][subject], 2)
        table.add_row(
            subject,
            f"{of['calls']['median']:,.0f}",
            _text(of["cpu_ms_per_call"], 3),
            ratio,
            _text(of["calls_per_s"], 0),
            _text(of["peak_rss_mb"], 0),
            _text(of["max_in_flight"], 0),
        )
    console.print(table)
    return result


def _figures(runs: Sequence[Measured]) -> dict[str, Any]:
    return {
        "cpu_ms_per_call": _spread([one.cpu_ms_per_call for one in runs]),
        "calls_per_s": _spread([one.calls_per_s for one in runs]),
        "steady_calls_per_s": _spread([one.steady_per_s for one in runs]),
        "peak_rss_mb": _spread([one.rss_mb for one in runs]),
        "max_in_flight": _spread([one.max_in_flight for one in runs]),
        "calls": _spread([one.calls for one in runs]),
        "start_s": _spread([one.start_s for one in runs]),
        "request_bytes": _spread([one.request_bytes for one in runs]),
    }


def flight(repeats: int, quick: bool) -> dict[str, Any]:
    """Thousands in flight: the rate beside bare's, and what one dialogue in flight takes of memory."""
    found: dict[str, Any] = {}
    shares: list[float] = []
    with mock_endpoint("--latency-s", "1.0") as mock:
        for _ in range(1 if quick else repeats):
            # Rates of the middle three fifths, where both are under full load.
            bare = run_subject("bare", mock, 16, 2000)
            ours = run_subject("dialogues", mock, 16, 2000)
            shares.append(ours.steady_per_s / bare.steady_per_s)
            console.print(
                f"  2,000 in flight: {ours.steady_per_s:,.0f} turns/s, bare {bare.steady_per_s:,.0f}"
            )
    found["share_of_bare_rate_at_2000"] = _spread(shares)
    if quick:
        return found
    rss: dict[int, Measured] = {}
    for in_flight, rounds in ((1000, 8), (10_000, 40)):
        with mock_endpoint("--latency-s", "5.0" if in_flight > 1000 else "1.0") as mock:
            rss[in_flight] = run_subject("dialogues", mock, rounds, in_flight)
    many = rss[10_000]
    levels = [s.rss_mb for s in many.samples if s.chats > 0.15 * many.calls]
    third = len(levels) // 3
    found["ten_thousand"] = {
        "most_in_flight": many.max_in_flight,
        "turns": many.calls,
        "turns_per_s": many.calls_per_s,
        "peak_rss_mb": many.rss_mb,
        "rss_mb_by_third": [
            statistics.median(levels[:third]),
            statistics.median(levels[third : 2 * third]),
            statistics.median(levels[2 * third :]),
        ],
        "kb_per_dialogue_in_flight": 1024 * (many.rss_mb - rss[1000].rss_mb) / 9000,
    }
    _show("in flight", found)
    return found


def growth(repeats: int, quick: bool) -> dict[str, Any]:
    """CPU per turn and memory as the number of dialogues grows.

    A run takes some CPU whatever its size: Ray and the processes that start. So replies are slow enough for
    all of these to be there after a fifth of the smallest run's calls, and it is told, too, what each turn
    takes that a larger run has more than a smaller one.
    """
    sizes = (3, 11) if quick else (3, 11, 42)  # rounds of 380: about 1,000, 4,000 and 16,000 dialogues
    found: dict[int, list[Measured]] = {rounds: [] for rounds in sizes}
    with mock_endpoint("--latency-s", "0.5") as mock:
        for _ in range(1 if quick else repeats):
            for rounds in sizes:
                found[rounds].append(run_subject("dialogues", mock, rounds, QUESTIONS_BY_EIGHT))
    result: dict[str, Any] = {}
    for rounds, runs in found.items():
        dialogues = rounds * QUESTIONS_BY_EIGHT
        result[str(dialogues)] = {
            "cpu_ms_per_call": _spread([one.cpu_ms_per_call for one in runs]),
            "calls_per_s": _spread([one.calls_per_s for one in runs]),
            "peak_rss_mb": _spread([one.rss_mb for one in runs]),
        }
    for small, big in pairwise(sizes):
        name = f"cpu_ms_per_further_call {small * QUESTIONS_BY_EIGHT} to {big * QUESTIONS_BY_EIGHT}"
        pairs = zip(found[small], found[big], strict=True)
        result[name] = _spread([1000 * _cpu_s_a_call(*pair) for pair in pairs])
    ends = zip(found[sizes[0]], found[sizes[-1]], strict=True)
    whole = [_whole_cpu_s(small) - small.calls * _cpu_s_a_call(small, big) for small, big in ends]
    result["cpu_s_of_any_run"] = _spread(whole)
    _show("growth", result)
    return result


def _whole_cpu_s(run: Measured) -> float:
    return run.start_cpu_s + run.cpu_s


def _cpu_s_a_call(small: Measured, big: Measured) -> float:
    return (_whole_cpu_s(big) - _whole_cpu_s(small)) / (big.calls - small.calls)


def volume(repeats: int, quick: bool) -> dict[str, Any]:
    """The published method's whole volume: 41,000 samples."""
    # The preset: 41,000 samples need as many cells and clusters as the published method has.
    rounds, config = (1, "") if quick else (VOLUME_ROUNDS, str(ROOT / "config" / "paper.toml"))
    with (
        mock_endpoint("--latency-s", "0.2") as mock,
        tempfile.TemporaryDirectory(prefix="culturepark-bench-") as folder,
    ):
        out = Path(folder, "run")
        # A dialogue's refinement asks for dozens of replies at once: no more than files that may be open.
        most = {"limits.requests_in_flight": 8_000}
        command = generate_command(
            mock, out, refine=True, in_flight=1000, rounds=rounds, config=config, **most
        )
        one = measure(command, mock)
        summary = json.loads((out / "summary.json").read_text("utf-8"))
        size_mb = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    total = summary["total"]
    levels = [s.rss_mb for s in one.samples if s.chats > 0.2 * one.calls]
    half = len(levels) // 2
    result = {
        "samples": total["kept"],
        "opinions": total["extracted"],
        "dialogues": total["finished"],
        "problems": summary["problems"],
        "calls": one.calls,
        "minutes": one.wall_s / 60,
        "calls_per_s": one.calls_per_s,
        "turns_per_s": total["turns"] / one.calling_s,
        "samples_per_s": total["kept"] / one.calling_s,
        "cpu_ms_per_call": one.cpu_ms_per_call,
        "peak_rss_mb": one.rss_mb,
        "rss_mb_by_half": [statistics.median(levels[:half]), statistics.median(levels[half:])],
        "mb_on_disk": size_mb,
    }
    _show("volume", result)
    return result


def collector(repeats: int, quick: bool) -> dict[str, Any]:
    """The collector by itself."""
    rates = [collector_rate(2 if quick else 5) for _ in range(repeats)]
    result = {"samples_per_s": _spread(rates), "slow_disk": slow_disk()}
    _show("collector", result)
    return result


def limit(repeats: int, quick: bool) -> dict[str, Any]:
    """The adaptive limit against an endpoint that queues in silence."""
    latency_s = 0.5
    best = _CAPACITY / latency_s
    shares: list[float] = []
    in_flight: list[float] = []
    most: list[float] = []
    with mock_endpoint("--latency-s", str(latency_s), "--capacity", str(_CAPACITY)) as mock:
        for _ in range(1 if quick else repeats):
            one = run_subject(
                "dialogues", mock, 1 if quick else 2, 400, lambda _: None, **{"limits.adaptive": "true"}
            )
            shares.append(one.steady_per_s / best)
            levels = [s.in_flight for s in one.samples if 0.2 * one.calls <= s.chats <= 0.8 * one.calls]
            in_flight.append(statistics.median(levels) / _CAPACITY)
            most.append(max(levels) / _CAPACITY)
    result = {
        "share_of_its_rate": _spread(shares),
        "in_flight_to_capacity": _spread(in_flight),
        "most_in_flight_to_capacity": _spread(most),
    }
    _show(f"limit, capacity {_CAPACITY}", result)
    return result


_CAPACITY = 64


def embedded(repeats: int, quick: bool) -> dict[str, Any]:
    """Whole runs on the embedded engine, against the engine by itself."""
    overrides = ["plan.dialogues_per_question=1" if quick else "plan.dialogues_per_question=16"]
    overrides += ["plan.utterances=6"]
    print_head()
    # A run takes minutes, and there is one for every three of the other subjects'.
    result = compare(overrides, (8,) if quick else (8, 16), 1 if quick else -(-repeats // 3))
    _show("embedded", {name: result[name] for name in ("best", "ratio", "completions_per_s")})
    return result


def prefix(repeats: int, quick: bool) -> dict[str, Any]:
    """What it saves that prompts only grow and stay with one replica."""
    overrides = ["plan.dialogues_per_question=1", f"plan.utterances={4 if quick else 8}"]
    print_head()
    result = prefix_cache(overrides, 1 if quick else repeats)
    shown = ("evaluated_tokens", "cached_share", "wall_s")
    _show("prefix", {name: {k: case[k] for k in shown} for name, case in result["cases"].items()})
    return result


def start(repeats: int, quick: bool) -> dict[str, Any]:
    """From the command to the first model call."""
    phases: dict[str, list[float]] = {}
    cpu: list[float] = []
    with mock_endpoint("--latency-s", "0.2") as mock:
        for _ in range(repeats):
            seen: dict[str, float] = {}
            began = time.monotonic()
            looks = itertools.count()

            def watch(
                pid: int, seen: dict[str, float] = seen, began: float = began, looks: Any = looks
            ) -> None:
                # Looking at all processes takes from what it looks at: a third as often, and no longer than
                # there is something to be seen.
                if len(seen) == len(_SIGNS) or next(looks) % 3:
                    return
                for one in tree_of(pid):
                    try:
                        line = Path(f"/proc/{one}/cmdline").read_bytes().decode("utf-8", "replace")
                    except OSError:
                        continue
                    for sign, name in _SIGNS:
                        if sign in line:
                            seen.setdefault(name, time.monotonic() - began)

            one = run_subject("dialogues", mock, 1, 400, watch)
            cpu.append(one.start_cpu_s)
            seen["first model call"] = one.start_s
            for name, at_s in seen.items():
                phases.setdefault(name, []).append(at_s)
    result = {"reached_s": {name: _spread(at) for name, at in phases.items()}, "cpu_s": _spread(cpu)}
    _show("start", result)
    return result


_SIGNS = (
    ("gcs_server", "Ray begins"),
    ("ray::IDLE", "Ray is there"),
    ("ray::Collector", "the collector is there"),
    ("ray::CulturalAgent", "the first agent is there"),
    ("ray::Moderator", "the moderator is there"),
)
SECTIONS = {
    "subjects": subjects,
    "flight": flight,
    "growth": growth,
    "volume": volume,
    "collector": collector,
    "start": start,
    "limit": limit,
    "embedded": embedded,
    "prefix": prefix,
}


# --- figures


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _text(spread: dict[str, float], digits: int) -> str:
    median, least, most = (f"{spread[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return median if least == most else f"{median} ({least} - {most})"


def _show(title: str, result: dict[str, Any]) -> None:
    table = Table(title, "")
    for name, value in _flat(result):
        table.add_row(name, value)
    console.print(table)


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and set(value) != {"median", "min", "max"}:
        return [line for key, one in value.items() for line in _flat(one, f"{path} {key}".strip())]
    if isinstance(value, dict):
        return [(path, _text(value, 3 if abs(value["median"]) < 10 else 0))]
    if isinstance(value, str):
        return [(path, value)]
    if isinstance(value, list):
        return [(path, ", ".join(f"{one:,.0f}" if isinstance(one, float) else str(one) for one in value))]
    return [(path, f"{value:,.3f}" if isinstance(value, float) and abs(value) < 10 else f"{value:,.0f}")]


def machine() -> dict[str, Any]:
    """What this was measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return {
        "cpus": os.cpu_count(),
        "cpu": model,
        "memory_gb": round(memory_gb),
        "python": platform.python_version(),
        "ray": ray.__version__,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections", nargs="*", choices=[*SECTIONS, []], default=[], help="which to run; all unless told"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is run (3)")
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works")
    given = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "load_before": os.getloadavg()[0]}
    console.print(report["machine"])
    for name in given.sections or SECTIONS:
        console.rule(name)
        result = SECTIONS[name](given.repeats, given.quick)
        report.update(result if name == "subjects" else {name: result})
        if given.json:
            given.json.write_text(json.dumps(report, indent=1), "utf-8")
    if given.json:
        console.print(f"written: {given.json}")


if __name__ == "__main__":
    main()
