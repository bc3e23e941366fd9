"""The command line as its user meets it: words, exit codes, and nothing harmed."""

from __future__ import annotations

import csv
import io
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace
from rich.console import Console

from culturepark.cli.main import run as culturepark
from culturepark.cli.views.live import Display
from culturepark.errors import ConfigError, EndpointError, RunDirError
from culturepark.plan import Plan
from culturepark.preflight.checks import check_all, check_endpoints
from culturepark.preflight.doctor import Verdict, examine_models
from culturepark.preflight.estimate import estimate, turns_planned
from culturepark.seeds import builtin_seeds, write_seeds
from culturepark.settings import Settings
from culturepark.settings_load import load_settings
from culturepark.store.audit import check_run
from culturepark.store.cells import Sealed
from culturepark.store.lock import RunLock
from culturepark.store.manifest import Manifest
from culturepark.store.rundir import Run
from culturepark.store.shards import commit_table
from tests import builders, runs

Printed = Any  # pytest's capsys


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def flat(text: str) -> str:
    """Printed words without the breaks of lines."""
    return " ".join(text.split())


# --- the frame


def test_help_names_the_commands_and_the_exit_codes(capsys: Printed) -> None:
    assert culturepark(["--help"]) == 0
    printed = capsys.readouterr().out
    for word in ("generate", "plan", "doctor", "show", "status", "check", "seeds", "embedded", "130", "70"):
        assert word in printed
    for command in (
        "generate",
        "plan",
        "doctor",
        "show",
        "status",
        "check",
        "seeds import",
        "embedded fetch",
    ):
        assert culturepark([*command.split(), "--help"]) == 0


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import culturepark.cli.main, sys\n"
        "print({'numpy', 'pyarrow', 'aiohttp', 'msgspec', 'ray', 'actors', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("actor", "heavy"),
    [("cultural_agent", {"numpy", "pyarrow", "aiohttp"}), ("moderator", {"pyarrow", "aiohttp"}),
     ("collector", {"aiohttp"}), ("refiner", {"pyarrow", "aiohttp"})],
)  # fmt: skip
def test_actors_start_without_what_they_do_not_need(actor: str, heavy: set[str]) -> None:
    code = f"import actors.{actor}, sys\nprint({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_console_script_installed_before_cli_was_a_package_still_starts() -> None:
    code = "import sys; sys.argv = ['culturepark', '--version']; from culturepark.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("culturepark ")


def test_version(capsys: Printed) -> None:
    assert culturepark(["--version"]) == 0
    assert re.fullmatch(r"culturepark \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("generate", 2, "--out"),
        ("generate --out OUT --colour", 2, "--colour"),
        ("generate nowhere.toml --out OUT", 2, "no such file"),
        ("generate --out OUT --set plan.utterancs=6", 2, "Did you mean `utterances`"),
        ("generate --out OUT --set plan.cultures=['arabick']", 2, "arabic"),
        ("generate --out OUT --set plan.seeds=['nowhere.jsonl']", 2, "nowhere.jsonl"),
        ("plan --set limits.retries=many", 2, "$.limits.retries"),
        ("show OUT", 4, "run.json is missing"),
        ("check OUT", 4, "there is no run here"),
        ("status OUT", 4, "run.json is missing"),
        ("show FINISHED --dialogue d --sample d", 2, "--dialogue"),
        ("show FINISHED --dialogue d", 2, "Give more of the id"),
        ("show FINISHED --sample nothing", 2, "nothing here has an id"),
        ("seeds import wvs nowhere.csv --out OUT", 2, "nowhere.csv"),
        ("seeds import jsonl nowhere.jsonl --out OUT --weighted", 2, "means nothing for jsonl"),
        ("seeds import wvs nowhere.csv --out OUT --items wvs7-q999", 2, "wvs7-q999"),
        ("embedded fetch CONFIG", 2, "hub"),
    ],
)
def test_errors_say_where_what_and_what_next(
    finished: Run, tmp_path: Path, capsys: Printed, arguments: str, code: int, says: str
) -> None:
    places = {"OUT": tmp_path / "out", "FINISHED": finished.root, "CONFIG": runs.config(tmp_path)}
    given = [str(places.get(word, word)) for word in arguments.split()]
    assert culturepark(given) == code
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err + printed.out
    assert len(printed.err.splitlines()) < 12
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_it_happened_wherever_it_stands(tmp_path: Path, capsys: Printed) -> None:
    for arguments in (["--debug", "show", str(tmp_path)], ["show", str(tmp_path), "--debug"]):
        assert culturepark(arguments) == 4
        assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_our_own_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    def broken(root: Path) -> None:
        raise RuntimeError("[bold]boom\x1b[31m\nand more")

    monkeypatch.setattr("culturepark.store.view.View", broken)
    assert culturepark(["show", "anywhere"]) == 70
    error = capsys.readouterr().err
    assert "RuntimeError: [bold]boom[31m and more\n" in error
    assert "--debug" in error
    assert "\x1b" not in error


