"""One dialogue's refinement: extract, verify, rewrite, verify again, embed.

Every opinion that was extracted comes out, as a candidate or rejected with a reason. What is kept
of the candidates is decided later, cell by cell, in `select`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from culturepark.messages import Opinion, Turn
from culturepark.models.errors import ModelError
from culturepark.plan import Brief
from culturepark.ports import ChatModel, Embedder, Embedding, Prompt, Sampling, Vectors
from culturepark.prompts.profile import Profile
from culturepark.refine.extract import MAX_OPINIONS, Found, read_opinions, sentences_as_opinions
from culturepark.refine.hybrid import HybridVerifier
from culturepark.refine.journal import Journal, no_journal
from culturepark.refine.verify import Judgement, read_verdict
from culturepark.refine.wording import first_person, holds_no_opinion, without_lead_in
from culturepark.settings import RefineSettings
from culturepark.text import unquoted, words
from culturepark.usage import Usage, UsageByRole, add

T = TypeVar("T")


class RoleModel(Struct):
    """The model, prompts and sampling of one role."""

    model: ChatModel
    profile: Profile
    sampling: Sampling


class Refinement(Struct, frozen=True):
    """The opinions of one dialogue, the usage of all calls and notes on what could not be read."""

    opinions: tuple[Opinion, ...]
    usage: UsageByRole
    notes: tuple[str, ...]


class RefineError(Exception):
    """A model call that failed for good, with the refinement's usage up to then, by role."""

    def __init__(self, cause: ModelError, usage: UsageByRole) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.usage = usage


class Refiner:
    """Refines dialogues; keeps nothing between them but the positions of seeds, embedded once.

    `paid_vectors`: what the embedder returns is worth keeping in the journal.
    """

    def __init__(
        self,
        settings: RefineSettings,
        roles: Mapping[str, RoleModel],
        embedder: Embedder,
        *,
        paid_vectors: bool = False,
    ) -> None:
        self.paid_vectors = paid_vectors
        self._settings = settings
        self._roles = roles
        self._embedder = embedder
        self._hybrid = HybridVerifier(embedder)

    async def refine(self, brief: Brief, turns: Sequence[Turn], journal: Journal | None = None) -> Refinement:
        """Refine one dialogue; `journal` holds its calls. Raises RefineError."""
        return await _Work(self, brief, turns, journal or no_journal()).run()

    @property
    def settings(self) -> RefineSettings:
        """What happens to opinions."""
        return self._settings

    @property
    def hybrid(self) -> HybridVerifier:
        """The verifier for models too small to judge."""
        return self._hybrid

    def role(self, name: str) -> RoleModel:
        """The model of a role."""
        return self._roles[name]

    async def embed(self, texts: Sequence[str]) -> Embedding:
        """Embed texts. Raises ModelError."""
        return await self._embedder.embed(texts)


