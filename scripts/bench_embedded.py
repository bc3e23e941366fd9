"""The speed of whole runs on the embedded model, against what its engine can do by itself.

    python scripts/bench_embedded.py --json results.json
    python scripts/bench_embedded.py --prefix-cache --per-question 1 --utterances 8 --json prefix.json

The first compares (a) a bare client that holds the same dialogues on the packaged model, with no actors, no
refinement but the same rewriting requests, and nothing kept, at the best concurrency that was found, of one
server with all CPUs and of a server for each CPU, and (b) `culturepark generate`, refinement and embedder
beside it. They work in turn, ten seconds each, so that both find the machine as fast as the other does; time
in which one is stopped does not count. The second measures what it saves that prompts only grow and stay with
one replica.

CPU time that other programs took meanwhile is given beside each figure ("others"): the engine's
threads wait for each other, so a neighbour costs more than its share. Needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp
import msgspec
import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]
from measuring import ROOT, cpu_s_of, tree_of
from msgspec import Struct
from msgspec.structs import asdict, replace
from turns import Turns

from culturepark.cultures import load_cultures
from culturepark.dialogue.speaker import CulturalSpeaker
from culturepark.messages import Ask, Spoke
from culturepark.models.local import engine as embedded
from culturepark.models.local.catalog import PACKAGED, known_models
from culturepark.models.local.engine import servers_of
from culturepark.plan import Plan
from culturepark.ports import Completion, Prompt, Sampling
from culturepark.prompts.registry import profile_named
from culturepark.refine.wording import first_person, without_lead_in
from culturepark.seeds import load_seeds
from culturepark.settings import ModelSettings, Settings
from culturepark.settings_load import load_settings
from culturepark.text import unquoted
from culturepark.usage import Usage

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_POLL_S = 2.0
"""Seconds between samples of a run's processes, since each sample costs CPU, too."""
_PROFILE = profile_named("small")

Request = tuple[Prompt, Sampling]
"""A prompt and how its reply is sampled."""


class Figures(Struct, frozen=True):
    """One measurement. Cores are mean numbers of CPUs kept busy; `cached_share` is of prompt tokens."""

    name: str
    completion_tokens: int
    evaluated_tokens: int
    cached_share: float
    wall_s: float
    engine_cores: float
    others_cores: float

    @property
    def completions_per_s(self) -> float:
        """Completion tokens a second."""
        return self.completion_tokens / self.wall_s

    @property
    def processed_per_s(self) -> float:
        """Tokens a second that the engine had to work on: completions, and prompts not in its cache."""
        return (self.completion_tokens + self.evaluated_tokens) / self.wall_s


class RunFigures(Struct, frozen=True):
    """A whole run: while the engine was asked, and what surrounds that. CPU is in seconds."""

    asked: Figures
    command_s: float
    engine_cpu_s: float
    embedder_cpu_s: float
    rest_cpu_s: float


class Rewritten(Struct, frozen=True):
    """An opinion that a run had rewritten, as far as it says what was asked for."""

    dialogue_id: str
    turn: int
    extracted: str


# --- the engine by itself


class Engine(NamedTuple):
    """A process that serves the packaged model: the base URLs of its servers, and its id."""

    urls: list[str]
    pid: int


@contextmanager
def engine(servers: Sequence[ModelSettings]) -> Iterator[Engine]:
    """The package's chat servers in a process of their own, new and with nothing cached."""
    command = [sys.executable, __file__, "--serve", msgspec.json.encode(servers).decode()]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        urls = process.stdout.readline().split()
        if not urls:
            raise SystemExit("The engine did not start; try `culturepark doctor`.")
        yield Engine(urls, process.pid)
    finally:
        process.kill()
        process.wait()


def serve(models: str) -> None:
    """Be that process, until it is ended."""
    parts = msgspec.json.decode(models, type=list[ModelSettings])
    servers = embedded.serve(parts, [0] * len(parts))
    print(*(server.url for server in servers), flush=True)
    sys.stdin.read()
    os._exit(0)


