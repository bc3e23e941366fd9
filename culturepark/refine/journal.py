"""The replies to a refinement's model calls, kept so that none is paid for twice (memoisation on disk).

A dialogue's refinement is many calls. Each reply is on disk before anything follows from it (write-ahead
log); when the refinement has to begin again, because a process died, a call that was answered before is
answered from here.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from hashlib import blake2b

import numpy as np

from culturepark.messages import RECORD_BYTES, Step, bare_usage, only_usage, step_usage
from culturepark.ports import Completion, Embedding
from culturepark.usage import Usage, add

_KEY_BYTES = 12
"""A call's key is a hash of this many bytes."""


class Journal:
    """The calls of one dialogue's refinement. `keep` returns once a step is on disk."""

    def __init__(self, number: int, steps: Iterable[Step], keep: Callable[[Step], Awaitable[None]]) -> None:
        self._number = number
        self._known = {step.key: step for step in steps}
        self.before = bare_usage(self._known.values())
        """Usage by role, in earlier attempts, of the dialogue's calls that brought nothing to keep."""
        self.usage = step_usage(self._known.values())
        """Usage by role of all calls of the refinement, as far as it is on disk."""
        self._keep_step = keep
        self._asked: Counter[bytes] = Counter()

    async def _keep(self, step: Step) -> None:
        self.usage = add(self.usage, {step.role: step.usage})
        await self._keep_step(step)

    def key(self, role: str, asked: bytes) -> bytes:
        """What identifies this call: a hash of the role and of what was asked, and the number of the call if
        the same was asked before."""
        digest = blake2b(asked, digest_size=_KEY_BYTES, key=role.encode()).digest()
        self._asked[digest] += 1
        nth = self._asked[digest]
        return digest if nth == 1 else digest + nth.to_bytes(2, "big")

    async def spent(self, role: str, usage: Usage) -> None:
        """Keep the usage of calls that brought nothing else: it has to be counted even if this attempt
        comes to nothing, too."""
        for step in only_usage(self._number, {role: usage}, secrets.token_bytes(_KEY_BYTES)):
            await self._keep(step)

    async def completion(
        self, role: str, asked: bytes, call: Callable[[], Awaitable[Completion]]
    ) -> Completion:
        """The reply to what was asked: from the journal, or from `call`, kept. Raises ModelError."""
        key = self.key(role, asked)
        if known := self._known.get(key):
            return Completion(
                known.text, known.usage, known.finish_reason, known.model, known.endpoint, known.latency_s
            )
        reply = await call()
        await self._keep(
            Step(
                number=self._number,
                key=key,
                role=role,
                usage=reply.usage,
                text=reply.text,
                finish_reason=reply.finish_reason,
                model=reply.model,
                endpoint=reply.endpoint,
                latency_s=round(reply.latency_s, 4),
            )
        )
        return reply

    async def embedding(self, asked: bytes, rows: int, call: Callable[[], Awaitable[Embedding]]) -> Embedding:
        """The same for an embedding of `rows` texts. Raises ModelError."""
        key = self.key("embedder", asked)
        if known := self._known.get(key):
            vectors = np.frombuffer(known.vectors, dtype=np.float32).reshape(rows, -1)
            return Embedding(vectors, known.usage)
        found = await call()
        raw = np.ascontiguousarray(found.vectors, dtype=np.float32).tobytes()
        if len(raw) > RECORD_BYTES // 2:  # no record: should it be needed again, it is paid for again
            await self.spent("embedder", found.usage)
        else:
            step = Step(number=self._number, key=key, role="embedder", usage=found.usage, vectors=raw)
            await self._keep(step)
        return found


async def _nowhere(step: Step) -> None:
    """Keep nothing."""


def no_journal() -> Journal:
    """A journal that keeps nothing."""
    return Journal(0, (), _nowhere)
