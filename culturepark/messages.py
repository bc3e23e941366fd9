"""Everything that crosses a boundary: between actors, and from actors to the disk.

Actors pass bytes. `encode` and `decode` turn one message to msgpack and back; a batch is a msgpack
array of messages. Every Struct here is importable from this module and nowhere else, since a
Struct defined in a script loses its fields on the way to a worker. New fields come with a default,
so that old bytes still read (schema evolution); `SCHEMA` counts changes that readers must know of.

On disk are the tags `outcome`, `spoke` and `step` and their fields' names, `take` for a term among them;
all other tags live no longer than a run's processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import msgspec
from msgspec import Struct

from culturepark.usage import Usage, UsageByRole, add, sum_by_role

SCHEMA = 1

Verdict = Literal["entails", "contradicts", "novel"]

FailureKind = Literal[
    "unauthorised",  # the key is refused, or out of money
    "no_such_model",
    "bad_request",  # the endpoint understood and refuses
    "rate_limited",
    "server",  # 5xx
    "timeout",
    "connection",
    "invalid_reply",  # not what the protocol promises
    "empty_reply",
    "too_large",
    "refused",  # a content filter
    "forbidden",  # 403: the key's fault or this prompt's, which only other calls can tell
    "internal",  # our own fault
]

RECORD_BYTES = 64 << 20
"""Bytes that a record may have at most: the log refuses a larger one, and the run could not go on."""

RUN_STOPPERS: frozenset[FailureKind] = frozenset({"unauthorised", "no_such_model"})
"""Kinds of failure that every later call would meet too: the run stops, and its dialogues stay owed."""


# --- what is said -------------------------------------------------------------------------------


class Turn(Struct, frozen=True):
    """One utterance. `speaker` is an index into the dialogue's personas; `number` starts at 1. `latency_s` is
    in seconds; `usage` is that of all calls for this turn; `health` holds labels of symptoms."""

    number: int
    speaker: int
    text: str
    model: str = ""
    endpoint: str = ""
    finish_reason: str = ""
    latency_s: float = 0.0
    usage: Usage = Usage()
    health: tuple[str, ...] = ()


class Opinion(Struct, frozen=True):
    """One opinion extracted from a turn, with everything that was decided about it.

    `start` and `end` are the span in the turn's text. `extracted` is what the extractor gave,
    `text` what is kept after rewriting and post-processing. `verdict` is that of `text`;
    `first_verdict` is that of the extracted text. `rejected` is empty for a candidate, else the
    reason, with `detail` in words. `vector` holds float32 bytes, empty when it was not embedded.
    """

    id: str
    turn: int
    speaker: int
    start: int
    end: int
    extracted: str
    text: str
    first_verdict: Verdict | None = None
    verdict: Verdict | None = None
    verdict_reason: str = ""
    rewritten: bool = False
    rejected: str = ""
    detail: str = ""
    vector: bytes = b""


# --- moderator -> agent, agent -> moderator --------------------------------------------------------


class Ask(Struct, frozen=True, tag="ask"):
    """A request for turn `turn` of dialogue `number`; `heard` is the text of the turn before it.

    An answer names the (`number`, `turn`) it is for, so it is harmless to ask twice (idempotent). `term` is
    the moderator's incarnation (incarnation number): an answer to an earlier term is dropped (fencing token).
    `transcript` goes only to an agent that answered NeedsTranscript.
    """

    number: int
    term: int
    turn: int
    heard: str
    transcript: tuple[Turn, ...] | None = None


class Spoke(Struct, frozen=True, tag="spoke"):
    """The answer to an ask, and a record of the log."""

    number: int
    term: int = msgspec.field(name="take")
    turn: Turn
    schema: int = SCHEMA


class NeedsTranscript(Struct, frozen=True, tag="needs_transcript"):
    """The agent's cache does not hold this dialogue: it needs the whole transcript (cache miss)."""

    number: int
    term: int
    turn: int


class CallFailed(Struct, frozen=True, tag="call_failed"):
    """A model call failed for good, retries included. `usage` is its tokens and calls, by role; `turn` is 0
    in refinement."""

    number: int
    term: int
    turn: int
    kind: FailureKind
    reason: str
    usage: dict[str, Usage] = {}


# --- moderator -> refiner, refiner -> moderator ------------------------------------------------------


class Step(Struct, frozen=True, tag="step"):
    """The reply to one model call of a refinement, and a record of the log: it is never paid for twice.

    `key` tells the calls of one dialogue apart by what was asked (idempotency key). `vectors` holds the
    float32 rows of an embedding, one after the other; `text` and `finish_reason` are of a chat model's reply.
    `only_usage`: calls of this dialogue, of any role, that brought no reply to keep and have to be counted.
    """

    number: int
    key: bytes
    role: str
    usage: Usage = Usage()
    text: str = ""
    finish_reason: str = ""
    model: str = ""
    endpoint: str = ""
    latency_s: float = 0.0
    vectors: bytes = b""
    only_usage: bool = False
    schema: int = SCHEMA


