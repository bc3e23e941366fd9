"""Fine-tuning jobs of OpenAI's API, or of a service that speaks like it, with the official client.

Every job carries our key in its metadata (idempotency key). Before one is created, the service's jobs are
searched for it, so that a launch whose answer was lost is found and not repeated. That is detection, not a
guarantee: a service that lists a new job late could be asked for a second one. Texts of the service are shown
only after `safe_words`, and names that contain the API key are refused: some services echo what they were
sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from culturepark.errors import ConfigError, CultureParkError, EndpointError, LaunchUnknownError, TrainingError
from culturepark.models.replicas import base_urls_of
from culturepark.models.secrets import api_key_of, safe_words, without_key
from culturepark.settings import ModelSettings
from culturepark.training.datasets import HELD_OUT, TRAIN, verify
from culturepark.training.ports import Job, Outcome, State

T = TypeVar("T")

KEY = "culturepark_key"
"""The field of a job's metadata that holds our key."""
MIN_ROWS = 10
"""The service refuses fewer training rows."""

_MAX_UNREACHED = 120
"""After this many polls in a row without an answer, polling ends with an error."""
_SUFFIX_CHARS = 40
"""Characters of the suffix that a service puts into the model's name, at most."""
_WORDS_CHARS = 300
"""Characters of the service's words that an error shows, at most."""
_STATES: dict[str, State] = {"succeeded": "finished", "failed": "failed", "cancelled": "cancelled"}
_REFUSAL = re.compile(
    r"fine.?tun.{0,120}(not available|no longer|not allowed|not permitted|not supported|deprecat|disabled|"
    r"access|wind|sunset|discontinu|eligib)",
    re.IGNORECASE | re.DOTALL,
)
SUNSET_NOTICE = (
    "OpenAI is ending fine-tuning: organisations that had not used it before are refused already, and "
    "from 2027-01-06 nobody can create a job."
)
_INSTEAD = (
    "Tune an open model instead: `--backend local` on this machine, `ray-train` on a cluster. Or name "
    "another service in [models]."
)


