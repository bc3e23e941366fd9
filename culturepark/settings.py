"""Settings: one Struct a room, read from TOML, unknown keys refused with their path.

Each room is frozen and says in a docstring under each field what the field does. `load_settings`
is the only way in; what it returns has been checked as far as that goes without calling anything.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct, field

from culturepark.errors import ConfigError
from culturepark.paths import config_dir

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=100_000_000)]
Positive = Annotated[int, Meta(ge=1, le=100_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Share = Annotated[float, Meta(ge=0, le=1)]
Price = Annotated[float, Meta(ge=0, le=1_000_000)]

Kind = Literal["cross", "in-culture", "direct"]
Style = Literal["self-guided", "free-chat"]
Pairing = Literal["woman-woman", "woman-man", "man-woman", "man-man"]
Role = Literal["speaker", "extractor", "verifier", "rewriter", "embedder"]
Symptom = Literal[
    "empty", "role_flip", "assistant_phrase", "left_stance", "repeated", "looping", "dies_in_thanks"
]
Remedy = Literal["retry", "end", "keep"]
CHAT_ROLES: tuple[Role, ...] = ("speaker", "extractor", "verifier", "rewriter")

WHOLE = "1/1"
"""The plan in one part."""


class PlanSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which dialogues are held."""

    cultures: tuple[str, ...] = ()
    """Delegate cultures by id; empty means every culture of the registry but the contact."""
    contact: str = "english"
    """The culture of the main contact in cross-culture dialogues."""
    culture_files: tuple[str, ...] = ()
    """Folders with further culture files."""
    seeds: tuple[str, ...] = ("builtin",)
    """Where questions come from: `builtin`, or paths of JSONL seed files."""
    questions: tuple[str, ...] = ()
    """Ids of the questions to use; empty means all."""
    dialogues_per_question: Positive = 4
    """Dialogues for each culture and question that was asked there."""
    kinds: tuple[Kind, ...] = ("cross", "in-culture")
    """Taken in turn: with the main contact, between two people of the culture, or `direct`: no
    dialogue, one request for reasons (the baseline)."""
    styles: tuple[Style, ...] = ("self-guided", "free-chat")
    """Taken in turn: a script of cues, or the other's last words as the only cue."""
    pairings: tuple[Pairing, ...] = ("woman-woman", "woman-man", "man-woman", "man-man")
    """Genders of first and second speaker, taken in turn."""
    openers: tuple[Literal["contact", "delegate"], ...] = ("contact", "delegate")
    """Who speaks first, taken in turn."""
    utterances: Annotated[int, Meta(ge=2, le=100)] = 14
    """Turns of a dialogue, both speakers together."""
    stance: Literal["distribution", "mode", "paper"] = "distribution"
    """How a delegate's answer follows from people's answers: one draw from their shares, the most
    common answer, or the published reference's truncated mean."""
    weighted: bool = False
    """Draw from the survey's weighted shares where a seed has them."""
    language: Literal["english", "native"] = "english"
    """The language of the dialogues: English, or the delegate's own."""
    direct_reasons: Annotated[int, Meta(ge=1, le=50)] = 10
    """Reasons asked for in a `direct` generation."""
    seed: Annotated[int, Meta(ge=-(1 << 53), le=1 << 53)] = 1
    """The seed of every draw."""
    shard: str = WHOLE
    """`I/N`: hold the I-th of N parts of the plan, counted from 1. Each part is a run of its own."""


class ModelSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model and where it is served."""

    engine: Literal["openai", "embedded", "scripted"]
    """`openai`: any OpenAI-compatible endpoint. `embedded`: a GGUF file served on this machine, or
    the packaged embedder. `scripted`: a fake for tests and benchmarks that follows a rule."""
    model: str = ""
    """The model's name at the endpoint."""
    base_urls: tuple[str, ...] = ()
    """Replicas of the endpoint; empty means OPENAI_BASE_URL, or OpenAI's own address."""
    api_key_env: str = "OPENAI_API_KEY"
    """The name of the environment variable that holds the key. The key itself never goes into a
    configuration."""
    profile: Literal["full", "small"] = "full"
    """Which prompts it gets: `full`, or `small` for models of under about a billion parameters."""
    path: str = ""
    """embedded: the GGUF file; empty means the packaged SmolLM2."""
    hub: str = ""
    """embedded: `owner/name:file.gguf` on the model hub, fetched by `culturepark embedded fetch`
    and by nothing else."""
    context_tokens: Annotated[int, Meta(ge=256, le=1_048_576)] = 2048
    """embedded: context of one conversation; each of `parallel` takes its memory at the start, of
    the packaged model 37 MB."""
    parallel: Annotated[int, Meta(ge=0, le=512)] = 0
    """embedded: conversations decoded at once on a node; 0: 8 for each of the model's servers there."""
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """embedded: CPU threads of a node's one server; 0: all CPUs of the node, for the packaged model without
    `gpu_layers` as servers of one thread each, at most 16 and at most `parallel`."""
    gpu_layers: Annotated[int, Meta(ge=0, le=10_000)] = 0
    """embedded: layers put on a GPU."""
    dimensions: Count = 0
    """embedder: ask the endpoint for vectors of this length; 0 means its own."""
    structured: bool = True
    """Whether the endpoint obeys `response_format` with a JSON schema."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the limit of a reply."""
    headers: dict[str, str] = {}
    """Further headers; never for keys."""
    price_prompt: Price | None = None
    """Money for a million prompt tokens; unset means unknown."""
    price_cached: Price | None = None
    """Money for a million prompt tokens read from the server's cache; unset means as prompt."""
    price_completion: Price | None = None
    """Money for a million completion tokens; unset means unknown."""

    @property
    def served_name(self) -> str:
        """What requests call it; a server of our own takes any name, and needs one."""
        return self.model or "embedded"


class SamplingSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a role's replies are sampled. Unset fields are the prompt profile's."""

    temperature: Annotated[float, Meta(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    top_p: Share | None = None


class RoleSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which model, by its name in [models], serves each role. An empty role follows the speaker."""

    speaker: str = ""
    """Speaks for everybody in the dialogues."""
    extractor: str = ""
    """Lists the opinions in a turn."""
    verifier: str = ""
    """Judges opinions against the stance; best another model than the speaker."""
    rewriter: str = ""
    """Rewrites opinions that contradict the stance."""
    embedder: str = ""
    """Turns opinions into vectors."""

    def of(self, role: Role) -> str:
        """The name of the model that serves `role`."""
        return getattr(self, role) or ("" if role == "embedder" else self.speaker)


