"""Everything that crosses a boundary: between actors, and from actors to the disk.

Actors pass bytes. `encode` and `decode` turn one message to msgpack and back; a batch is a msgpack
array of messages. Every Struct here is importable from this module and nowhere else, since a
Struct defined in a script loses its fields on the way to a worker. New fields come with a default,
so that old bytes still read; `SCHEMA` counts changes that readers must know of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import msgspec
from msgspec import Struct

from culturepark.usage import Usage

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
"""No record may be larger, since the log would refuse it and the run could not go on."""

RUN_STOPPERS: frozenset[FailureKind] = frozenset({"unauthorised", "no_such_model"})
"""Failures that every later call would meet too: the run stops and the dialogues stay owed."""


# --- what is said -------------------------------------------------------------------------------


class Turn(Struct, frozen=True):
    """One utterance. `speaker` is an index into the dialogue's two personas; `number` starts at 1."""

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
    """One opinion taken from a turn, with everything that was decided about it.

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
    """Say turn `turn` of dialogue `number`, having heard the other's last words.

    An ask is answered for its (`number`, `turn`), so asking twice is harmless. `term` tells the
    moderator's lives apart (incarnation number): what was said in an earlier term is no part of this one.
    `transcript` is only sent to an agent that said it does not know the dialogue.
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


class NeedsTranscript(Struct, frozen=True, tag="unknown"):
    """The agent has no transcript of this dialogue and needs it whole."""

    number: int
    term: int
    turn: int


class CallFailed(Struct, frozen=True, tag="balked"):
    """A model call failed for good. `usage` is what it took, by role; `turn` is 0 in refinement."""

    number: int
    term: int
    turn: int
    kind: FailureKind
    reason: str
    usage: dict[str, Usage] = {}


# --- moderator -> refiner, refiner -> moderator ------------------------------------------------------


class Step(Struct, frozen=True, tag="step"):
    """One model call of a refinement that came back: its reply, so that nobody pays for it twice.

    `key` tells the calls of one dialogue apart by what was asked. `vectors` holds the float32 rows of
    an embedding, one after the other; `text` and `finish_reason` are of a chat model's reply.
    `only_usage`: calls of this dialogue, of any role, that brought nothing to keep but have to be counted.
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
    """Refine this whole dialogue and hand the outcome to the collector.

    `steps` are its calls that have come back already, in an attempt that was cut short.
    """

    number: int
    term: int
    turns: tuple[Turn, ...]
    started_s: float
    steps: tuple[Step, ...] = ()


class OutcomeStored(Struct, frozen=True, tag="recorded"):
    """The outcome of this dialogue is on disk. `failed` is as in Outcome."""

    number: int
    failed: str = ""


class TurnStored(Struct, frozen=True):
    """This turn is on disk: the next one may be asked for. Never sent; made of an acknowledgement."""

    number: int
    term: int
    turn: int


class UsageStored(Struct, frozen=True):
    """What calls of this dialogue took is on disk. Never sent, as Kept."""

    number: int


# --- agent or refiner -> moderator, and back: how much may be under way ------------------------------


class Seen(Struct, frozen=True):
    """What one process saw of one replica of one model since its last report.

    `latency_s` and `latency_sq` are sums over `completed` replies, of seconds and of their squares.
    `retry_after_s` is the longest wait asked for, bounded; `broken` counts 5xx, lost connections and
    time-outs. `in_flight` and `waiting` are counts of this moment, `most` the most in flight since the
    last report. `limit` is the share this process was given, 0 if it was given none. `retried` counts
    requests that were further attempts at one call.
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

    `limit` is requests at once. `weight` is for routing, 0 to 1; 0 means: only a trial now and then.
    The rates are this process's part of the static limits of the whole model, 0 for no limit.
    """

    url: str
    model: str
    limit: int
    weight: float = 1.0
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0


class LoadReport(Struct, frozen=True, tag="pulse"):
    """What the process at `address` saw of its endpoints since its last pulse."""

    address: str
    seen: tuple[Seen, ...]


class Shares(Struct, frozen=True, tag="shares"):
    """The answer to a pulse: what that process may do with each endpoint. `halt`: call none any more."""

    shares: tuple[Share, ...]
    halt: bool = False


class Spent(Struct, frozen=True, tag="spent"):
    """Collector to moderator: what the whole run has taken so far, by role, as far as it is on disk."""

    usage: dict[str, Usage]


# --- to the collector ---------------------------------------------------------------------------


class Outcome(Struct, frozen=True, tag="outcome"):
    """How a planned dialogue ended: the record that the log holds.

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
"""What the log holds: how dialogues ended, and of those under way each turn and each call that is paid."""