def test_ctrl_c_outside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("culturepark.store.view.View", interrupted)
    assert culturepark(["show", "anywhere"]) == 130


# --- plan


def test_plan_lists_what_was_never_asked(capsys: Printed) -> None:
    assert culturepark(["plan", "--set", 'plan.questions=["wvs7-q28","wvs7-q36"]']) == 0
    printed = flat(capsys.readouterr().out)
    assert "Never asked there" in printed
    assert re.search(r"arabic +wvs7-q36", printed)
    assert "none, all models are local" in printed
    assert "An estimate; nothing was called." in printed


@pytest.mark.parametrize(
    ("prices", "says"),
    [((), "unknown"), (("models.chat.price_prompt=0.1", "models.chat.price_completion=0.4"), "cost 0.")],
)
def test_plan_shows_money_only_where_prices_are_known(
    tmp_path: Path, capsys: Printed, prices: tuple[str, ...], says: str
) -> None:
    config = runs.config(tmp_path, "http://127.0.0.1:9/v1")
    sets = [word for price in prices for word in ("--set", price)]
    assert culturepark(["plan", str(config), *sets]) == 0
    assert says in flat(capsys.readouterr().out)


def planned(settings: Settings) -> Plan:
    return builders.plan(settings)


@pytest.mark.parametrize("kinds", [["cross", "in-culture"], ["cross"], ["direct", "cross", "cross"]])
@pytest.mark.parametrize("per_question", [1, 3, 5])
def test_kinds_and_turns_are_counted_as_the_plan_has_them(kinds: list[str], per_question: int) -> None:
    plan = planned(runs.settings(plan={"kinds": kinds, "dialogues_per_question": per_question}))
    assert plan.kinds() == Counter(plan.brief(n).kind for n in range(len(plan)))
    assert turns_planned(plan) == sum(plan.utterances_of(n) for n in range(len(plan)))


def test_estimated_calls_follow_from_turns_and_opinions() -> None:
    settings = runs.settings(plan={"kinds": ["cross", "in-culture"], "utterances": 10})
    plan = planned(settings)  # 24 dialogues: 12 cross with 5 turns of a delegate, 12 with 10
    got = estimate(settings, plan)
    calls = {role.role: role.calls for role in got.roles}
    assert calls["speaker"] == 240
    assert calls["extractor"] == 12 * 5 + 12 * 10
    assert got.opinions == 2 * calls["extractor"]
    assert calls["rewriter"] == round(0.1 * got.opinions)
    assert calls["verifier"] == got.opinions + calls["rewriter"]
    assert calls["embedder"] == 24
    assert got.samples_at_most == 6 * 10
    assert got.money == 0
    longer = runs.settings(plan={"kinds": ["cross", "in-culture"], "utterances": 20})
    speaker = {role.role: role for role in estimate(longer, planned(longer)).roles}["speaker"]
    # Each turn reads all turns before it: twice the turns read more than twice as much, and write twice.
    assert speaker.prompt_tokens > 2.5 * got.roles[0].prompt_tokens
    assert speaker.completion_tokens == 2 * got.roles[0].completion_tokens