class PaperFaults(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Faults of the published reference, each off unless a comparison asks for it."""

    drop_novel: bool = False
    """Drop opinions that neither agree nor disagree with the seed."""
    verify_old_text: bool = False
    """Verify a rewrite by the text it replaced, so that almost none survives."""
    keep_longest: bool = False
    """Keep a cluster's longest opinion instead of its medoid."""


class RefineSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What happens to a dialogue's opinions."""

    enabled: bool = True
    """Off: dialogues only, no opinions and no samples."""
    rewrite: bool = True
    """Rewrite opinions that contradict the stance, and verify the rewritten text."""
    train_on_novel: bool = True
    """Whether opinions with the verdict `novel` go into the training files; they are samples in any case."""
    min_words: Annotated[int, Meta(ge=1, le=100)] = 5
    """Shorter opinions are dropped."""
    near_duplicate: Annotated[float, Meta(gt=0, le=1.01)] = 0.97
    """Cosine similarity from which two opinions of a culture are the same; over 1 turns it off."""
    clusters: Count = 10
    """Samples kept of each cell, one medoid a cluster; 0 keeps all."""
    cell_dialogues: Annotated[int, Meta(ge=1, le=4096)] = 16
    """Dialogues of one culture and question that are selected from, and sealed, together."""
    faults: PaperFaults = PaperFaults()


class HealthSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is done about a turn with something wrong in it: `retry` says it anew, once; `end` makes it the
    dialogue's last, from the middle of the dialogue on; `keep` keeps it. It is labelled in any case."""

    # Said anew: what no person of the dialogue would have said, and a second draw mostly mends.
    empty: Remedy = "retry"
    """Without a letter or digit."""
    role_flip: Remedy = "retry"
    """Speaks as the other person, as moderator, or for a role such as `System:`."""
    assistant_phrase: Remedy = "retry"
    """Speaks as an assistant does ("as an AI")."""
    # Ended: what tends to stay so, and is paid for at each further turn. Half a dialogue is worth having.
    looping: Remedy = "end"
    """The same sentence three times, in the turn or over turns, or words that go round in circles."""
    dies_in_thanks: Remedy = "end"
    """Thanks and a farewell, and nothing else."""
    # Kept: a change of mind and a repetition are worth seeing, and refinement sorts out what they bring
    # (verdict `contradicts`, near-duplicates).
    left_stance: Remedy = "keep"
    """A delegate takes another side in the survey's own words."""
    repeated: Remedy = "keep"
    """Nearly the words of an earlier turn."""
    off: bool = False
    """Look for none of this."""


class LimitSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much at once, how long, how often."""

    dialogues_in_flight: Annotated[int, Meta(ge=1, le=100_000)] = 64
    """Dialogues held at once, refinement included."""
    requests_in_flight: Annotated[int, Meta(ge=1, le=100_000)] = 4096
    """Requests at once to one model, all processes and replicas together."""
    adaptive: bool = True
    """Find out how many requests at once serve each replica best, up to `requests_in_flight`; of an embedded
    model it is known: what its servers work on, and half as many again. Off: `requests_in_flight` is the
    limit from the start."""
    requests_per_minute: Count = 0
    """Requests a minute to one model, all processes together; 0 means no limit."""
    tokens_per_minute: Annotated[int, Meta(ge=0, le=10_000_000_000)] = 0
    """Tokens a minute, prompt and completion, likewise."""
    deadline_s: Seconds = 120.0
    """Wall-clock limit of one request."""
    retries: Annotated[int, Meta(ge=0, le=100)] = 5
    """Further attempts after a fault that may pass. An embedded engine that is just starting is waited for
    besides, up to a minute."""
    backoff_s: Seconds = 1.0
    """The first wait before a further attempt; it doubles, with jitter, up to `backoff_max_s`."""
    backoff_max_s: Seconds = 60.0
    """The longest wait, also when Retry-After asks for more."""
    reply_bytes: Annotated[int, Meta(ge=1_024, le=1 << 30)] = 4 << 20
    """A reply may not be larger than this once decompressed."""
    breaker: Positive = 20
    """Failed dialogues in a row, with none finished between, that stop the run."""
    drain_s: Seconds = 10.0
    """How long a first Ctrl-C waits for dialogues in flight."""


class BudgetSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a run may take in all, from its first start on; 0 means no limit. It stops short of the limit
    when what is under way would reach it, and goes on when the limit is raised."""

    tokens: Annotated[int, Meta(ge=0, le=1_000_000_000_000_000)] = 0
    """Tokens, prompt and completion, of all roles together."""
    money: Annotated[float, Meta(ge=0, le=1_000_000_000_000)] = 0.0
    """Money, in the unit of the models' prices; every remote model in use needs its prices."""


class ActorSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many processes, where 0 means as many as the cluster's resources suggest; and their metrics."""

    agents_per_culture: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Processes that speak for each culture. 0: half of the cores shared out among the cultures, at
    least one each."""
    refiners: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Processes that refine dialogues. 0: half of the cores, at least one."""
    engines: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Nodes that serve an embedded model. 0: each node that has CPUs."""
    metrics_port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    """Where Prometheus finds a run's metrics on this machine, on loopback; 0: nowhere. A cluster serves
    them in any case, where it serves its own."""


class StoreSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How results are written."""

    shard_dialogues: Annotated[int, Meta(ge=1, le=1_000_000)] = 2000
    """Dialogues after which a set of shards is sealed, at the end of a cell."""
    shard_mb: Annotated[int, Meta(ge=1, le=4096)] = 64
    """Or this many megabytes of rows."""


class TrainingSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How models are tuned on the samples."""

    backend: Literal["local", "ray-train", "openai", "command"] = "local"
    """Who trains: LoRA in a process on this machine, the same over Ray Train, the fine-tuning jobs of an
    OpenAI-compatible service, or a command of your own."""
    model: str = ""
    """The model that is tuned, by its name in [models]; empty means the speaker's."""
    base: str = ""
    """local, ray-train: a folder with the base model as transformers saves it. Empty: the GGUF file of an
    embedded `model`."""
    command: tuple[str, ...] = ()
    """command: program and arguments. `{dataset}`, `{output}`, `{base}` and `{name}` stand for the sealed
    dataset's folder, the folder for the result, the base model and what is trained. No shell reads it."""
    held_out: Share = 0.2
    """The share of questions that no training row is about."""
    survey_rows: Count = 0
    """Further rows for each question trained on and culture, that teach how its people's answers are spread:
    they ask as an evaluation does, with the options in ever other orders, and are answered in proportion to
    the survey, without a reason. 0: what came of the dialogues alone."""
    samples: bool = True
    """Rows from the dialogues. Without them, with `survey_rows` alone, a model shows what the survey teaches
    by itself, which the dialogues have to beat."""
    rank: Annotated[int, Meta(ge=1, le=1024)] = 16
    """LoRA: the rank of the two matrices beside each layer."""
    alpha: Annotated[int, Meta(ge=1, le=4096)] = 32
    """LoRA: the adapter counts alpha / rank times."""
    dropout: Annotated[float, Meta(ge=0, le=0.9)] = 0.0
    """LoRA: dropout. On a CPU an eighth of a step goes into drawing it."""
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 5e-4
    """The highest learning rate; it warms up to it and falls linearly."""
    epochs: Annotated[float, Meta(gt=0, le=1000)] = 3.0
    """How often the rows are gone through."""
    max_steps: Count = 0
    """Stop after so many steps; 0 means after `epochs`."""
    batch: Annotated[int, Meta(ge=1, le=4096)] = 8
    """Rows of a step, all processes together."""
    row_tokens: Annotated[int, Meta(ge=16, le=1_048_576)] = 512
    """Longer rows are cut."""
    checkpoint_steps: Positive = 20
    """Steps between checkpoints; a training that was killed goes on from the last one."""
    launch: bool = False
    """Tune by itself while the run goes on: each culture as soon as the last of its dialogues has ended, and
    all together, if there are several, at the end. Else `culturepark finetune` does so afterwards."""
    cpus: Annotated[float, Meta(gt=0, le=4096)] = 1.0
    """CPUs that trainings launched by the run claim of the driver's node."""
    workers: Positive = 1
    """ray-train: processes that share a training; each has a GPU if the cluster has one for each."""
    poll_s: Seconds = 5.0
    """How often a running training is looked at."""


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings of a run."""

    models: dict[str, ModelSettings] = {}
    roles: RoleSettings = RoleSettings()
    plan: PlanSettings = PlanSettings()
    sampling: dict[Literal["speaker", "extractor", "verifier", "rewriter"], SamplingSettings] = {}
    refine: RefineSettings = RefineSettings()
    health: HealthSettings = HealthSettings()
    limits: LimitSettings = field(default_factory=LimitSettings)
    budget: BudgetSettings = BudgetSettings()
    actors: ActorSettings = ActorSettings()
    store: StoreSettings = StoreSettings()
    training: TrainingSettings = TrainingSettings()

    def model_of(self, role: Role) -> ModelSettings:
        """The model that serves `role`."""
        return self.models[self.roles.of(role)]


IDENTITY_ROOMS = ("models", "roles", "plan", "sampling", "refine", "health")
"""Rooms that decide what is generated. The others may change when a run is resumed."""

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_ADDRESS = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", re.IGNORECASE)
ADDRESS_FIX = "Write it like `http://localhost:8000/v1`, without keys or user names in it."
_SECRET_HEADER = re.compile(r"auth|cookie|credential|key|passw|secret|token", re.IGNORECASE)


def part_of(shard: str) -> tuple[int, int]:
    """`I/N` as numbers. Raises ValueError unless 1 <= I <= N, both written without leading zeros."""
    part, slash, parts = shard.partition("/")
    if f"{int(part)}{slash}{int(parts)}" != shard or not 1 <= int(part) <= int(parts):
        raise ValueError(shard)
    return int(part), int(parts)


def is_address(url: str) -> bool:
    """Whether this is a plain http(s) address: no user name, query or fragment, a port that can be."""
    if not _ADDRESS.fullmatch(url):
        return False
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def shown_address(url: str) -> str:
    """An address as it may be printed: without what could be a secret."""
    return re.split(r"[?#]", url.rsplit("@", 1)[-1])[0]


def load_settings(path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Read a TOML file (None: the quickstart), apply `key=value` overrides, and check the whole.

    Paths in the file are relative to its folder, those of overrides to the working directory.
    Raises ConfigError naming the key by its path, the value and what is allowed.
    """
    path = path if path is not None else config_dir() / "quickstart.toml"
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), "there is no such file.", _config_hint()) from None
    except IsADirectoryError:
        raise ConfigError(str(path), "this is a folder, not a configuration file.", _config_hint()) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"it cannot be read: {error}.", _config_hint()) from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), f"this is not TOML: {error}.", "Mend that line.") from None
    for override in overrides:
        _override(raw, override)
    settings = decode_settings(raw, str(path))
    return _anchor(settings, path.parent)