class Refine(Struct, frozen=True, tag="refine"):
    """A request to refine this complete dialogue and hand the outcome to the collector.

    `steps` are the calls that were answered in an earlier attempt, which was cut short.
    """

    number: int
    term: int
    turns: tuple[Turn, ...]
    started_s: float
    steps: tuple[Step, ...] = ()


class OutcomeStored(Struct, frozen=True, tag="outcome_stored"):
    """The outcome of this dialogue is on disk (acknowledgement). `failed` is as in Outcome."""

    number: int
    failed: str = ""


class TurnStored(Struct, frozen=True):
    """This turn is on disk: the next one may be asked for. Never sent: it is made of an acknowledgement."""

    number: int
    term: int
    turn: int


class UsageStored(Struct, frozen=True):
    """The usage of failed calls of this dialogue is on disk. Never sent, as TurnStored."""

    number: int


# --- agent or refiner -> moderator, and back: the load of endpoints, and limits -------------------------


class Seen(Struct, frozen=True):
    """What one process observed of one replica of one model since its last report.

    `latency_s` and `latency_sq` are sums over `completed` replies, of seconds and of their squares.
    `refused` counts 429s and their like (rate limiting), and `retry_after_s` is the longest wait that one
    asked for, bounded; `broken` counts 5xx, lost connections and time-outs. `in_flight` and `waiting` are
    counts of this moment, `most` the most in flight since the last report. `limit` is this process's share of
    the limit, 0 if it has none yet. `retried` counts requests that were further attempts at one call.
    """

    url: str
    model: str
    completed: int = 0
    latency_s: float = 0.0
    latency_sq: float = 0.0
    refused: int = 0
    retry_after_s: float = 0.0
    broken: int = 0
    in_flight: int = 0
    waiting: int = 0
    most: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    limit: int = 0
    retried: int = 0


class Share(Struct, frozen=True):
    """What one process may do with one replica of one model.

    `limit` is requests at once. `weight` is for routing, 0 to 1; 0 means that the replica's circuit breaker
    is open: only a trial request now and then. The rates are this process's part of the static limits of the
    whole model (token bucket), 0 for no limit.
    """

    url: str
    model: str
    limit: int
    weight: float = 1.0
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0


class LoadReport(Struct, frozen=True, tag="load_report"):
    """What the process at `address` observed of its endpoints since its last report (heartbeat)."""

    address: str
    seen: tuple[Seen, ...]


class Shares(Struct, frozen=True, tag="shares"):
    """The answer to a load report: what that process may do with each endpoint. `halt`: call none again."""

    shares: tuple[Share, ...]
    halt: bool = False


class Spent(Struct, frozen=True, tag="spent"):
    """Collector to moderator: the usage of the whole run so far, by role, as far as it is on disk."""

    usage: dict[str, Usage]


# --- to the collector ---------------------------------------------------------------------------


class Outcome(Struct, frozen=True, tag="outcome"):
    """How a planned dialogue ended: the last of its records in the log.

    `failed` is empty for a finished dialogue, else the kind of failure with `reason` in words.
    `usage` is by role, retries and rejected replies included; `notes` holds what a reader of the
    dialogue should know, such as a turn whose extraction could not be read.
    """

    number: int
    turns: tuple[Turn, ...]
    opinions: tuple[Opinion, ...] = ()
    usage: dict[str, Usage] = {}
    failed: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()
    started_s: float = 0.0
    ended_s: float = 0.0
    schema: int = SCHEMA


Message = (
    Ask
    | Spoke
    | NeedsTranscript
    | CallFailed
    | Refine
    | OutcomeStored
    | LoadReport
    | Shares
    | Spent
    | Step
    | Outcome
)

Record = Outcome | Spoke | Step
"""What the log holds: how dialogues ended, and of those in progress each turn and each call that is paid."""


class InProgress(Struct, frozen=True):
    """What is on disk of a dialogue that has not ended: its turns, and the calls of its refinement."""

    number: int
    turns: tuple[Turn, ...] = ()
    steps: tuple[Step, ...] = ()


class SpokenHead(Struct, frozen=True):
    """The fields of a Turn that the log's writer reads."""

    number: int
    usage: Usage = Usage()


class SpokeHead(Struct, frozen=True, tag="spoke"):
    """The fields of a Spoke that the log's writer reads."""

    number: int
    term: int = msgspec.field(name="take")
    turn: SpokenHead


class StepHead(Struct, frozen=True, tag="step"):
    """The fields of a Step that the log's writer reads."""

    number: int
    key: bytes
    role: str
    usage: Usage = Usage()


class _Ended(Struct, frozen=True, tag="outcome"):
    """The fields of an Outcome that its acknowledgement needs."""

    number: int
    failed: str = ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_outcome = msgspec.msgpack.Decoder(Outcome)