def test_small_models_and_runs_without_refinement_need_fewer_roles() -> None:
    small = builders.settings("small", plan=runs.TWO_CULTURES)
    roles = {role.role: role for role in estimate(small, planned(small)).roles}
    assert set(roles) == {"speaker", "rewriter", "embedder"}
    # All opinions of a dialogue for verdicts, then those that were rewritten; what is kept is known by then.
    assert roles["embedder"].calls == 2 * len(planned(small))
    plain = runs.settings(refine={"enabled": False})
    got = estimate(plain, planned(plain))
    assert [role.role for role in got.roles] == ["speaker"]
    assert got.samples_at_most == 0


def test_estimated_money_is_unknown_rather_than_too_little() -> None:
    chat = {"engine": "openai", "model": "m", "price_prompt": 2.0, "price_completion": 8.0}
    room = {"chat": chat, "vectors": {"engine": "scripted"}}
    priced = runs.settings(models=room)
    got = estimate(priced, planned(priced))
    expected = sum(2 * r.prompt_tokens + 8 * r.completion_tokens for r in got.roles if not r.local) / 1e6
    assert got.money == pytest.approx(expected, rel=1e-3)
    half = runs.settings(models=room | {"chat": {**chat, "price_completion": None}})
    assert estimate(half, planned(half)).money is None


# --- show


def test_the_summary_adds_up(finished: Run, capsys: Printed) -> None:
    assert culturepark(["show", str(finished.root)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    rows = [line.split() for line in printed.splitlines() if re.match(r"(arabic|korean|all) +\d", line)]
    assert [row[0] for row in rows] == ["arabic", "korean", "all"]
    for row in rows:
        plan, done, failed, opinions, *fates = map(int, row[1:])
        assert plan == done + failed
        assert opinions == sum(fates)
    for both in zip(*(map(int, row[1:]) for row in rows), strict=True):
        assert both[0] + both[1] == both[2]
    assert "complete: all 24 dialogues" in printed
    assert "dialogues failed" in printed
    assert "timeout" in printed


def test_a_dialogue_and_a_sample_are_found_by_the_start_of_their_ids(finished: Run, capsys: Printed) -> None:
    samples = pq.read_table(next((finished.root / "samples").iterdir())).to_pylist()
    dialogue, _, rest = samples[0]["id"].partition("-")
    assert culturepark(["show", str(finished.root), "--dialogue", dialogue[:9]]) == 0
    printed = flat(capsys.readouterr().out)
    assert dialogue in printed
    brief = finished.plan.brief(samples[0]["number"])
    for persona in brief.speakers:
        assert persona.name in printed
    for share in brief.answers.shares.values():
        assert f"{share:.1%}" in printed
    for number in range(1, brief.utterances + 1):
        assert f"Turn {number} of {dialogue}." in printed
    assert culturepark(["show", str(finished.root), "--sample", f"{dialogue[:9]}-{rest}"]) == 0
    printed = flat(capsys.readouterr().out)
    for known in (
        samples[0]["id"],
        samples[0]["text"],
        samples[0]["distribution_hash"],
        "wvs7-q",
        "scripted",
    ):
        assert known in printed
    assert "assistant" in printed


def test_what_is_only_in_the_log_is_shown_too(tmp_path: Path, capsys: Printed) -> None:
    run = runs.made(tmp_path / "run", ended=3)
    assert not list((run.root).glob("dialogues/*"))
    before = sorted((p, p.stat().st_mtime_ns) for p in run.root.rglob("*"))
    outcome = next(o for o in runs.outcomes(run.plan)[:3] if o.opinions)
    assert culturepark(["show", str(run.root)]) == 0
    printed = flat(capsys.readouterr().out)
    assert "not complete: 3 of 24 dialogues have ended" in printed
    assert "3 dialogues that ended and are not in shards yet" in printed
    assert culturepark(["show", str(run.root), "--dialogue", run.plan.brief(outcome.number).id]) == 0
    printed = flat(capsys.readouterr().out)
    assert all(turn.text in printed for turn in outcome.turns)
    assert culturepark(["show", str(run.root), "--sample", outcome.opinions[0].id]) == 0
    assert outcome.opinions[0].text in flat(capsys.readouterr().out)
    assert sorted((p, p.stat().st_mtime_ns) for p in run.root.rglob("*")) == before


def test_what_a_model_said_is_data(tmp_path: Path, capsys: Printed) -> None:
    run = builders.run_in(tmp_path / "run", runs.settings())
    first = next(o for o in runs.outcomes(run.plan) if o.opinions and not o.failed)
    hostile = "[bold red]see[/] \x1b]0;owned\x07\x1b[2J [link=file:///etc]here[/link] \u202egnissim"
    turns = tuple(replace(turn, text=hostile) for turn in first.turns)
    opinions = tuple(replace(one, text=hostile, extracted=hostile) for one in first.opinions)
    runs.write(run, [replace(first, turns=turns, opinions=opinions)])
    for option, wanted in (("--dialogue", run.plan.brief(first.number).id), ("--sample", opinions[0].id)):
        assert culturepark(["show", str(run.root), option, wanted]) == 0
        printed = capsys.readouterr().out
        assert "[bold red]see[/]" in printed
        assert "[link=file:///etc]here[/link]" in flat(printed)
        assert not {"\x1b", "\x07", "\u202e"} & set(printed)


# --- check


def test_a_whole_run_passes_and_is_not_changed(finished: Run, capsys: Printed) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.root.rglob("*"))
    assert culturepark(["check", str(finished.root)]) == 0
    assert "All is as it should be. The run is complete." in capsys.readouterr().out
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.root.rglob("*")) == before


