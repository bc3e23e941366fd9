"""Fine-tuning jobs: the real client against a service on loopback that behaves, refuses, and goes away."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from culturepark.errors import (
    ConfigError,
    CultureParkError,
    EndpointError,
    LaunchUnknownError,
    TrainingError,
)
from culturepark.settings import ModelSettings, Settings
from culturepark.store.rundir import Run
from culturepark.training.adapters import adapters_of
from culturepark.training.jobs import cancel_all, create_job, run_training
from culturepark.training.openai_jobs import KEY, OpenAIBackend
from culturepark.training.ports import Job, Outcome
from culturepark.training.records import Records
from tests import runs

API_KEY = "proj.1d8e33c07ba94f5521"


class Service:
    """Files and fine-tuning jobs; each look at a job brings it one state further."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.course = ["queued", "running", "succeeded"]
        self.refusal: tuple[int, str] | None = None
        self.drop_answer = False
        self.made_but: int | None = None
        self.hidden = False
        self.keeps_going = False
        self.echoes: set[str] = set()
        self.down = 0
        self.listed = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._ready.wait(10)

    def _serve(self) -> None:
        app = web.Application(middlewares=[self._echo])
        app.router.add_get("/v1/files", self._list_files)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}", self._file)
        app.router.add_get("/v1/fine_tuning/jobs", self._list)
        app.router.add_post("/v1/fine_tuning/jobs", self._create)
        app.router.add_get("/v1/fine_tuning/jobs/{id}", self._retrieve)
        app.router.add_post("/v1/fine_tuning/jobs/{id}/cancel", self._cancel)

        async def start() -> None:
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            self._ready.set()

        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(start())
        self._loop.run_forever()

    @web.middleware
    async def _echo(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Say the key that was shown: in every answer to what is named in `echoes`."""
        shown = request.headers.get("Authorization", "")
        what = f"{request.method} {request.path.removeprefix('/v1/')}"
        status = next((one for one in (400, 401, 403, 404, 500) if f"{what} {one}" in self.echoes), 0)
        if status:
            return self._error(status, f"bad token {shown}, yes \u200b{shown[:20]}\u200b{shown[20:]}")
        answer = await handler(request)
        if what in self.echoes and isinstance(answer, web.Response):
            body: Any = msgspec.json.decode(answer.body or b"{}")
            body["id"] = f"x-{shown.removeprefix('Bearer ')}"
            return web.json_response(body)
        return answer

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _error(self, status: int, words: str) -> web.Response:
        return web.json_response({"error": {"message": words, "type": "x", "code": None}}, status=status)

    async def _list_files(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": list(self.files.values()), "has_more": False})

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        file: Any = form["file"]
        name = f"file-{len(self.files)}"
        self.contents[name] = file.file.read()
        self.files[name] = {
            "id": name,
            "object": "file",
            "bytes": len(self.contents[name]),
            "created_at": 1,
            "filename": file.filename,
            "purpose": form["purpose"],
            "status": "processed",
        }
        return web.json_response(self.files[name])

    async def _file(self, request: web.Request) -> web.Response:
        return web.json_response(self.files[request.match_info["id"]])

    async def _list(self, request: web.Request) -> web.Response:
        self.listed += 1
        if request.headers.get("Authorization") != f"Bearer {API_KEY}":
            return self._error(401, f"Incorrect API key provided: {request.headers['Authorization']}")
        if self.hidden:
            return web.json_response({"object": "list", "data": [], "has_more": False})
        # Newest first, a page at a time, as the service does; the filter is ignored.
        every = list(reversed(self.jobs.values()))
        at = next((i + 1 for i, one in enumerate(every) if one["id"] == request.query.get("after")), 0)
        page = every[at : at + 2]
        return web.json_response({"object": "list", "data": page, "has_more": at + 2 < len(every)})

    async def _create(self, request: web.Request) -> web.StreamResponse:
        if self.refusal:
            return self._error(*self.refusal)
        asked = await request.json()
        name = f"ftjob-{len(self.jobs)}"
        self.jobs[name] = {
            "id": name,
            "object": "fine_tuning.job",
            "created_at": 100,
            "finished_at": None,
            "error": None,
            "fine_tuned_model": None,
            "hyperparameters": {},
            "organization_id": "org",
            "result_files": [],
            "seed": asked["seed"],
            "status": "validating_files",
            "trained_tokens": None,
            "asked": asked,
            **{key: asked.get(key) for key in ("model", "training_file", "validation_file", "metadata")},
        }
        if self.drop_answer:
            self.drop_answer = False
            assert request.transport is not None
            request.transport.close()
        if self.made_but:
            return self._error(self.made_but, "something went wrong")
        return web.json_response(self.jobs[name])

    async def _retrieve(self, request: web.Request) -> web.Response:
        if self.down:
            self.down -= 1
            return self._error(503, "overloaded")
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return self._error(404, "no such job")
        if self.course and job["status"] not in ("succeeded", "failed", "cancelled"):
            job["status"] = self.course.pop(0)
            if job["status"] == "succeeded":
                job |= {"fine_tuned_model": f"ft:{job['model']}:x", "finished_at": 160}
            if job["status"] == "failed":
                job["error"] = {"code": "bad", "message": "Row 3 is invalid.", "param": None}
        return web.json_response(job)

    async def _cancel(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return self._error(404, "no such job")
        if job["status"] == "succeeded":
            return self._error(400, "Job has already completed")
        if self.keeps_going:
            return self._error(400, "Jobs that are being prepared cannot be stopped")
        job["status"] = "cancelled"
        return web.json_response(job)


@pytest.fixture
def service() -> Iterator[Service]:
    """A service that behaves."""
    one = Service()
    yield one
    one.close()


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run; its trainings are recorded elsewhere."""
    more = {"dialogues_per_question": 16}
    return runs.made(tmp_path_factory.mktemp("openai") / "run", plan=more, refine={"clusters": 0})


@pytest.fixture
def job(sealed: Run) -> Job:
    """A job on a remote model."""
    models = {"tuned": ModelSettings(engine="openai", model="base-model")}
    training = msgspec.structs.replace(sealed.settings.training, backend="openai", model="tuned")
    settings = msgspec.structs.replace(
        sealed.settings, models=sealed.settings.models | models, training=training
    )
    return create_job(sealed, "arabic", settings)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)