def with_overrides(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Settings with `key=value` overrides of the command line. Raises ConfigError."""
    raw = msgspec.to_builtins(settings)
    for override in overrides:
        _override(raw, override)
    return decode_settings(raw, "--set")


def decode_settings(raw: dict[str, Any], where: str) -> Settings:
    """Typed settings of plain data; `where` names its origin in errors."""
    _refuse_unknown(raw, Settings, where, "$")
    # The decoder does not say which entry of a table it means, so these are tried one by one.
    for room, kind in (("models", ModelSettings), ("sampling", SamplingSettings)):
        if isinstance(entries := raw.get(room), dict):
            for name, entry in cast(dict[str, Any], entries).items():
                _converted(entry, kind, where, f"$.{room}.{name}")
    settings = _converted(raw, Settings, where, "$")
    _check(settings, where)
    return settings


def _converted(raw: Any, kind: type[T], where: str, at: str) -> T:
    """Plain data as `kind`. Raises ConfigError naming the key below `at`."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        what, _, inner = str(error).partition(" - at ")
        path = inner.strip("`").removeprefix("$")
        value = _lookup(raw, path)
        # Values of [models] are not shown: one of them might be a key that got into the wrong place.
        if isinstance(value, bool | int | float | str) and not at.startswith("$.models"):
            what += f" (it is {value!r})"
        fix = _choices(kind, path) or "Mend the value and run again."
        raise ConfigError(f"{where}: {at}{path}", f"{_in_words(what)}.", fix) from None


_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}