class BareModel:
    """A chat model with nothing around its request. Implements ports.ChatModel; counts tokens."""

    def __init__(self, choose: Callable[[str], str], reuse: bool) -> None:
        self._choose = choose
        self._reuse = reuse
        self.session: aiohttp.ClientSession
        self.usage = Usage()

    async def complete(
        self, prompt: Prompt, sampling: Sampling, *, affinity: str, schema: dict[str, Any] | None = None
    ) -> Completion:
        """Answer `prompt`. Raises RuntimeError if the engine does not."""
        fields: dict[str, Any] = {
            "messages": prompt.messages(),
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            "stop": sampling.stop,
            "cache_prompt": self._reuse,
            **sampling.extra,
        }
        url = f"{self._choose(affinity)}/chat/completions"
        headers = {"Content-Type": "application/json"}
        async with self.session.post(url, data=msgspec.json.encode(fields), headers=headers) as response:
            reply: Any = msgspec.json.decode(await response.read())
        if response.status != 200:
            raise RuntimeError(f"the engine answered {response.status}: {reply}")
        told, choice = reply["usage"], reply["choices"][0]
        cached = told["prompt_tokens_details"]["cached_tokens"]
        usage = Usage(1, told["prompt_tokens"], cached, told["completion_tokens"])
        self.usage += usage
        return Completion(choice["message"]["content"], usage, choice["finish_reason"], "", url, 0.0)


async def _hold_dialogues(
    model: BareModel, settings: Settings, plan: Plan, rewrites: Sequence[Sequence[Request]], in_flight: int
) -> None:
    """Hold the plan's dialogues, `in_flight` at once; after each, one of the `rewrites` in turn."""
    speaker = CulturalSpeaker(plan, settings, model, _PROFILE)
    numbers = iter(range(len(plan)))

    async def hold() -> None:
        for number in numbers:
            heard = ""
            for turn in range(1, plan.utterances_of(number) + 1):
                answer = await speaker.speak(Ask(number, 0, turn, heard))
                if not isinstance(answer, Spoke):
                    break  # the model had nothing to say twice over; a run would count it as failed
                heard = answer.turn.text
            for prompt, sampling in rewrites[number % len(rewrites)]:
                await model.complete(prompt, sampling, affinity=plan.brief(number).affinity)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as model.session:
        await asyncio.gather(*(hold() for _ in range(in_flight)))


def bare(
    name: str,
    settings: Settings,
    rewrites: Sequence[Sequence[Request]],
    in_flight: int,
    served: Engine,
    *,
    sticky: bool = True,
    reuse: bool = True,
) -> Figures:
    """Measure the bare client. A dialogue stays with one server if `sticky`; else each call draws one."""
    rng = random.Random(1)
    urls = served.urls
    homes: dict[str, str] = {}

    def choose(affinity: str) -> str:
        # In turn, so that each server gets its share of these few dialogues, and of each kind of them.
        turn, place = divmod(len(homes), len(urls))
        return homes.setdefault(affinity, urls[(turn + place) % len(urls)]) if sticky else rng.choice(urls)

    model, plan = BareModel(choose, reuse), plan_of(settings)
    pids = [os.getpid(), served.pid]
    busy, own, engine_s = _busy_s(), sum(map(cpu_s_of, pids)), cpu_s_of(served.pid)
    began = time.monotonic()
    asyncio.run(_hold_dialogues(model, settings, plan, rewrites, in_flight))
    wall_s = time.monotonic() - began
    engine_s = cpu_s_of(served.pid) - engine_s
    others_s = _busy_s() - busy - (sum(map(cpu_s_of, pids)) - own)
    return _figures(name, model.usage, wall_s, engine_s, others_s)


def _figures(name: str, usage: Usage, wall_s: float, engine_s: float, others_s: float) -> Figures:
    evaluated = usage.prompt_tokens - usage.cached_tokens
    cached = usage.cached_tokens / max(1, usage.prompt_tokens)
    cores = round(engine_s / wall_s, 2), round(max(0.0, others_s) / wall_s, 2)
    return Figures(name, usage.completion_tokens, evaluated, round(cached, 3), round(wall_s, 2), *cores)


def _busy_s() -> float:
    """CPU seconds that this machine has worked, but for what was stolen from it."""
    fields = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4] - fields[7]) * _TICK_S


# --- a whole run


