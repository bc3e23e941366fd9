"""Settings: one frozen Struct for each table of a configuration.

The docstring under a field says what it does; docs/configuration.md is made from them. A configuration is
read by settings_load, and what types cannot say is checked by settings_check.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta, Struct, field
from msgspec.structs import replace

from culturepark.pricing import Prices

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
ROLES: tuple[Role, ...] = (*CHAT_ROLES, "embedder")

WHOLE = "1/1"
"""The `shard` of a plan that is held as one run."""


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
    """The model's name at the endpoint. embedded: a model of `culturepark embedded list`, which
    `culturepark embedded install` puts on this machine; any other name is no more than a label."""
    base_urls: tuple[str, ...] = ()
    """Replicas of the endpoint; empty means OPENAI_BASE_URL, or OpenAI's own address."""
    api_key_env: str = "OPENAI_API_KEY"
    """The name of the environment variable that holds the key. The key itself never goes into a
    configuration."""
    profile: Literal["full", "small"] = "full"
    """Which prompts it gets: `full`, or `small` for models of under about a billion parameters."""
    path: str = ""
    """embedded: a GGUF file of your own; without `path`, `hub` and `model` it is the packaged SmolLM2."""
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
        """What requests call it; a server of our own accepts any name, and needs one."""
        return self.model or "embedded"

    @property
    def prices(self) -> Prices:
        """What its tokens cost."""
        return Prices(
            self.price_prompt, self.price_cached, self.price_completion, local=self.engine != "openai"
        )


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
    """What a run may use in all, from its first start on; 0 means no limit. It stops short of the limit
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
    """What trains: LoRA in a process on this machine, the same over Ray Train, the fine-tuning jobs of an
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

    @property
    def roles_used(self) -> tuple[Role, ...]:
        """The roles whose models a run calls."""
        return ROLES if self.refine.enabled else ("speaker",)

    def prices_of(self, role: str) -> Prices:
        """What the tokens of the model that serves `role` cost; unknown if there is no such role or model.

        An embedder has no completion tokens, and needs no price of them.
        """
        name = self.roles.of(role) if role in ROLES else ""
        if name not in self.models:
            return Prices()
        prices = self.models[name].prices
        return replace(prices, completion=0.0) if role == "embedder" else prices


IDENTITY_TABLES = ("models", "roles", "plan", "sampling", "refine", "health")
"""Tables that decide what is generated; a run is resumed with the same ones. The others may change."""

_ADDRESS = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", re.IGNORECASE)
ADDRESS_FIX = "Write it like `http://localhost:8000/v1`, without keys or user names in it."


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