def test_a_run_that_was_stopped_passes_and_is_not_complete(tmp_path: Path, capsys: Printed) -> None:
    assert culturepark(["check", str(runs.made(tmp_path / "run", ended=11).root)]) == 0
    assert "The run is not complete yet." in capsys.readouterr().out


def shard(run: Run, kind: str, place: int = 0) -> Path:
    return sorted((run.root / kind).iterdir())[place]


def flip_a_byte(run: Run) -> str:
    path = shard(run, "samples")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"samples/{path.name}: its content has changed"


def remove_a_shard(run: Run) -> str:
    path = shard(run, "dialogues", 1)
    path.unlink()
    return f"dialogues/{path.name}: it is missing"


def remove_the_first_entry(run: Run) -> str:
    (run.root / "manifest" / "000001.json").unlink()
    return "000001.json: this entry of the manifest is missing"


def remove_the_last_entry(run: Run) -> str:
    last = sorted((run.root / "manifest").glob("0*.json"))[-1]
    last.unlink()
    return f"{last.name}: this entry of the manifest is missing"


def remove_the_last_entry_and_leave_its_shards(run: Run) -> str:
    last = shard(run, "dialogues", -1)
    remove_the_last_entry(run)
    return f"dialogues/{last.name}: no manifest entry names it"


def repeat_a_cell(run: Run) -> str:
    table = pq.read_table(shard(run, "dialogues"))
    row = table.slice(0, 1)
    with RunLock.acquire(run.root) as lock:
        manifest = Manifest.open(run.root / "manifest", lock.epoch)
        again = commit_table(run.root, "dialogues/part-000099-0009.parquet", row, "dialogues")
        cell = run.plan.cell_of(row["number"][0].as_py())
        manifest.append([again], Sealed([cell], {row["culture"][0].as_py(): {"finished": 1}}))
    return f"dialogue {row['id'][0].as_py()} is in the shards twice"


def change_the_summary(run: Run) -> str:
    path = run.root / "summary.json"
    path.write_text(re.sub(r'"kept": \d+', '"kept": 1', path.read_text(), count=1))
    return "summary.json does not agree with what was counted, in `total`"


def remove_the_summary(run: Run) -> str:
    (run.root / "summary.json").unlink()
    return "summary.json is missing"


def shorten_a_dataset(run: Run) -> str:
    path = run.root / "datasets" / "korean" / "chat.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    return "datasets/korean/chat.jsonl: it has"


def change_the_seeds(run: Run) -> str:
    path = run.root / "seeds.jsonl"
    path.write_text(path.read_text("utf-8").replace("JOR", "EGY", 1), "utf-8")
    return "were changed after it began"