def _in_words(what: str) -> str:
    """The decoder's words without its jargon."""
    what = re.sub(r"^Object missing required field `(\w+)`", r"`\1` is missing", what)
    what = re.sub(
        r"^Invalid enum value '.*'(?= \(it is)|^Invalid enum value '.*'$", "this is no choice", what
    )
    what = re.sub(r"^Expected ", "this must be ", what)
    what = re.sub(r", got `(\w+)`", lambda m: f", not {_WORDS.get(m.group(1), m.group(1))}", what)
    return re.sub(
        r"`(\w+(?: \| \w+)*)`",
        lambda m: " or ".join(
            _WORDS.get(part, f"`{part}`") for part in m.group(1).split(" | ") if part != "null"
        ),
        what,
    )


def _choices(kind: Any, path: str) -> str:
    """What may stand at a key that takes one of a few words; empty for other keys."""
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(kind, type) and issubclass(kind, Struct):
            kind = next((f.type for f in msgspec.structs.fields(kind) if f.name == part), None)
        elif get_origin(kind) is tuple:
            kind = get_args(kind)[0]
    return f"Choices: {', '.join(get_args(kind))}." if get_origin(kind) is Literal else ""


def _check(settings: Settings, where: str) -> None:
    """What types alone cannot say."""
    for name, model in settings.models.items():
        at = f"{where}: $.models.{name}"
        if not _MODEL_NAME.fullmatch(name):
            raise ConfigError(at, "a model's name is lower-case letters, digits and hyphens.", "Rename it.")
        if model.engine == "openai" and not model.model:
            fix = f"Name it: `--set models.{name}.model=NAME`."
            raise ConfigError(f"{at}.model", "the endpoint's model has no name.", fix)
        for url in model.base_urls:
            if not is_address(url):
                what = f"{shown_address(url)!r} is not an http(s) address."
                raise ConfigError(f"{at}.base_urls", what, ADDRESS_FIX)
        if not _names_variable(model.api_key_env):
            what = "this is not the name of an environment variable (its value is not shown here)."
            fix = 'Put the key into a variable and name it: `api_key_env = "MY_KEY"`.'
            raise ConfigError(f"{at}.api_key_env", what, fix)
        for header, value in model.headers.items():
            if _SECRET_HEADER.search(header) or re.search(r"\bsk-|\bBearer\b", value):
                what = f"`{header}` looks like a secret, and settings are saved with the results."
                raise ConfigError(f"{at}.headers", what, "Name a variable in `api_key_env` instead.")
            if not re.fullmatch(r"[A-Za-z0-9-]+", header) or not value.isprintable():
                what = f"{header!r} cannot be sent as a header."
                raise ConfigError(
                    f"{at}.headers", what, "Use letters, digits and hyphens, and one line of text."
                )
        if model.path and model.hub:
            raise ConfigError(at, "both `path` and `hub` are set.", "Keep one of them.")
        if model.hub and not re.match(r"^[\w.-]+/[\w.-]+:[\w./-]+\.gguf$", model.hub):
            fix = "Write it like `owner/name:file.gguf`."
            raise ConfigError(f"{at}.hub", f"{model.hub!r} names no GGUF file on a hub.", fix)
    if not settings.roles.speaker:
        raise ConfigError(f"{where}: $.roles.speaker", "no model speaks.", "Name one of [models].")
    if settings.refine.enabled and not settings.roles.embedder:
        fix = "Name one of [models], or set `refine.enabled = false`."
        raise ConfigError(f"{where}: $.roles.embedder", "refinement needs an embedder.", fix)
    for role in (*CHAT_ROLES, "embedder"):
        name = settings.roles.of(role)
        if name and name not in settings.models:
            fix = _did_you_mean(name, settings.models) + f"Models here: {', '.join(sorted(settings.models))}."
            raise ConfigError(f"{where}: $.roles.{role}", f"there is no model {name!r}.", fix)
    embedder = settings.models.get(settings.roles.embedder)
    if embedder is not None and embedder.engine == "embedded":
        for key in ("path", "hub", "dimensions", "gpu_layers"):
            if getattr(embedder, key):
                what = "the embedder on this machine is the packaged one."
                at = f"{where}: $.models.{settings.roles.embedder}.{key}"
                raise ConfigError(at, what, 'Take it out, or serve another with `engine = "openai"`.')
    for role in ("extractor", "verifier"):
        if role in settings.sampling and settings.model_of(role).profile == "small":
            what = "the small prompt profile calls no model for this role."
            raise ConfigError(f"{where}: $.sampling.{role}", what, "Take it out.")
    if settings.budget.money:
        for role in (*CHAT_ROLES, "embedder") if settings.refine.enabled else CHAT_ROLES[:1]:
            name = settings.roles.of(role)
            model = settings.models.get(name)
            if model is None or model.engine != "openai":
                continue
            if model.price_prompt is None or (model.price_completion is None and role != "embedder"):
                what = f"what {role} costs is unknown: the model {name!r} has no prices."
                fix = f"Give models.{name} a price_prompt and a price_completion, or a budget of tokens."
                raise ConfigError(f"{where}: $.budget.money", what, fix)
    training = settings.training
    if training.model and training.model not in settings.models:
        fix = (
            _did_you_mean(training.model, settings.models)
            + f"Models here: {', '.join(sorted(settings.models))}."
        )
        raise ConfigError(f"{where}: $.training.model", f"there is no model {training.model!r}.", fix)
    if not training.samples and not training.survey_rows:
        fix = "Set training.survey_rows, or leave training.samples as it is."
        raise ConfigError(f"{where}: $.training.samples", "without samples there is nothing to tune on.", fix)
    if training.backend == "command" and not training.command:
        fix = 'For example `command = ["my-trainer", "--data", "{dataset}", "--out", "{output}"]`.'
        raise ConfigError(f"{where}: $.training.command", "the backend `command` has no command.", fix)
    if training.backend == "ray-train" and training.batch % training.workers:
        what = f"{training.batch} rows cannot be shared out among {training.workers} workers."
        raise ConfigError(f"{where}: $.training.batch", what, f"Take a multiple of {training.workers}.")
    plan = settings.plan
    for key in ("kinds", "styles", "pairings", "openers", "seeds"):
        if not getattr(plan, key):
            raise ConfigError(f"{where}: $.plan.{key}", "the list is empty.", "Name at least one.")
    for key in ("cultures", "questions"):
        values: tuple[str, ...] = getattr(plan, key)
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError(f"{where}: $.plan.{key}", f"named twice: {', '.join(twice)}.", "Name it once.")
    try:
        part_of(plan.shard)
    except ValueError:
        fix = "For example `2/4`: the second of four parts."
        raise ConfigError(f"{where}: $.plan.shard", f"{plan.shard!r} names no part.", fix) from None
    if plan.utterances % 2:
        what = f"{plan.utterances} turns cannot be shared evenly by two speakers."
        raise ConfigError(f"{where}: $.plan.utterances", what, "Use an even number.")
    if plan.language == "native" and settings.model_of("speaker").profile == "small":
        what = "the small prompt profile speaks English only."
        fix = 'Set `plan.language = "english"`, or use a larger model with `profile = "full"`.'
        raise ConfigError(f"{where}: $.plan.language", what, fix)


