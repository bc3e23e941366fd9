"""The rows of a run: one fixed Arrow schema for dialogues, one for opinions kept or rejected.

Every shard of a kind has the same schema whatever it holds, so `datasets.load_dataset("parquet")`
reads them all. Provenance is in the row: nothing else is needed to say where a sample came from.
"""

# pyarrow ships no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from culturepark import __version__
from culturepark.cultures import Culture, Persona
from culturepark.messages import Opinion, Outcome
from culturepark.plan import Brief
from culturepark.prompts.training_rows import training_messages
from culturepark.refine.select import Choice
from culturepark.seeds.stance import Stance
from culturepark.store.rundir import RunFacts
from culturepark.versions import PROMPT_VERSION

_S, _I, _F, _B = pa.string(), pa.int64(), pa.float64(), pa.bool_()

_PERSON = pa.struct(
    [
        ("culture", _S),
        ("name", _S),
        ("gender", _S),
        ("age", _S),
        ("place", _S),
        ("occupation", _S),
        ("stance_code", _I),
        ("stance_label", _S),
        ("stance_share", _F),
    ]
)
_ABOUT = [
    ("run_id", _S),
    ("number", _I),
    ("culture", _S),
    ("kind", _S),
    ("style", _S),
    ("language", _S),
    ("seed_id", _S),
    ("survey", _S),
    ("wave", _S),
    ("topic", _S),
    ("statement", _S),
    ("country", _S),
    ("n_valid", _I),
    ("distribution_hash", _S),
    ("prompt_version", _S),
    ("code_version", _S),
]

DIALOGUES: Any = pa.schema(
    [
        ("id", _S),
        *_ABOUT,
        ("speakers", pa.list_(_PERSON)),
        (
            "turns",
            pa.list_(
                pa.struct(
                    [
                        ("number", _I),
                        ("speaker", _I),
                        ("name", _S),
                        ("text", _S),
                        ("model", _S),
                        ("endpoint", _S),
                        ("finish_reason", _S),
                        ("health", pa.list_(_S)),
                        ("latency_s", _F),
                        ("prompt_tokens", _I),
                        ("cached_tokens", _I),
                        ("completion_tokens", _I),
                    ]
                )
            ),
        ),
        ("status", _S),
        ("failure", _S),
        ("reason", _S),
        ("notes", pa.list_(_S)),
        ("n_opinions", _I),
        (
            "usage",
            pa.list_(
                pa.struct(
                    [
                        ("role", _S),
                        ("calls", _I),
                        ("prompt_tokens", _I),
                        ("cached_tokens", _I),
                        ("completion_tokens", _I),
                        ("unreported", _I),
                    ]
                )
            ),
        ),
        ("started_s", _F),
        ("ended_s", _F),
    ]
)
"""One row for each planned dialogue, finished or failed."""

OPINIONS: Any = pa.schema(
    [
        ("id", _S),
        ("dialogue_id", _S),
        *_ABOUT,
        ("persona", _PERSON),
        ("turn", _I),
        ("start", _I),
        ("end", _I),
        ("extracted", _S),
        ("text", _S),
        ("first_verdict", _S),
        ("verdict", _S),
        ("verdict_reason", _S),
        ("rewritten", _B),
        ("kept", _B),
        ("rejected", _S),
        ("detail", _S),
        ("instead", _S),
        ("cluster", _I),
        ("messages", pa.list_(pa.struct([("role", _S), ("content", _S)]))),
        ("speaker_model", _S),
        ("extractor_model", _S),
        ("verifier_model", _S),
        ("rewriter_model", _S),
        ("embedder_model", _S),
        ("sampling", _S),
        ("embedding", pa.list_(pa.float32())),
    ]
)
"""One row for each extracted opinion. `samples` shards hold those with `kept`, `rejected` shards the rest."""


_CHUNK_ROWS = 512
"""Rows that a RowBuffer holds as Python objects before it converts them to Arrow."""