def backend_of(service: Service) -> OpenAIBackend:
    """A backend that waits for nothing."""
    model = ModelSettings(engine="openai", model="base-model", base_urls=(service.url,))
    return OpenAIBackend(model, retries=0)


def of(service: Service, job: Job, tmp_path: Path, **options: Any) -> Outcome:
    """Follow a job to its end."""
    records, backend = Records(tmp_path), backend_of(service)
    return run_training(records, backend, job, poll_s=0, sleep=lambda _: None, **options)


def test_a_job_from_upload_to_model(service: Service, job: Job, tmp_path: Path) -> None:
    outcome = of(service, job, tmp_path)
    assert (outcome.state, outcome.model, outcome.seconds) == ("finished", "ft:base-model:x", 60.0)
    asked = service.jobs["ftjob-0"]["asked"]
    assert asked["metadata"] == {KEY: job.key}
    assert asked["method"]["supervised"]["hyperparameters"] == {"n_epochs": 3}
    for field, part in (("training_file", "train"), ("validation_file", "held-out")):
        assert service.contents[asked[field]] == (Path(job.dataset) / f"{part}.jsonl").read_bytes()
    assert adapters_of(tmp_path)["arabic"].model == "ft:base-model:x"
    assert of(service, job, tmp_path) == outcome
    assert len(service.jobs) == 1


def test_a_creation_whose_answer_was_lost_is_found(service: Service, job: Job, tmp_path: Path) -> None:
    service.drop_answer = True
    assert of(service, job, tmp_path).state == "finished"
    assert len(service.jobs) == 1


@pytest.mark.parametrize("status", [408, 409, 500, 502, 504])
def test_a_job_that_was_made_in_spite_of_the_answer_is_found(
    service: Service, job: Job, tmp_path: Path, status: int
) -> None:
    service.made_but = status
    assert of(service, job, tmp_path).state == "finished"
    assert len(service.jobs) == 1


@pytest.mark.parametrize("retry", [True, False])
def test_a_job_that_may_have_been_made_is_not_failed_and_looked_for_later(
    service: Service, job: Job, tmp_path: Path, retry: bool
) -> None:
    service.made_but, service.hidden = 504, True
    with pytest.raises(LaunchUnknownError, match=r"not known.*answered 504"):
        of(service, job, tmp_path, retry=retry)
    assert [record.event for record in Records(tmp_path).all()] == ["intended"]
    service.made_but, service.hidden = None, False
    assert of(service, job, tmp_path, retry=retry).state == "finished"
    assert len(service.jobs) == 1


def test_a_refusal_of_the_creation_is_a_failure(service: Service, job: Job, tmp_path: Path) -> None:
    service.refusal = (429, "slow down")
    with pytest.raises(EndpointError, match="429"):
        of(service, job, tmp_path)
    assert Records(tmp_path).all()[-1].event == "failed"