def _names_variable(text: str) -> bool:
    """Whether this can be the name of an environment variable, and does not look like a key itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        return False
    looks_like_key = len(text) >= 20 and re.search(r"[a-z]", text) and re.search(r"[0-9]", text)
    return not looks_like_key or text in os.environ


def _refuse_unknown(raw: Any, kind: Any, where: str, at: str) -> None:
    """Name an unknown key with its neighbours, which the decoder does not do."""
    if not isinstance(raw, dict):
        return
    table = cast(dict[str, Any], raw)
    if isinstance(kind, type) and issubclass(kind, Struct):
        known = {f.name: f.type for f in msgspec.structs.fields(kind)}
        for key, value in table.items():
            if key not in known:
                fix = _did_you_mean(key, known) + f"Keys here: {', '.join(sorted(known))}."
                raise ConfigError(f"{where}: {at}.{key}", "there is no such key.", fix)
            _refuse_unknown(value, known[key], where, f"{at}.{key}")
    elif get_origin(kind) is dict:
        keys, values = get_args(kind)
        for key, value in table.items():
            if get_origin(keys) is Literal and key not in get_args(keys):
                fix = _did_you_mean(key, get_args(keys)) + f"Keys here: {', '.join(get_args(keys))}."
                raise ConfigError(f"{where}: {at}.{key}", "there is no such key.", fix)
            _refuse_unknown(value, values, where, f"{at}.{key}")


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply `a.b=value`; the value is TOML where it parses as TOML, text otherwise."""
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        shown = repr(override) if re.fullmatch(r"[a-z_.]{1,60}", override) else "what follows it"
        what = f"{shown} is not of the form key=value."
        raise ConfigError("--set", what, "For example `--set plan.dialogues_per_question=2`.")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    here = raw
    for part in parts[:-1]:
        nested: Any = here.setdefault(part, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"--set {key}", f"`{part}` is a value, not a table.", "Check the path.")
        here = cast(dict[str, Any], nested)
    here[parts[-1]] = _from_here(tuple(parts), parsed)