class OpenAIBackend:
    """Uploads a dataset, creates a job, watches it. `model` is the entry of [models] that is tuned."""

    def __init__(self, model: ModelSettings, retries: int = 3) -> None:
        try:
            import openai
        except ImportError:
            fix = "Run `pip install openai`."
            raise ConfigError("backend openai", "the package openai is not installed.", fix) from None
        self._errors: Any = openai
        self._url = base_urls_of(model)[0]
        key = api_key_of(model)
        if not key:
            fix = f"Set {model.api_key_env}, or {model.api_key_env}_FILE to the path of a file with the key."
            raise EndpointError(self._url, "no key is set for it.", fix)
        self._key = key
        self._key_env = model.api_key_env
        self._client: Any = openai.OpenAI(api_key=key, base_url=self._url, max_retries=retries, timeout=120)
        self._unreached = 0

    def prepare(self, job: Job) -> None:
        """See ports.Backend. Asks the service whether it offers fine-tuning to this key at all."""
        verify(Path(job.dataset))
        if job.rows < MIN_ROWS:
            what = f"it has {job.rows} training rows, and the service accepts no fewer than {MIN_ROWS}."
            raise TrainingError(f"dataset of {job.name}", what, "Generate more samples first.")
        self._call(lambda: self._client.fine_tuning.jobs.list(limit=1))

    def find(self, job: Job) -> str | None:
        """See ports.Backend."""

        def search() -> str | None:
            # Services may ignore the filter, so every job is looked at.
            for one in self._client.fine_tuning.jobs.list(limit=100, metadata={KEY: job.key}):
                about = cast(dict[str, str], one.metadata or {})
                if about.get(KEY) == job.key and one.status not in ("failed", "cancelled"):
                    return self._name(one.id)
            return None

        return self._call(search)

    def launch(self, job: Job) -> str:
        """See ports.Backend."""
        files = {part: self._upload(job, part) for part in self._parts(job)}
        hyper = {"n_epochs": max(1, round(job.recipe.epochs))}
        request: dict[str, Any] = {
            "model": job.base.name,
            "training_file": files[TRAIN],
            "suffix": f"culturepark-{job.name}"[:_SUFFIX_CHARS],
            "seed": job.recipe.seed % (1 << 31),
            "metadata": {KEY: job.key},
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}},
        }
        if HELD_OUT in files:
            request["validation_file"] = files[HELD_OUT]
        # No retries here: a creation whose answer was lost must not be sent again without looking.
        once = self._client.with_options(max_retries=0)
        try:
            return self._name(once.fine_tuning.jobs.create(**request).id)
        except self._errors.OpenAIError as error:
            if not self._may_be_created(error):
                raise self._explained(error) from None
            return self._find_created(job, self._explained(error))

    def _may_be_created(self, error: Any) -> bool:
        """Whether a job may have been created in spite of this error: the answer was lost, a proxy before the
        service timed out, or the service reports a conflict with the job itself."""
        status = getattr(error, "status_code", None)
        return status is None or status < 300 or status >= 500 or status in (408, 409)

    def _find_created(self, job: Job, cause: CultureParkError) -> str:
        """The id of a job that may have been created. Raises LaunchUnknownError if none is found."""
        try:
            found = self.find(job)
        except CultureParkError:
            found = None
        if found:
            return found
        fix = "Run the same command again: the job is looked for before another is created."
        what = f"whether it made the job is not known: {cause.what}"
        raise LaunchUnknownError(self._url, what, fix) from None

    def poll(self, job: Job, job_id: str) -> State:
        """See ports.Backend. While the service cannot be reached, the job counts as running."""
        try:
            status = self._client.fine_tuning.jobs.retrieve(job_id).status
        except (
            self._errors.APIConnectionError,
            self._errors.InternalServerError,
            self._errors.RateLimitError,
        ) as error:
            self._unreached += 1
            if self._unreached >= _MAX_UNREACHED:
                what = f"it has not answered {self._unreached} times in a row ({type(error).__name__})."
                fix = "The job goes on there; run `culturepark finetune` again to look at it."
                raise EndpointError(self._url, what, fix) from None
            return "running"
        except self._errors.NotFoundError:
            return "lost"
        except self._errors.OpenAIError as error:
            raise self._explained(error) from None
        self._unreached = 0
        return _STATES.get(status, "running")

    def cancel(self, job: Job, job_id: str) -> None:
        """See ports.Backend."""
        try:
            self._client.fine_tuning.jobs.cancel(job_id)
        except (self._errors.BadRequestError, self._errors.NotFoundError) as error:
            if self.poll(job, job_id) == "running":  # else it has ended already, or is gone
                raise self._explained(error) from None
        except self._errors.OpenAIError as error:
            raise self._explained(error) from None

    def detach(self, job: Job, job_id: str) -> None:
        """See ports.Backend: the job goes on at the service."""

    def outcome(self, job: Job, job_id: str) -> Outcome:
        """See ports.Backend."""

        def look() -> Outcome:
            one = self._client.fine_tuning.jobs.retrieve(job_id)
            state = _STATES.get(one.status, "lost")
            seconds = float(max(0, (one.finished_at or one.created_at) - one.created_at))
            if state == "finished":
                return Outcome(state=state, model=self._name(one.fine_tuned_model or ""), seconds=seconds)
            words = one.error.message if one.error and one.error.message else "it gives no reason."
            what = f"the service says: {self._safe(words)}"
            return Outcome(state=state, failure="refused", what=what, seconds=seconds)

        try:
            return self._call(look)
        except EndpointError as error:
            return Outcome(state="failed", failure="refused", what=error.what, fix=error.fix)

    def _parts(self, job: Job) -> list[str]:
        return [part for part in (TRAIN, HELD_OUT) if (Path(job.dataset) / f"{part}.jsonl").stat().st_size]

    def _upload(self, job: Job, part: str) -> str:
        """The id of the uploaded file; an earlier upload of the same content is used again."""
        name = f"culturepark-{job.dataset_hash[:24]}-{part}.jsonl"

        def upload() -> str:
            for one in self._client.files.list(purpose="fine-tune"):
                if one.filename == name and one.status != "error":
                    return str(one.id)
            data = (Path(job.dataset) / f"{part}.jsonl").read_bytes()
            created = self._client.files.create(file=(name, data), purpose="fine-tune")
            return str(self._client.files.wait_for_processing(created.id, poll_interval=0.5).id)

        return self._call(upload)

    def _call(self, what: Callable[[], T]) -> T:
        """Call the service; its errors become ours."""
        try:
            return what()
        except self._errors.OpenAIError as error:
            raise self._explained(error) from None
        except RuntimeError as error:  # the client's own, when a file is never ready
            raise EndpointError(self._url, self._safe(str(error)), "Try again.") from None

    def _explained(self, error: Any) -> CultureParkError:
        words, status = self._safe(str(error)), getattr(error, "status_code", None)
        if status == 401:
            return EndpointError(self._url, "it does not accept the key.", f"Check {self._key_env}.")
        if status in (400, 403, 404, 410) and _REFUSAL.search(str(error)):
            return EndpointError(self._url, f"it refuses fine-tuning: {words} {SUNSET_NOTICE}", _INSTEAD)
        if status == 403:
            what = f"this key may not use fine-tuning: {words} {SUNSET_NOTICE}"
            return EndpointError(self._url, what, f"Ask for the permission, if it is only that. {_INSTEAD}")
        if status in (404, 405):
            return EndpointError(self._url, f"it offers no such thing: {words}", _INSTEAD)
        if status is None:
            what = f"it cannot be reached: {words}"
            return EndpointError(self._url, what, "Check the address and the network, then run it again.")
        fix = "Mend what it names." if status < 500 else "Wait, then run it again: nothing is launched twice."
        return EndpointError(self._url, f"it answered {status}: {words}", fix)

    def _safe(self, words: str) -> str:
        return " ".join(safe_words(words, self._key, _WORDS_CHARS).split())

    def _name(self, name: Any) -> str:
        """An id or a model's name, recorded unchanged. Raises EndpointError if it contains the API key."""
        if without_key(str(name), self._key) != name:
            what = "a name that it gave holds the key, and would be written down."
            raise EndpointError(self._url, what, "Ask whoever runs the service, and change the key.")
        return str(name)