class InProgress(Struct, frozen=True):
    """What is on disk of a dialogue that has not ended: the turns said, the calls of its refinement."""

    number: int
    turns: tuple[Turn, ...] = ()
    steps: tuple[Step, ...] = ()


class SpokenHead(Struct, frozen=True):
    """Of a turn, what the log's writer looks at."""

    number: int
    usage: Usage = Usage()


class SpokeHead(Struct, frozen=True, tag="spoke"):
    """Of a Spoke, what the log's writer looks at."""

    number: int
    term: int = msgspec.field(name="take")
    turn: SpokenHead


class StepHead(Struct, frozen=True, tag="step"):
    """Of a Step, what the log's writer looks at."""

    number: int
    key: bytes
    role: str
    usage: Usage = Usage()


class _Ended(Struct, frozen=True, tag="outcome"):
    """What of an Outcome is worth reading where only its end matters."""

    number: int
    failed: str = ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_outcome = msgspec.msgpack.Decoder(Outcome)
_messages = msgspec.msgpack.Decoder(list[Message])
_ended = msgspec.msgpack.Decoder(_Ended)
_record = msgspec.msgpack.Decoder(Record)
_head = msgspec.msgpack.Decoder(Outcome | SpokeHead | StepHead)
_taken = msgspec.msgpack.Decoder(_Ended | SpokeHead | StepHead)
_begun = msgspec.msgpack.Decoder(list[InProgress])
_raws = msgspec.msgpack.Decoder(list[msgspec.Raw])


def encode(message: Message) -> bytes:
    """One message as msgpack. Lone surrogates, which no UTF-8 can hold, become U+FFFD. An outcome that is
    larger than a record may be becomes a failed one, without what was said."""
    try:
        raw = _encoder.encode(message)
    except UnicodeEncodeError:
        raw = _encoder.encode(msgspec.convert(_mended(msgspec.to_builtins(message)), type(message)))
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
    """The same, but of turns and steps no more than who, which and what it took."""
    return _head.decode(raw)


def encode_begun(begun: Iterable[InProgress]) -> bytes:
    """Dialogues that have begun, as one msgpack array."""
    return _encoder.encode(list(begun))


def decode_begun(raw: bytes) -> list[InProgress]:
    """Back from `encode_begun`. Raises msgspec.DecodeError."""
    return _begun.decode(raw)


def speaker_usage(turns: Iterable[Turn]) -> Usage:
    """What all turns together took."""
    return sum((turn.usage for turn in turns), Usage())


def with_speaker(usage: Mapping[str, Usage], turns: Iterable[Turn]) -> dict[str, Usage]:
    """A dialogue's usage by role, with what its turns took. It may hold calls of the speaker's that brought
    none."""
    return {**usage, "speaker": speaker_usage(turns) + usage.get("speaker", Usage())}


def only_usage(number: int, usage: Mapping[str, Usage], key: bytes) -> list[Step]:
    """Records of what calls took that brought nothing else, by role; `key` tells them from others."""
    return [
        Step(number, key + role.encode(), role, took, only_usage=True)
        for role, took in usage.items()
        if took.calls
    ]


def bare_usage(steps: Iterable[Step]) -> dict[str, Usage]:
    """What steps say of calls that brought nothing else, by role."""
    return step_usage(step for step in steps if step.only_usage)


def step_usage(steps: Iterable[Step]) -> dict[str, Usage]:
    """What the calls of these steps took, by role."""
    usage: dict[str, Usage] = {}
    for step in steps:
        usage[step.role] = usage.get(step.role, Usage()) + step.usage
    return usage


def pack(messages: list[bytes]) -> bytes:
    """Encoded messages as one batch: a msgpack array with a 32-bit length."""
    return b"".join((b"\xdd", len(messages).to_bytes(4, "big"), *messages))


def unpack(batch: bytes) -> list[Message]:
    """The messages of a batch. Raises msgspec.DecodeError."""
    return _messages.decode(batch)


def unpack_raw(batch: bytes) -> list[msgspec.Raw]:
    """The messages of a batch, still encoded. Raises msgspec.DecodeError."""
    return _raws.decode(batch)


def recorded(outcome: bytes) -> OutcomeStored:
    """What the moderator is told of an encoded outcome that is on disk."""
    ended = _ended.decode(outcome)
    return OutcomeStored(ended.number, ended.failed)


def on_disk(record: bytes) -> OutcomeStored | TurnStored | UsageStored:
    """What it means that this encoded outcome, turn or step is on disk."""
    head = _taken.decode(record)
    if isinstance(head, SpokeHead):
        return TurnStored(head.number, head.term, head.turn.number)
    if isinstance(head, StepHead):
        return UsageStored(head.number)
    return OutcomeStored(head.number, head.failed)


def _mended(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_mended(k): _mended(v) for k, v in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_mended(v) for v in cast(Sequence[Any], value)]
    return value