class _Work:
    """The refinement of one dialogue: its brief, its turns and its usage so far."""

    def __init__(self, refiner: Refiner, brief: Brief, turns: Sequence[Turn], journal: Journal) -> None:
        self._refiner = refiner
        self._journal = journal
        self._brief = brief
        self._turns = turns
        self._usage = journal.before
        self._notes: list[str] = []
        self._vectors: dict[str, Vectors] = {}

    async def run(self) -> Refinement:
        try:
            by_turn = await self._together(self._extract(t) for t in self._turns if self._counts(t))
            opinions = [self._sifted(o) for found in by_turn for o in found]
            opinions = await self._verified(opinions)
            opinions = await self._embedded(opinions)
        except ModelError as error:
            raise RefineError(error, self._usage) from error
        return Refinement(tuple(opinions), self._usage, tuple(self._notes))

    def _counts(self, turn: Turn) -> bool:
        return turn.speaker in self._brief.delegates

    # --- extraction

    async def _extract(self, turn: Turn) -> list[Opinion]:
        role = self._refiner.role("extractor")
        if not role.profile.judges:
            found = sentences_as_opinions(turn.text)
        else:
            brief = self._brief
            at_most = max(MAX_OPINIONS, brief.direct_reasons) if brief.kind == "direct" else MAX_OPINIONS
            prompt, schema = role.profile.extraction(brief, turn.speaker, turn.text)
            found, why = await self._asked(
                "extractor", prompt, schema, lambda reply: read_opinions(reply, turn.text, at_most)
            )
            if found is None:
                self._notes.append(f"turn {turn.number}: {why}")
                found = []
        return [self._opinion(turn, i, one) for i, one in enumerate(found, 1)]

    def _opinion(self, turn: Turn, place: int, found: Found) -> Opinion:
        name = self._brief.speakers[turn.speaker].name
        return Opinion(
            id=f"{self._brief.id}-t{turn.number}-o{place}",
            turn=turn.number,
            speaker=turn.speaker,
            start=found.start,
            end=found.end,
            extracted=found.text,
            text=first_person(without_lead_in(unquoted(found.text)), name),
        )

    def _sifted(self, opinion: Opinion) -> Opinion:
        """Drop what is no opinion before anything is spent on it."""
        if holds_no_opinion(opinion.text):
            return replace(opinion, rejected="no_opinion", detail="a question, a courtesy or no opinion")
        count = words(opinion.text)
        if count < self._refiner.settings.min_words:
            return replace(opinion, rejected="too_short", detail=f"{count} words")
        return opinion

    # --- verification and rewriting

    async def _verified(self, opinions: list[Opinion]) -> list[Opinion]:
        open_ones = [o for o in opinions if not o.rejected]
        judgements = await self._judge([(o.speaker, o.text) for o in open_ones])
        judged = dict(
            zip((o.id for o in open_ones), map(self._with_verdict, open_ones, judgements), strict=True)
        )
        if self._refiner.settings.rewrite:
            wrong = [o for o in judged.values() if o.verdict == "contradicts"]
            for mended in await self._rewritten(wrong):
                judged[mended.id] = mended
        return [self._ruled(judged.get(o.id, o)) for o in opinions]

    def _with_verdict(self, opinion: Opinion, judgement: Judgement | str) -> Opinion:
        if isinstance(judgement, str):
            return replace(opinion, rejected="unreadable_verdict", detail=judgement)
        return replace(
            opinion,
            first_verdict=judgement.verdict,
            verdict=judgement.verdict,
            verdict_reason=judgement.reason,
        )

    async def _rewritten(self, opinions: list[Opinion]) -> list[Opinion]:
        """Rewrite opinions that contradict, and judge the text that would be kept."""
        texts = await self._together(self._rewrite(o) for o in opinions)
        # A rewrite that came out empty changes nothing: the opinion stays what it was.
        changed = [(o, text) for o, text in zip(opinions, texts, strict=True) if text]
        old = self._refiner.settings.faults.verify_old_text
        verdicts = await self._judge([(o.speaker, o.text if old else text) for o, text in changed])
        out: list[Opinion] = []
        for (opinion, text), judgement in zip(changed, verdicts, strict=True):
            if isinstance(judgement, str):
                unread = replace(opinion, text=text, rewritten=True, verdict=None, verdict_reason="")
                out.append(self._with_verdict(unread, judgement))
                continue
            out.append(
                replace(
                    opinion,
                    text=text,
                    rewritten=True,
                    verdict=judgement.verdict,
                    verdict_reason=judgement.reason,
                )
            )
        return out

    async def _rewrite(self, opinion: Opinion) -> str:
        role = self._refiner.role("rewriter")
        prompt, cue = role.profile.rewriting(self._brief, opinion.speaker, opinion.text)
        if cue.prefill:
            prompt.add("assistant", cue.prefill)
        try:
            completion = await self._complete("rewriter", prompt, None)
        except ModelError as error:
            if not error.is_its_own:
                raise
            return ""
        name = self._brief.speakers[opinion.speaker].name
        cut = completion.finish_reason == "length"
        text = role.profile.clean(completion.text, cue, name, cut).replace("\n", " ")
        return first_person(text, name)

    def _ruled(self, opinion: Opinion) -> Opinion:
        """Reject what must not be kept, by its last verdict."""
        if opinion.rejected:
            return opinion
        settings = self._refiner.settings
        if opinion.verdict == "contradicts":
            reason = "contradicts_after_rewrite" if opinion.rewritten else "contradicts"
            return replace(opinion, rejected=reason, detail=opinion.verdict_reason)
        if opinion.rewritten and opinion.verdict != "entails":
            # A rewrite was made to fit the stance; one that lost the subject is no opinion of the speaker's.
            return replace(opinion, rejected="off_topic_after_rewrite", detail=opinion.verdict_reason)
        if opinion.verdict == "novel" and settings.faults.drop_novel:
            return replace(opinion, rejected="novel", detail="as in the published reference")
        return self._sifted(opinion) if opinion.rewritten else opinion

    async def _judge(self, opinions: Sequence[tuple[int, str]]) -> list[Judgement | str]:
        """Judge (speaker, text) pairs against their speakers' stances; in words, why one was not judged."""
        if not self._refiner.role("verifier").profile.judges:
            return await self._judge_by_vectors(opinions)
        return await self._together(self._judge_by_model(s, text) for s, text in opinions)

    async def _judge_by_model(self, speaker: int, text: str) -> Judgement | str:
        prompt, schema = self._refiner.role("verifier").profile.verification(self._brief, speaker, text)
        judgement, why = await self._asked("verifier", prompt, schema, read_verdict)
        return judgement or why

    async def _judge_by_vectors(self, opinions: Sequence[tuple[int, str]]) -> list[Judgement | str]:
        judged: list[Judgement | str] = ["the opinion of no delegate"] * len(opinions)
        for speaker in self._brief.delegates:
            stance = self._brief.stances[speaker]
            assert stance is not None  # delegates hold one
            rows = [i for i, (by, _) in enumerate(opinions) if by == speaker]
            if not rows:
                continue
            anchors = await self._positions()
            vectors = await self._embed([opinions[i][1] for i in rows])
            results = self._refiner.hybrid.judge_all(self._brief.seed, stance.code, anchors, vectors)
            for i, result in zip(rows, results, strict=True):
                judged[i] = result
        return judged

    async def _positions(self) -> Vectors:
        """One row for each position of the seed. The dialogue that needs them first counts their cost."""
        try:
            positions = await self._refiner.hybrid.positions(self._brief.seed)
        except ModelError as error:
            await self._lost("embedder", error.usage)
            raise
        await self._lost("embedder", positions.usage)
        return positions.vectors

    # --- embedding

    async def _embedded(self, opinions: list[Opinion]) -> list[Opinion]:
        rows = [i for i, o in enumerate(opinions) if not o.rejected]
        if not rows:
            return opinions
        vectors = await self._embed([opinions[i].text for i in rows])
        out = list(opinions)
        for i, vector in zip(rows, vectors, strict=True):
            out[i] = replace(opinions[i], vector=np.ascontiguousarray(vector, dtype=np.float32).tobytes())
        return out

    async def _embed(self, texts: Sequence[str]) -> Vectors:
        """One row for each text. What was judged by its vector is not embedded a second time to be kept."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            self._vectors |= zip(new, await self._embedded_now(new), strict=True)
        return np.stack([self._vectors[text] for text in texts])

    async def _embedded_now(self, texts: Sequence[str]) -> Vectors:
        try:
            if self._refiner.paid_vectors:
                embedding = await self._journal.embedding(
                    msgspec.json.encode(texts), len(texts), lambda: self._refiner.embed(texts)
                )
            else:
                embedding = await self._refiner.embed(texts)
        except ModelError as error:
            await self._lost("embedder", error.usage)
            raise
        self._spend("embedder", embedding.usage)
        return embedding.vectors

    # --- calls

    async def _together(self, calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """All of these at once. If one fails the others are still waited for, since their
        usage is paid for and has to be counted. Raises ModelError."""
        results = await asyncio.gather(*calls, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            raise errors[0]
        return cast(list[T], results)

    async def _asked(
        self, role: str, prompt: Prompt, schema: dict[str, Any] | None, read: Callable[[str], T | None]
    ) -> tuple[T | None, str]:
        """What `read` makes of the reply; asked once more if it makes nothing of it. If that fails as well,
        or the endpoint will not answer this very question, None and why. Raises ModelError."""
        try:
            completion = await self._complete(role, prompt, schema)
            answer = read(completion.text)
            if answer is None:
                again = prompt.copy().add("assistant", completion.text[:2000])
                again.add(
                    "user",
                    "That could not be read. Reply again with the JSON object alone, nothing around it.",
                )
                answer = read((await self._complete(role, again, schema)).text)
        except ModelError as error:
            if not error.is_its_own:
                raise
            return None, f"the {role} did not answer: {error}"
        return answer, f"the {role}'s reply could not be read twice"

    async def _complete(self, role: str, prompt: Prompt, schema: dict[str, Any] | None):
        of = self._refiner.role(role)
        try:
            completion = await self._journal.completion(
                role,
                prompt.encoded(),
                lambda: of.model.complete(prompt, of.sampling, affinity=self._brief.affinity, schema=schema),
            )
        except ModelError as error:
            await self._lost(role, error.usage)
            raise
        self._spend(role, completion.usage)
        return completion

    async def _lost(self, role: str, usage: Usage) -> None:
        """Count usage that no reply in the journal holds, and keep it there."""
        if usage.calls:
            self._spend(role, usage)
            if role != "embedder" or self._refiner.paid_vectors:
                await self._journal.spent(role, usage)

    def _spend(self, role: str, usage: Usage) -> None:
        self._usage = add(self._usage, {role: usage})