def _from_here(key: tuple[str, ...], value: Any) -> Any:
    """An override's value with its paths made absolute: whoever types one means the working directory."""
    if isinstance(value, dict):
        return {k: _from_here((*key, k), v) for k, v in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_from_here(key, one) for one in cast(list[Any], value)]
    is_path = key in (("plan", "seeds"), ("plan", "culture_files"), ("training", "base")) or (
        len(key) == 3 and key[0] == "models" and key[2] == "path"
    )
    if not is_path or not isinstance(value, str) or (key, value) == (("plan", "seeds"), "builtin"):
        return value
    return _absolute(value, Path.cwd())


def _lookup(raw: Any, path: str) -> Any:
    for part in re.findall(r"[^.\[\]$]+", path):
        if isinstance(raw, dict):
            raw = cast(dict[str, Any], raw).get(part)
        elif isinstance(raw, list) and part.isdigit() and int(part) < len(cast(list[Any], raw)):
            raw = cast(list[Any], raw)[int(part)]
        else:
            return None
    return raw


def _anchor(settings: Settings, folder: Path) -> Settings:
    """Paths in a configuration are relative to the file they stand in."""
    plan = msgspec.structs.replace(
        settings.plan,
        seeds=tuple(s if s == "builtin" else _absolute(s, folder) for s in settings.plan.seeds),
        culture_files=tuple(_absolute(c, folder) for c in settings.plan.culture_files),
    )
    models = {
        n: msgspec.structs.replace(m, path=_absolute(m.path, folder)) for n, m in settings.models.items()
    }
    training = msgspec.structs.replace(settings.training, base=_absolute(settings.training.base, folder))
    return msgspec.structs.replace(settings, plan=plan, models=models, training=training)


def _absolute(path: str, folder: Path) -> str:
    try:
        return path and str((folder / os.path.expanduser(path)).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(repr(path), f"this cannot be a path: {error}.", "Mend it.") from None


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean `{close[0]}`? " if close else ""


def _config_hint() -> str:
    return "Leave the file out for the quickstart, or copy one of those in `config/`."