def whole(
    overrides: Sequence[str], turns: Turns, beside: Sequence[int] = ()
) -> tuple[RunFigures, list[Rewritten]]:
    """Run `culturepark generate` on the quickstart, in `turns` with the trees `beside` it; with the opinions
    that it had rewritten."""
    with tempfile.TemporaryDirectory(prefix="culturepark-bench-") as folder:
        out = Path(folder, "run")
        command = [sys.executable, "-m", "culturepark", "generate", "--out", str(out)]
        for override in overrides:
            command += ["--set", override]
        began = time.time()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        turns.add(process.pid)
        meter = _Meter()
        while process.poll() is None:
            meter.read([process.pid, *beside])
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
        command_s = turns.working_s(process.pid, began, time.time())
        assert process.stdout is not None
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{process.stdout.read()}")
        dialogues = _rows(out, "dialogues")
        opinions = [row for kind in ("samples", "rejected") for row in _rows(out, kind)]
        rewritten = [msgspec.convert(row, Rewritten) for row in opinions if row["rewritten"]]
    usage = Usage()
    for role in (role for row in dialogues for role in row["usage"] if role["role"] != "embedder"):
        usage += Usage(role["calls"], role["prompt_tokens"], role["cached_tokens"], role["completion_tokens"])
    first, last = min(row["started_s"] for row in dialogues), max(row["ended_s"] for row in dialogues)
    engine_s, own_s = meter.between(first, last)
    by_kind = meter.by_kind()
    others_s = meter.busy_between(first, last) - own_s
    asked = _figures("culturepark", usage, turns.working_s(process.pid, first, last), engine_s, others_s)
    made = RunFigures(
        asked,
        round(command_s, 2),
        round(by_kind["chat"], 2),
        round(by_kind["embedder"], 2),
        round(by_kind["other"], 2),
    )
    return made, rewritten


_SIGNS = {
    "chat": b"ChatEngine",
    "embedder": b"EmbeddingEngine",
    "bare": Path(__file__).name.encode() + b"\0--",  # its client and its engine
}


class _Meter:
    """CPU of a process tree over time, by kind of process."""

    def __init__(self) -> None:
        self._kinds: dict[int, str] = {}
        self._known: dict[int, float] = {}
        self._samples: list[tuple[float, float, float, float]] = []

    def read(self, pids: Sequence[int]) -> None:
        """Sample the trees below `pids`."""
        for one in (one for pid in pids for one in tree_of(pid)):
            # A process names itself only some time after it was made.
            if self._kinds.get(one, "other") == "other":
                self._kinds[one] = _kind_of(one)
            self._known[one] = max(self._known.get(one, 0.0), cpu_s_of(one))
        kinds = self.by_kind()
        self._samples.append((time.time(), kinds["chat"], sum(kinds.values()), _busy_s()))

    def by_kind(self) -> dict[str, float]:
        """CPU seconds so far."""
        kinds = {"chat": 0.0, "embedder": 0.0, "bare": 0.0, "other": 0.0}
        for one, cpu_s in self._known.items():
            kinds[self._kinds[one]] += cpu_s
        return kinds

    def between(self, first: float, last: float) -> tuple[float, float]:
        """CPU seconds of the chat engine and of all that is looked at between two times."""
        a, b = self._at(first), self._at(last)
        return b[1] - a[1], b[2] - a[2]

    def busy_between(self, first: float, last: float) -> float:
        """CPU seconds of the whole machine between two times."""
        return self._at(last)[3] - self._at(first)[3]

    def _at(self, time_s: float) -> tuple[float, float, float, float]:
        """What was used at a time, between two looks in proportion."""
        after = next((i for i, sample in enumerate(self._samples) if sample[0] >= time_s), -1)
        b, a = self._samples[after], self._samples[max(0, after - 1)]
        part = min(1.0, (time_s - a[0]) / (b[0] - a[0])) if b[0] > a[0] else 1.0
        chat, tree, busy = (x + part * (y - x) for x, y in zip(a[1:], b[1:], strict=True))
        return time_s, chat, tree, busy