ASKED = (
    "GET files",
    "POST files",
    "GET fine_tuning/jobs",
    "POST fine_tuning/jobs",
    "GET fine_tuning/jobs/ftjob-0",
)


@pytest.mark.parametrize(
    "echoes", [f"{what} {status}" for what in ASKED for status in (400, 401, 403, 404, 500)]
)
def test_a_key_that_is_echoed_is_in_no_error_and_no_record(
    service: Service, job: Job, tmp_path: Path, echoes: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    service.echoes = {echoes}
    said = ""
    try:
        outcome = run_training(
            Records(tmp_path), backend_of(service), job, poll_s=0, sleep=lambda _: service.echoes.clear()
        )
        said = str(outcome)
    except CultureParkError as error:
        said = "".join(traceback.format_exception(error))
        assert "401" in echoes or "[key]" in said
    assert API_KEY[:12] not in said
    assert API_KEY[:12] not in caplog.text
    for path in (tmp_path / "training").rglob("*"):
        assert not path.is_file() or API_KEY[:12] not in path.read_text("utf-8")


@pytest.mark.parametrize("echoes", ["POST fine_tuning/jobs", "POST files"])
def test_a_name_that_holds_the_key_is_not_written_down(
    service: Service, job: Job, tmp_path: Path, echoes: str
) -> None:
    service.echoes = {echoes}
    with pytest.raises(EndpointError) as refused:
        of(service, job, tmp_path)
    assert API_KEY[:12] not in str(refused.value)
    for path in (tmp_path / "training").rglob("*.json"):
        assert API_KEY[:12] not in path.read_text("utf-8")


def test_the_words_and_the_model_of_a_job_hold_no_key(service: Service, job: Job, tmp_path: Path) -> None:
    backend = backend_of(service)
    job_id = backend.launch(job)
    service.course = []
    service.jobs[job_id] |= {
        "status": "failed",
        "error": {"code": "bad", "message": f"Bearer {API_KEY}", "param": None},
    }
    assert "[key]" in backend.outcome(job, job_id).what
    service.jobs[job_id] |= {"status": "succeeded", "fine_tuned_model": f"ft:{API_KEY}", "finished_at": 160}
    outcome = backend.outcome(job, job_id)
    assert API_KEY[:12] not in str(outcome)
    assert outcome.state == "failed"


def test_a_job_is_found_among_many_without_any_record(service: Service, job: Job, tmp_path: Path) -> None:
    backend = backend_of(service)
    first = backend.launch(job)
    for other in range(5):
        backend.launch(msgspec.structs.replace(job, dataset_hash=f"other-{other}"))
    assert backend.find(job) == first
    assert of(service, job, tmp_path).state == "finished"
    assert len(service.jobs) == 6
    # Files with the same content are uploaded once.
    names = [file["filename"] for file in service.files.values()]
    assert len(names) == len(set(names))


def test_a_hiccup_is_not_the_end(service: Service, job: Job, tmp_path: Path) -> None:
    service.down = 3
    assert of(service, job, tmp_path).state == "finished"


def test_a_service_that_is_gone_is_given_up_on_and_the_job_kept(
    service: Service, job: Job, tmp_path: Path
) -> None:
    service.down = 10_000
    with pytest.raises(EndpointError, match="has not answered"):
        of(service, job, tmp_path)
    service.down = 0
    assert of(service, job, tmp_path).state == "finished"
    assert len(service.jobs) == 1


def test_a_failed_job_says_why(service: Service, job: Job, tmp_path: Path) -> None:
    service.course = ["running", "failed"]
    outcome = of(service, job, tmp_path)
    assert (outcome.state, outcome.failure) == ("failed", "refused")
    assert "Row 3 is invalid." in outcome.what


def test_a_job_is_cancelled_and_a_finished_one_left(service: Service, job: Job, tmp_path: Path) -> None:
    backend = backend_of(service)
    service.course = []
    job_id = backend.launch(job)
    backend.cancel(job, job_id)
    assert backend.poll(job, job_id) == "cancelled"
    assert backend.find(job) is None
    service.jobs[job_id]["status"] = "succeeded"
    backend.cancel(job, job_id)
    assert backend.poll(job, job_id) == "finished"
    assert backend.poll(job, "ftjob-unknown") == "lost"
    backend.cancel(job, "ftjob-unknown")


def launched(service: Service, jobs: Sequence[Job], run: Run) -> Records:
    """These jobs go on at the service, and are on record."""
    service.course = []
    records, backend = Records(run.root), backend_of(service)
    for one in jobs:
        records.add("intended", one)
        records.add("launched", one, backend.launch(one))
    return records


def settings_of(run: Run, service: Service, **more: ModelSettings) -> Settings:
    """The run's, by which nobody would be asked, with an entry for the service."""
    mine = ModelSettings(engine="openai", model="base-model", base_urls=(service.url,))
    return msgspec.structs.replace(run.settings, models=run.settings.models | {"tuned": mine} | more)


def test_all_that_goes_on_at_the_service_is_cancelled(service: Service, sealed: Run, job: Job) -> None:
    korean = msgspec.structs.replace(job, name="korean")
    launched(service, [job, korean], sealed)
    settings = settings_of(sealed, service)
    assert list(cancel_all(sealed, settings, ["arabic", "korean"], "local")) == []
    ended = list(cancel_all(sealed, settings, ["korean"], "openai"))
    assert [(one.name, getattr(outcome, "state", "")) for one, outcome in ended] == [("korean", "cancelled")]
    # One that the service has forgotten does not keep the others going.
    launched(service, [msgspec.structs.replace(job, name="joint")], sealed)
    service.jobs.pop("ftjob-2")
    ended = list(cancel_all(sealed, settings, ["arabic", "korean", "joint"]))
    assert [(one.name, getattr(outcome, "state", "")) for one, outcome in ended] == [
        ("arabic", "cancelled"),
        ("joint", "cancelled"),
    ]
    assert {one["status"] for one in service.jobs.values()} == {"cancelled"}
    assert list(cancel_all(sealed, settings, ["arabic", "korean", "joint"])) == []


def test_what_cannot_be_stopped_is_said_and_stays_on_record(service: Service, sealed: Run, job: Job) -> None:
    jobs = [msgspec.structs.replace(job, name=name, rows=99) for name in ("spanish", "german")]
    records = launched(service, jobs[:1], sealed)
    records.add("intended", jobs[1])  # and its answer was lost
    service.keeps_going = True
    settings = settings_of(sealed, service)
    found = {one.name: error for one, error in cancel_all(sealed, settings, ["spanish", "german"])}
    assert isinstance(found["spanish"], EndpointError)
    assert "cannot be stopped" in found["spanish"].what
    assert isinstance(found["german"], TrainingError)
    assert "not known" in found["german"].what
    service.keeps_going = False
    [(_, stopped)] = cancel_all(sealed, settings, ["spanish"])
    assert isinstance(stopped, Outcome)
    assert stopped.state == "cancelled"


def test_a_job_is_stopped_where_it_was_launched(service: Service, sealed: Run, job: Job) -> None:
    """By the entry that tunes its base model; of several the user names one."""
    job = msgspec.structs.replace(job, name="turkish")
    launched(service, [job], sealed)
    elsewhere = ModelSettings(engine="openai", model="base-model", base_urls=("http://127.0.0.1:9/v1",))
    both = settings_of(sealed, service, other=elsewhere)
    [(_, unclear)] = cancel_all(sealed, both, ["turkish"])
    assert isinstance(unclear, ConfigError)
    assert "training.model" in unclear.fix
    training = msgspec.structs.replace(both.training, model="tuned")
    [(_, stopped)] = cancel_all(sealed, msgspec.structs.replace(both, training=training), ["turkish"])
    assert isinstance(stopped, Outcome)
    assert stopped.state == "cancelled"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "Your organization is not allowed to create jobs."),
        (400, "Fine-tuning is no longer available for new organizations."),
        (404, "Fine tuning has been discontinued."),
    ],
)
def test_the_refusal_of_new_organisations_is_explained(
    service: Service, job: Job, tmp_path: Path, status: int, words: str
) -> None:
    service.refusal = (status, words)
    with pytest.raises(EndpointError, match=r"(?s)2027-01-06.*--backend local") as refused:
        of(service, job, tmp_path)
    assert words in str(refused.value)
    assert not service.jobs
    assert Records(tmp_path).all()[-1].event == "failed"


def test_other_refusals_are_not_put_down_to_the_end(service: Service, job: Job, tmp_path: Path) -> None:
    service.refusal = (400, "The seed must be smaller.")
    with pytest.raises(EndpointError, match="answered 400") as refused:
        of(service, job, tmp_path)
    assert "2027" not in str(refused.value)


def test_what_is_missing_is_found_before_anything_is_sent(
    service: Service, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="no fewer than 10"):
        of(service, msgspec.structs.replace(job, rows=9), tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "another-key")
    with pytest.raises(EndpointError, match="does not accept the key") as refused:
        of(service, job, tmp_path)
    assert "another-key" not in str(refused.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EndpointError, match="no key is set"):
        backend_of(service)
    assert not Records(tmp_path).all()
    assert not service.files


def test_without_the_client_it_says_what_to_install(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install openai"):
        backend_of(service)