@pytest.mark.parametrize(
    "harm",
    [
        flip_a_byte,
        remove_a_shard,
        remove_the_first_entry,
        remove_the_last_entry,
        remove_the_last_entry_and_leave_its_shards,
        repeat_a_cell,
        change_the_summary,
        remove_the_summary,
        shorten_a_dataset,
        change_the_seeds,
    ],
)
def test_what_is_wrong_is_named(run: Run, capsys: Printed, harm: Any) -> None:
    assert len(list((run.root / "manifest").glob("0*.json"))) > 1
    named = harm(run)
    assert culturepark(["check", str(run.root)]) == 1
    printed = capsys.readouterr()
    assert named in printed.out
    assert "Traceback" not in printed.err


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    run = runs.made(tmp_path / "run", ended=3)
    (segment,) = (run.root / "log").iterdir()
    whole = segment.read_bytes()
    assert not check_run(run.root).problems
    segment.write_bytes(whole[:-5])
    assert any("damaged tail" in problem for problem in check_run(run.root).problems)
    segment.write_bytes(whole + whole[8:])
    problems = check_run(run.root).problems
    assert [p for p in problems if "in the log twice" in p]


# --- before a run


class Endpoint:
    """A server that answers /v1/models with what it was told."""

    def __init__(self, status: int = 200, models: tuple[str, ...] = (), body: str | None = None) -> None:
        self.status, self.models, self.body = status, models, body
        self.asked: list[str] = []
        self.keys: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        self.keys.append(request.headers.get("Authorization", ""))
        if self.body is not None:
            return web.Response(
                status=self.status, text=self.body, headers={"Location": "https://elsewhere/v1"}
            )
        return web.json_response({"data": [{"id": one} for one in self.models]}, status=self.status)

    async def __aenter__(self) -> str:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        self._server = TestServer(app)
        await self._server.start_server()
        return str(self._server.make_url("/v1"))

    async def __aexit__(self, *error: object) -> None:
        await self._server.close()


def remote(folder: Path, url: str, *overrides: str) -> Settings:
    return load_settings(runs.config(folder, url), overrides)


async def test_an_endpoint_that_has_the_model_passes_at_no_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key-0123456789")
    endpoint = Endpoint(models=("other", "good-model"))
    async with endpoint as url:
        await check_endpoints(remote(tmp_path, url))
    assert endpoint.asked == ["/v1/models"]
    assert endpoint.keys == ["Bearer key-0123456789"]


@pytest.mark.parametrize(
    "endpoint", [Endpoint(404, body="no"), Endpoint(405, body=""), Endpoint(body="hello")]
)
async def test_an_endpoint_without_a_list_passes(tmp_path: Path, endpoint: Endpoint) -> None:
    async with endpoint as url:
        await check_endpoints(remote(tmp_path, url))
    assert endpoint.asked


@pytest.mark.parametrize(
    ("endpoint", "where", "says"),
    [
        (Endpoint(401, body="no"), "$.models.chat.api_key_env", "OPENAI_API_KEY"),
        (Endpoint(403, body="no"), "$.models.chat.api_key_env", "OPENAI_API_KEY"),
        (Endpoint(models=("good-modl", "other")), "$.models.chat.model", "Did you mean `good-modl`"),
        (Endpoint(503, body="loading"), "$.models.chat.base_urls", "still be loading"),
        (Endpoint(308, body=""), "$.models.chat.base_urls", "https://elsewhere/v1"),
    ],
)
async def test_an_endpoint_that_cannot_serve_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint, where: str, says: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key-0123456789")
    async with endpoint as url:
        with pytest.raises(EndpointError) as caught:
            await check_endpoints(remote(tmp_path, url))
    assert caught.value.where == where
    assert says in str(caught.value)
    assert "0123456789" not in str(caught.value)


async def test_each_replica_is_looked_at(tmp_path: Path, unused_tcp_port: int) -> None:
    async with Endpoint(models=("good-model",)) as url:
        dead = f"http://127.0.0.1:{unused_tcp_port}/v1"
        with pytest.raises(EndpointError, match="Connection refused") as caught:
            await check_endpoints(remote(tmp_path, url, f'models.chat.base_urls=["{url}", "{dead}"]'))
    assert caught.value.where == "$.models.chat.base_urls"
    assert dead in caught.value.what


async def test_a_missing_key_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    settings = remote(tmp_path, "https://api.openai.com/v1", 'models.chat.api_key_env="MY_KEY"')
    with pytest.raises(ConfigError, match="MY_KEY"):
        await check_endpoints(settings)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="not a directory"):
        check_all(runs.settings(), tmp_path / "file" / "run")