def dialogue_row(brief: Brief, outcome: Outcome, about: dict[str, Any]) -> dict[str, Any]:
    """The row of one dialogue; `about` is `about_of` it."""
    names = [persona.name for persona in brief.speakers]
    return {
        "id": brief.id,
        **about,
        "speakers": [_person(p, s) for p, s in zip(brief.speakers, brief.stances, strict=True)],
        "turns": [
            {
                "number": turn.number,
                "speaker": turn.speaker,
                "name": names[turn.speaker],
                "text": turn.text,
                "model": turn.model,
                "endpoint": turn.endpoint,
                "finish_reason": turn.finish_reason,
                "health": turn.health,
                "latency_s": turn.latency_s,
                "prompt_tokens": turn.usage.prompt_tokens,
                "cached_tokens": turn.usage.cached_tokens,
                "completion_tokens": turn.usage.completion_tokens,
            }
            for turn in outcome.turns
        ],
        "status": "failed" if outcome.failed else "finished",
        "failure": outcome.failed,
        "reason": outcome.reason,
        "notes": list(outcome.notes),
        "n_opinions": len(outcome.opinions),
        "usage": [
            {
                "role": role,
                "calls": usage.calls,
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "unreported": usage.unreported,
            }
            for role, usage in sorted(outcome.usage.items())
        ],
        "started_s": outcome.started_s,
        "ended_s": outcome.ended_s,
    }


def opinion_row(
    brief: Brief,
    opinion: Opinion,
    choice: Choice | None,
    about: dict[str, Any],
    facts: RunFacts,
    cultures: Mapping[str, Culture],
) -> dict[str, Any]:
    """The row of one opinion; `choice` is None for one that refinement rejected, `about` is `about_of`
    its dialogue."""
    kept = choice is not None and choice.kept
    trains = kept and (facts.train_on_novel or opinion.verdict != "novel")
    messages = training_messages(brief, opinion, cultures[brief.culture].demonym) if trains else []
    return {
        "id": opinion.id,
        "dialogue_id": brief.id,
        **about,
        "persona": _person(brief.speakers[opinion.speaker], brief.stances[opinion.speaker]),
        "turn": opinion.turn,
        "start": opinion.start,
        "end": opinion.end,
        "extracted": opinion.extracted,
        "text": opinion.text,
        "first_verdict": opinion.first_verdict,
        "verdict": opinion.verdict,
        "verdict_reason": opinion.verdict_reason,
        "rewritten": opinion.rewritten,
        "kept": kept,
        "rejected": opinion.rejected or ("" if choice is None else choice.reason),
        "detail": opinion.detail,
        "instead": choice.instead if choice else "",
        "cluster": choice.cluster if choice else -1,
        "messages": messages,
        "speaker_model": facts.models.get("speaker", ""),
        "extractor_model": facts.models.get("extractor", ""),
        "verifier_model": facts.models.get("verifier", ""),
        "rewriter_model": facts.models.get("rewriter", "") if opinion.rewritten else "",
        "embedder_model": facts.models.get("embedder", ""),
        "sampling": facts.sampling,
        "embedding": np.frombuffer(opinion.vector, dtype=np.float32),
    }


class RowBuffer:
    """Rows on their way to a shard: Python objects while they are few, then Arrow, which is far smaller."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._tables: list[Any] = []
        self._n = 0

    def add(self, row: dict[str, Any]) -> None:
        """Add one row."""
        self._rows.append(row)
        self._n += 1
        if len(self._rows) >= _CHUNK_ROWS:
            self._convert()

    def __len__(self) -> int:
        return self._n

    def table(self) -> Any:
        """All rows, in order, as one table of the fixed schema."""
        self._convert()
        return pa.concat_tables(self._tables).combine_chunks()

    def _convert(self) -> None:
        if self._rows or not self._tables:
            self._tables.append(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def about_of(brief: Brief, facts: RunFacts) -> dict[str, Any]:
    """What a dialogue's row and those of its opinions have in common."""
    return {
        "run_id": facts.run_id,
        "number": brief.number,
        "culture": brief.culture,
        "kind": brief.kind,
        "style": brief.style,
        "language": brief.language,
        "seed_id": brief.seed.id,
        "survey": brief.seed.survey,
        "wave": brief.seed.wave,
        "topic": brief.seed.topic,
        "statement": brief.seed.statement,
        "country": brief.answers.country,
        "n_valid": brief.answers.n_valid,
        "distribution_hash": brief.answers.digest(),
        "prompt_version": PROMPT_VERSION,
        "code_version": __version__,
    }


def _person(persona: Persona, stance: Stance | None) -> dict[str, Any]:
    return {
        "culture": persona.culture,
        "name": persona.name,
        "gender": persona.gender,
        "age": persona.age,
        "place": persona.place,
        "occupation": persona.occupation,
        "stance_code": stance.code if stance else None,
        "stance_label": stance.label if stance else None,
        "stance_share": stance.share if stance else None,
    }