def _kind_of(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "other"
    return next((kind for kind, sign in _SIGNS.items() if sign in command), "other")


def _rows(out: Path, kind: str) -> list[dict[str, Any]]:
    files = sorted((out / kind).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]  # pyright: ignore


def _rewriting(plan: Plan, rewritten: Sequence[Rewritten]) -> list[list[Request]]:
    """The requests behind rewritten opinions, for each dialogue of their plan."""
    numbers = {plan.brief(number).id: number for number in range(len(plan))}
    found: list[list[Request]] = [[] for _ in numbers]
    for row in rewritten:
        brief = plan.brief(number := numbers[row.dialogue_id])
        speaker = (row.turn - 1) % len(brief.speakers)
        said = without_lead_in(unquoted(row.extracted))
        prompt, cue = _PROFILE.rewriting(brief, speaker, first_person(said, brief.speakers[speaker].name))
        prompt.add("assistant", cue.prefill)
        found[number].append((prompt, _PROFILE.sampling("rewriter")))
    return found


# --- what is compared


def plan_of(settings: Settings) -> Plan:
    """The plan of these settings."""
    return Plan(settings, load_seeds(settings.plan.seeds), load_cultures())


def compare(overrides: Sequence[str], sweep: Sequence[int], repeats: int) -> dict[str, Any]:
    """Whole runs against the bare client at its best: of one server, as the engine comes, and a server for
    each CPU, as runs have it, each with so many requests at once."""
    settings = load_settings(None, overrides)
    cpus = os.cpu_count() or 1
    short = replace(settings, plan=replace(settings.plan, utterances=4, dialogues_per_question=4))

    hows = [_How(threads, n, n) for threads in (cpus, 0) for n in sweep]
    hows.append(_How(0, max(sweep), max(sweep) * 3 // 2))  # as runs have it, with some that wait
    tried = {how: _told(_bare_with(how, short, [[]])) for how in hows}
    # By all that the engine worked on: how long replies are is a matter of chance.
    best = max(tried, key=lambda how: tried[how].processed_per_s)
    wholes: list[RunFigures] = []
    bares: list[Figures] = []
    # What runs have rewritten, from a shorter one.
    lent = [*overrides, f"plan.dialogues_per_question={min(4, settings.plan.dialogues_per_question)}"]
    with Turns() as alone:
        _, rewritten = whole(lent, alone)
    for _ in range(repeats):
        with Turns() as turns, _bare_beside(best, overrides, lent, rewritten) as (pid, figures):
            turns.add(pid)
            made, _ = whole(overrides, turns, [pid])
            wholes.append(made)
            bares.append(figures(turns))
        for each in (made.asked, bares[-1]):
            _told(each)
    return {
        "dialogues": len(plan_of(settings)),
        "utterances": settings.plan.utterances,
        "in_flight": settings.limits.dialogues_in_flight,
        "best": str(best),
        "tried": _plain(tried.values()),
        "bare": _plain(bares),
        "whole": msgspec.to_builtins(wholes),
        "ratio": _ratios(wholes, bares),
        "completions_per_s": {
            "bare": _spread(b.completions_per_s for b in bares),
            "while_asked": _spread(w.asked.completions_per_s for w in wholes),
            "whole_command": _spread(w.asked.completion_tokens / w.command_s for w in wholes),
        },
    }


class _How(NamedTuple):
    """How the bare client is served: by one server of so many `threads`, or, at 0, by one for each CPU; how
    many conversations they work on, and how many are held."""

    threads: int
    slots: int
    at_once: int

    def __str__(self) -> str:
        layout = "one server" if self.threads else "a server a CPU"
        return f"bare, {layout}, {self.slots} slots, {self.at_once} at once"


def _bare_with(how: _How, held: Settings, rewrites: Sequence[Sequence[Request]]) -> Figures:
    model = replace(held.model_of("speaker"), parallel=how.slots, threads=how.threads)
    with engine(servers_of(model, os.cpu_count() or 1)) as served:
        return bare(str(how), held, rewrites, how.at_once, served)


@contextmanager
def _bare_beside(
    how: _How, overrides: Sequence[str], lent: Sequence[str], rewritten: Sequence[Rewritten]
) -> Iterator[tuple[int, Callable[[Turns], Figures]]]:
    """The bare client in a process of its own, with the rewriting requests of a run with the overrides
    `lent`: its id, and what waits for its figures."""
    given = msgspec.json.encode((how, overrides, lent, rewritten))
    command = [sys.executable, __file__, "--bare"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def figures(turns: Turns) -> Figures:
            assert process.stdout is not None
            made, ended_s = msgspec.json.decode(process.stdout.read(), type=tuple[Figures, float])
            working_s = turns.working_s(process.pid, ended_s - made.wall_s, ended_s)
            cores = round(made.engine_cores * made.wall_s / working_s, 2)
            return replace(made, wall_s=round(working_s, 2), engine_cores=cores, others_cores=0.0)

        assert process.stdin is not None
        process.stdin.write(given)
        process.stdin.close()
        yield process.pid, figures


def be_bare() -> None:
    """Be that process: read what to do, and print what was measured and when it ended."""
    how, overrides, lent, rewritten = msgspec.json.decode(
        sys.stdin.buffer.read(), type=tuple[_How, list[str], list[str], list[Rewritten]]
    )
    rewrites = _rewriting(plan_of(load_settings(None, lent)), rewritten)
    made = _bare_with(how, load_settings(None, overrides), rewrites)
    sys.stdout.buffer.write(msgspec.json.encode((made, time.time())))


def _ratios(wholes: Sequence[RunFigures], bares: Sequence[Figures]) -> dict[str, dict[str, float]]:
    pairs = list(zip(wholes, bares, strict=True))
    return {
        "completions_while_asked": _spread(w.asked.completions_per_s / b.completions_per_s for w, b in pairs),
        "processed_while_asked": _spread(w.asked.processed_per_s / b.processed_per_s for w, b in pairs),
        "completions_whole_command": _spread(
            w.asked.completion_tokens / w.command_s / b.completions_per_s for w, b in pairs
        ),
    }


def prefix_cache(overrides: Sequence[str], repeats: int) -> dict[str, Any]:
    """The same dialogues with prefixes used again or not, and with or without a replica of their own."""
    settings = load_settings(None, overrides)
    model, cores = settings.model_of("speaker"), os.cpu_count() or 2
    one = replace(model, parallel=8, threads=cores)
    half = replace(model, parallel=4, threads=max(1, cores // 2))
    cases = {
        "one server, prefixes used again": ([one], True, True),
        "one server, each prompt evaluated whole": ([one], True, False),
        "two servers, a dialogue stays with one": ([half, half], True, True),
        "two servers, each call goes to either": ([half, half], False, True),
    }
    made: dict[str, list[Figures]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (servers, sticky, reuse) in cases.items():
            with engine(servers) as served:
                made[name].append(_told(bare(name, settings, [[]], 8, served, sticky=sticky, reuse=reuse)))
    return {
        "dialogues": len(plan_of(settings)),
        "utterances": settings.plan.utterances,
        "cases": {
            name: {
                "evaluated_tokens": _spread(f.evaluated_tokens for f in some),
                "cached_share": _spread(f.cached_share for f in some),
                "wall_s": _spread(f.wall_s for f in some),
                "completion_tokens": _spread(f.completion_tokens for f in some),
                "measured": _plain(some),
            }
            for name, some in made.items()
        },
    }


def _plain(some: Iterable[Figures]) -> list[dict[str, Any]]:
    return [
        asdict(f)
        | {"completions_per_s": round(f.completions_per_s, 1), "processed_per_s": round(f.processed_per_s, 1)}
        for f in some
    ]


def _spread(values: Any) -> dict[str, float]:
    some = [float(value) for value in values]
    return {
        "median": round(statistics.median(some), 3),
        "min": round(min(some), 3),
        "max": round(max(some), 3),
    }


# --- what is printed

_HEAD = ("", "completions/s", "evaluated/s", "cached", "wall s", "engine cores", "others")


def print_head() -> None:
    """What the columns are that follow."""
    print(f"{_HEAD[0]:44}" + "".join(f"{word:>14}" for word in _HEAD[1:]))


def _told(figures: Figures) -> Figures:
    f = figures
    cells = (f.completions_per_s, f.evaluated_tokens / f.wall_s, f.cached_share, f.wall_s, f.engine_cores)
    print(f"{f.name:44}" + "".join(f"{cell:14.2f}" for cell in (*cells, f.others_cores)), flush=True)
    return figures


def _machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}


def main() -> None:
    """Measure and print; `--json` keeps all figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prefix-cache", action="store_true", help="measure the prefix cache instead")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--per-question", type=int, default=16, help="dialogues of each of the eight cultures"
    )
    parser.add_argument("--utterances", type=int, default=6, help="turns of a dialogue")
    parser.add_argument("--at-once", default="8,16", help="conversations at once that the bare client tries")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `generate`")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    if given.bare:
        be_bare()
        return
    overrides = [
        f"plan.dialogues_per_question={given.per_question}",
        f"plan.utterances={given.utterances}",
        *given.set,
    ]
    print_head()
    if given.prefix_cache:
        results = prefix_cache(overrides, given.repeats)
        print()
        for name, case in results["cases"].items():
            tokens, wall = case["evaluated_tokens"], case["wall_s"]
            print(
                f"{name:42}{tokens['median']:10.0f} prompt tokens evaluated, {wall['median']:6.1f} s "
                f"({wall['min']:.1f} to {wall['max']:.1f})"
            )
    else:
        results = compare(overrides, [int(n) for n in given.at_once.split(",")], given.repeats)
        print()
        for name, ratio in results["ratio"].items():
            words = name.replace("_", " ")
            print(f"{words:42}{ratio['median']:10.1%} of bare ({ratio['min']:.1%} to {ratio['max']:.1%})")
    if given.json:
        whole_of = {"machine": _machine(), "model": known_models()[PACKAGED].title} | results
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(whole_of), indent=2) + b"\n")


if __name__ == "__main__":
    main()