_messages = msgspec.msgpack.Decoder(list[Message])
_ended = msgspec.msgpack.Decoder(_Ended)
_record = msgspec.msgpack.Decoder(Record)
_head = msgspec.msgpack.Decoder(Outcome | SpokeHead | StepHead)
_stored = msgspec.msgpack.Decoder(_Ended | SpokeHead | StepHead)
_in_progress = msgspec.msgpack.Decoder(list[InProgress])
_raws = msgspec.msgpack.Decoder(list[msgspec.Raw])


def encode(message: Message) -> bytes:
    """One message as msgpack. Lone surrogates, which no UTF-8 can hold, become U+FFFD. An outcome that is
    larger than RECORD_BYTES becomes a failed one, without its turns."""
    try:
        raw = _encoder.encode(message)
    except UnicodeEncodeError:
        raw = _encoder.encode(msgspec.convert(_repaired(msgspec.to_builtins(message)), type(message)))
    if len(raw) > RECORD_BYTES and isinstance(message, Outcome):
        return _encoder.encode(_too_large(message, len(raw)))
    return raw


def _too_large(outcome: Outcome, size: int) -> Outcome:
    what = f"its record has {size} bytes and may have {RECORD_BYTES}: lower max_tokens or plan.utterances"
    return Outcome(
        outcome.number,
        (),
        usage=outcome.usage,
        failed="too_large",
        reason=what,
        started_s=outcome.started_s,
        ended_s=outcome.ended_s,
    )


def decode(raw: bytes | msgspec.Raw) -> Message:
    """The message in these bytes. Raises msgspec.DecodeError."""
    return _decoder.decode(raw)


def decode_outcome(raw: bytes) -> Outcome:
    """The outcome in these bytes. Raises msgspec.DecodeError."""
    return _outcome.decode(raw)


def decode_record(raw: bytes) -> Record:
    """The record of the log in these bytes. Raises msgspec.DecodeError."""
    return _record.decode(raw)


def decode_head(raw: bytes) -> Outcome | SpokeHead | StepHead:
    """The same, but of turns and steps only their heads: dialogue, number or key, role, usage."""
    return _head.decode(raw)


def encode_in_progress(dialogues: Iterable[InProgress]) -> bytes:
    """Dialogues in progress, as one msgpack array."""
    return _encoder.encode(list(dialogues))


def decode_in_progress(raw: bytes) -> list[InProgress]:
    """Back from `encode_in_progress`. Raises msgspec.DecodeError."""
    return _in_progress.decode(raw)


def speaker_usage(turns: Iterable[Turn]) -> Usage:
    """The usage of all turns together."""
    return sum((turn.usage for turn in turns), Usage())


def with_speaker(usage: Mapping[str, Usage], turns: Iterable[Turn]) -> UsageByRole:
    """A dialogue's usage by role, with that of its turns added to the speaker's: `usage` may hold calls of
    the speaker's that brought no turn."""
    return add(usage, {"speaker": speaker_usage(turns)})


def only_usage(number: int, usage: Mapping[str, Usage], key: bytes) -> list[Step]:
    """Records of the usage of calls that brought no reply, by role; `key` tells them from others."""
    return [
        Step(number, key + role.encode(), role, spent, only_usage=True)
        for role, spent in usage.items()
        if spent.calls
    ]


def bare_usage(steps: Iterable[Step]) -> UsageByRole:
    """The usage, by role, of the calls among these steps that brought no reply."""
    return step_usage(step for step in steps if step.only_usage)


def step_usage(steps: Iterable[Step]) -> UsageByRole:
    """The usage of the calls of these steps, by role."""
    return sum_by_role((step.role, step.usage) for step in steps)


def pack(messages: list[bytes]) -> bytes:
    """Encoded messages as one batch: a msgpack array with a 32-bit length."""
    return b"".join((b"\xdd", len(messages).to_bytes(4, "big"), *messages))


def unpack(batch: bytes) -> list[Message]:
    """The messages of a batch. Raises msgspec.DecodeError."""
    return _messages.decode(batch)


def unpack_raw(batch: bytes) -> list[msgspec.Raw]:
    """The messages of a batch, still encoded. Raises msgspec.DecodeError."""
    return _raws.decode(batch)


def outcome_stored(outcome: bytes) -> OutcomeStored:
    """The acknowledgement of an encoded outcome that is on disk."""
    ended = _ended.decode(outcome)
    return OutcomeStored(ended.number, ended.failed)


def stored(record: bytes) -> OutcomeStored | TurnStored | UsageStored:
    """The acknowledgement of an encoded outcome, turn or step that is on disk."""
    head = _stored.decode(record)
    if isinstance(head, SpokeHead):
        return TurnStored(head.number, head.term, head.turn.number)
    if isinstance(head, StepHead):
        return UsageStored(head.number)
    return OutcomeStored(head.number, head.failed)


def _repaired(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_repaired(k): _repaired(v) for k, v in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_repaired(v) for v in cast(Sequence[Any], value)]
    return value