def test_an_unreachable_endpoint_leaves_no_trace(
    tmp_path: Path, capsys: Printed, unused_tcp_port: int
) -> None:
    config = runs.config(tmp_path, f"http://127.0.0.1:{unused_tcp_port}/v1")
    assert culturepark(["generate", str(config), "--out", str(tmp_path / "out")]) == 3
    assert "base_urls" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_doctor_has_a_verdict_for_each_role(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setattr("culturepark.preflight.doctor.examine_machine", lambda folder: [])
    assert culturepark(["doctor", str(runs.config(tmp_path))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["speaker", "extractor", "verifier", "rewriter", "embedder"]
    assert all(line.split()[1] == "ok" for line in lines)
    assert "structured output works" in lines[1]
    assert "structured output works" in lines[2]
    assert culturepark(["doctor", str(runs.config(tmp_path)), "--set", "models.chat.structured=false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "replies are read tolerantly" in lines[1]
    assert "the same call as extractor" in flat(lines[2])
    config = runs.config(tmp_path, f"http://127.0.0.1:{unused_tcp_port}/v1")
    assert culturepark(["doctor", str(config)]) == 3
    printed = capsys.readouterr().out
    assert printed.count("FAILS") == 4
    assert "Start the model server" in printed


class Chat:
    """An endpoint that refuses, ignores the schema, or thinks too long."""

    def __init__(
        self, refuses: str = "", obeys: bool = False, text: str = "blue", finish: str = "stop"
    ) -> None:
        self.refuses, self.obeys, self.text, self.finish = refuses, obeys, text, finish
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.Response:
        if request.path.endswith("/models"):
            return web.json_response({"data": []})
        body = await request.json()
        self.bodies.append(body)
        if self.refuses in body and (self.refuses != "temperature" or body["temperature"] != 1):
            words = f"Unsupported: '{self.refuses}' does not suit this model."
            return web.json_response({"error": {"message": words}}, status=400)
        text = self.text
        if self.obeys and "response_format" in body:
            wanted = body["response_format"]["json_schema"]["schema"]["required"]
            text = '{"opinions": []}' if wanted == ["opinions"] else '{"verdict": "novel", "reason": "a"}'
        message = {"role": "assistant", "content": text}
        return web.json_response({"choices": [{"message": message, "finish_reason": self.finish}]})

    async def verdicts(self, folder: Path, *overrides: str) -> dict[str, Verdict]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        async with TestServer(app) as server:
            settings = remote(folder, str(server.make_url("/v1")), *overrides)
            return {verdict.subject: verdict for verdict in await examine_models(settings)}


async def test_doctor_asks_as_the_run_would(tmp_path: Path) -> None:
    chat = Chat(obeys=True)
    found = await chat.verdicts(tmp_path, "sampling.verifier.temperature=0.9")
    assert [body["temperature"] for body in chat.bodies] == [0.7, 0.0, 0.9, 0.3]
    assert ["response_format" in body for body in chat.bodies] == [False, True, True, False]
    assert "structured output works" in found["extractor"].words
    assert "structured output works" in found["verifier"].words


async def test_doctor_shares_calls_that_are_alike(tmp_path: Path) -> None:
    chat = Chat()
    sets = [f"sampling.{role}.temperature=1.0" for role in ("speaker", "extractor", "verifier", "rewriter")]
    found = await chat.verdicts(tmp_path, *sets, "models.chat.structured=false")
    assert len(chat.bodies) == 1
    assert all(verdict.ok for verdict in found.values())
    assert found["rewriter"].words == "the same call as speaker"
    assert "replies are read tolerantly" in found["verifier"].words


@pytest.mark.parametrize("refuses", ["nothing", "response_format"])
async def test_doctor_says_where_a_schema_has_no_effect(tmp_path: Path, refuses: str) -> None:
    found = await Chat(refuses).verdicts(tmp_path)
    assert all(verdict.ok for verdict in found.values())
    assert "replies are read tolerantly" in found["extractor"].words
    assert "structured" not in found["verifier"].words


@pytest.mark.parametrize(("finish", "ok"), [("length", True), ("stop", False)])
async def test_doctor_does_not_fail_models_that_think_first(tmp_path: Path, finish: str, ok: bool) -> None:
    found = await Chat(text="", finish=finish).verdicts(tmp_path)
    assert found["speaker"].ok is ok
    assert ("think first" in found["speaker"].words) is ok


async def test_doctor_advises_by_what_was_refused(tmp_path: Path) -> None:
    found = await Chat("temperature").verdicts(tmp_path, "sampling.speaker.temperature=1")
    assert found["speaker"].ok
    assert not found["verifier"].ok
    assert "`sampling.verifier.temperature`" in found["verifier"].fix
    found = await Chat("max_tokens").verdicts(tmp_path)
    assert "`models.chat.max_tokens_field=max_completion_tokens`" in found["speaker"].fix


# --- generate, with the runtime played by the test


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Plays `actors.driver`: ends every owed dialogue at once. Holds the runs it was given."""
    given: list[Run] = []

    def generate(run: Run, show: Any) -> Any:
        given.append(run)
        ledger = runs.write(run, runs.outcomes(run.plan))
        last = runs.snapshot(run, ledger)
        show(last)
        return last

    monkeypatch.setitem(sys.modules, "actors.driver", SimpleNamespace(generate=generate))  # type: ignore[arg-type]
    return given


def test_generate_shows_what_came_of_it_and_a_complete_run_is_left_alone(
    tmp_path: Path, capsys: Printed, driver: list[Run]
) -> None:
    out = tmp_path / "out"
    arguments = ["generate", str(runs.config(tmp_path)), "--out", str(out)]
    assert culturepark(arguments) == 0
    printed = capsys.readouterr().out
    for words in (
        "24 of 24 dialogues ended",
        "Opinions taken from it",
        "Samples kept",
        "From dialogues to samples",
        "dialogues failed",
        "What next",
        "datasets/<culture>/",
    ):
        assert words in printed
    assert culturepark(arguments) == 0
    again = capsys.readouterr().out
    assert "is complete: all 24 dialogues have ended" in flat(again)
    assert "Samples kept, as a model will be tuned on them" in flat(again)
    assert culturepark([*arguments, "--quiet"]) == 0
    again = capsys.readouterr().out
    assert "culturepark show" in again
    assert "Samples kept" not in again
    assert len(driver) == 1


def test_generate_says_what_was_done_already(tmp_path: Path, capsys: Printed, driver: list[Run]) -> None:
    runs.made(tmp_path / "out", ended=5)
    arguments = ["generate", str(runs.config(tmp_path)), "--out", str(tmp_path / "out"), "--quiet"]
    assert culturepark(arguments) == 0
    printed = capsys.readouterr().out
    assert "Resuming: 5 of 24 done." in printed
    assert "Done: 19 dialogues in 1:01" in printed
    assert "Samples kept" not in printed


def test_another_run_in_the_directory_is_not_touched(
    finished: Run, tmp_path: Path, capsys: Printed, driver: list[Run]
) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.root.rglob("*"))
    config = str(runs.config(tmp_path))
    assert culturepark(["generate", config, "--out", str(finished.root), "--set", "plan.seed=2"]) == 4
    assert "plan.seed" in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.root.rglob("*")) == before
    assert not driver


# --- while it goes on


def test_plain_lines_come_seldom_and_only_with_news(tmp_path: Path) -> None:
    run = builders.run_in(tmp_path / "run", runs.settings())
    ledger = runs.write(run, runs.outcomes(run.plan)[:5])
    written = io.StringIO()
    now_s = [100.0]
    with Display(Console(file=written, width=80), run, 0, clock_s=lambda: now_s[0]) as display:
        first = runs.snapshot(run, ledger)
        for step_s in (0.0, 10.0, 10.0):
            now_s[0] += step_s
            display.show(first)
        news = replace(first, progress=replace(first.progress, turns=99))
        display.show(news)
        now_s[0] += 2.0
        display.show(replace(news, progress=replace(first.progress, turns=120)))
    lines = written.getvalue().splitlines()[1:]
    assert len(lines) == 2
    assert "5 of 24 dialogues ended" in lines[0]
    assert "99 turns" in lines[1]


def test_the_live_panel_fits_a_narrow_terminal_and_never_calls_unknown_money_zero(tmp_path: Path) -> None:
    models = {
        "chat": {"engine": "openai", "model": "m"},
        "vectors": {"engine": "scripted"},
    }
    run = builders.run_in(tmp_path / "run", runs.settings(models=models))
    ledger = runs.write(run, runs.outcomes(run.plan)[:9])
    written = io.StringIO()
    console = Console(file=written, width=80, height=30, force_terminal=True, color_system=None)
    with Display(console, run, 0) as display:
        display.show(replace(runs.snapshot(run, ledger), draining=True, set_aside=("log segment 1: [b]x",)))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert "9/24" in text
    assert "cost unknown" in text
    assert "Ctrl-C again stops at once" in text
    assert "[b]x" in text
    assert max(map(len, text.splitlines())) <= 80


# --- seeds


def test_seeds_are_imported_and_nothing_is_overwritten(tmp_path: Path, capsys: Printed) -> None:
    survey = tmp_path / "survey.csv"
    survey.write_text(
        "B_COUNTRY_ALPHA,D_INTERVIEW,Q27,Q28\nJOR,1,1,2\nJOR,2,2,-1\nEGY,3,1,-4\n", encoding="utf-8"
    )
    out = tmp_path / "seeds.jsonl"
    arguments = ["seeds", "import", "wvs", str(survey), "--out", str(out), "--items", "wvs7-q27,wvs7-q28"]
    assert culturepark(arguments) == 0
    printed = flat(capsys.readouterr().out)
    assert "3 rows" in printed
    assert "wvs7-q28 in EGY" in printed
    written = out.read_bytes()
    assert culturepark(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_bytes() == written
    assert culturepark([*arguments, "--force", "--countries", "JOR"]) == 0
    assert culturepark(["seeds", "list", str(out)]) == 0
    assert "2 questions" in capsys.readouterr().out


def test_the_command_that_an_import_prints_works_as_pasted(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    by_country = {"Jordan": [0.5, 0.3, 0.2], "Germany": [0.1, 0.8, 0.1], "Belgium": [0.5, 0.5, 0.0]}
    with (tmp_path / "pew.csv").open("w", encoding="utf-8", newline="") as file:
        selections = f"defaultdict(<class 'list'>, {by_country!r})"
        row = ("Is it a good day?", selections, "['Good', 'Bad', 'DK/Refused']", "GAS")
        csv.writer(file).writerows([("question", "selections", "options", "source"), row])
    write_seeds("mine.jsonl", builtin_seeds()[:3])
    for given, cultures in (
        ("globalopinionqa pew.csv --out", ["arabic", "german"]),
        ("jsonl mine.jsonl --out", []),
    ):
        out = "it's new.jsonl"
        assert culturepark(["seeds", "import", *given.split(), out, "--force"]) == 0
        (line,) = [one for one in capsys.readouterr().out.splitlines() if "Use it: " in one]
        words = shlex.split(line.partition("Use it: ")[2])
        assert any(word.startswith("plan.cultures") for word in words) is bool(cultures)
        assert words[0] == "culturepark"
        assert culturepark(words[1:]) == 0
        planned = capsys.readouterr().out
        assert "The plan: " in planned
        assert all(name in planned for name in cultures)
        assert ("korean" in planned) is not bool(cultures)


def test_an_import_without_a_culture_of_ours_says_so(tmp_path: Path, capsys: Printed) -> None:
    seed = builtin_seeds()[0]
    elsewhere = {"Belgium": next(iter(seed.answers.values()))}
    write_seeds(tmp_path / "mine.jsonl", [replace(seed, answers=elsewhere)])
    out = tmp_path / "out.jsonl"
    assert culturepark(["seeds", "import", "jsonl", str(tmp_path / "mine.jsonl"), "--out", str(out)]) == 0
    printed = flat(capsys.readouterr().out)
    assert "No culture but the main contact has answers in it" in printed
    assert "Use it" not in printed


def test_the_built_in_seeds_are_listed(capsys: Printed) -> None:
    assert culturepark(["seeds", "list"]) == 0
    printed = capsys.readouterr().out
    assert "50 questions" in printed
    assert "wvs7-q28" in printed
