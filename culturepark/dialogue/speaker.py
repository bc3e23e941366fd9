"""A speaker of one culture: answers asks, and keeps dialogues only in a cache.

The moderator's transcript is the truth. An agent whose cache does not hold a dialogue, since it was
restarted or the entry was evicted, says so and is sent the whole transcript (cache miss).
"""

from __future__ import annotations

from collections import OrderedDict

from msgspec import Struct
from msgspec.structs import replace

from culturepark.dialogue import health
from culturepark.dialogue.repetition import Earlier
from culturepark.messages import Ask, CallFailed, NeedsTranscript, Spoke, Turn
from culturepark.models.errors import ModelError
from culturepark.plan import Brief, Plan
from culturepark.ports import ChatModel, Prompt
from culturepark.prompts.profile import Cue, Profile, sampling_with
from culturepark.settings import Kind, Settings
from culturepark.usage import Usage

_CACHED = 20_000
"""Entries of an agent's cache, one a dialogue and speaker; the least recently written is evicted."""

_RETRIES = 1
"""Further attempts at a turn whose text comes out empty, or has a symptom whose answer is to retry."""

_ROLES: dict[Kind, str] = {"cross": "speaker", "in-culture": "in-culture", "direct": "direct"}


class _Entry(Struct):
    """A cached prompt, the next turn that continues it, and the turns before that one."""

    brief: Brief
    prompt: Prompt
    next_turn: int
    said: Earlier


class CulturalSpeaker:
    """Speaks for the personas of a culture."""

    def __init__(self, plan: Plan, settings: Settings, model: ChatModel, profile: Profile) -> None:
        self._plan = plan
        self._policy = settings.health
        self._model = model
        self._profile = profile
        self._sampling = {
            kind: sampling_with(profile.sampling(role), settings, "speaker") for kind, role in _ROLES.items()
        }
        self._cache: OrderedDict[tuple[int, int, int], _Entry] = OrderedDict()

    async def speak(self, ask: Ask) -> Spoke | NeedsTranscript | CallFailed:
        """Answer an ask; never raises for what a model does."""
        known = self._cache.get(_key(ask))
        brief = known.brief if known else self._plan.brief(ask.number)
        prompt = self._prompt_for(ask, brief, known)
        if prompt is None:
            return NeedsTranscript(ask.number, ask.term, ask.turn)
        cue = self._profile.cue(brief, ask.turn, ask.heard, self._plan.cultures)
        prompt.add("user", cue.text)
        said = self._said(ask, known)
        try:
            turn = await self._say(brief, ask, prompt, cue, said)
        except ModelError as error:
            return CallFailed(
                ask.number, ask.term, ask.turn, error.kind, error.reason, {"speaker": error.usage}
            )
        if not self._policy.off:
            said.add(turn.text, ask.turn)
        self._cache_prompt(ask, brief, prompt.add("assistant", turn.text), said)
        return Spoke(ask.number, ask.term, turn)

    async def _say(self, brief: Brief, ask: Ask, prompt: Prompt, cue: Cue, said: Earlier) -> Turn:
        whole = prompt.copy().add("assistant", cue.prefill) if cue.prefill else prompt
        speaker = self._speaker(ask.turn, brief)
        spent, before = Usage(), None
        late = health.is_late(ask.turn, brief.utterances)
        sampling = self._sampling[brief.kind]
        for attempt in range(1 + _RETRIES):
            try:
                completion = await self._model.complete(whole, sampling, affinity=brief.affinity)
            except ModelError as error:
                if before is not None:  # a turn with a flaw is better than none
                    return replace(before, usage=spent + error.usage)
                error.usage += spent
                raise
            spent += completion.usage
            cut = completion.finish_reason == "length"
            text = self._profile.clean(completion.text, cue, brief.speakers[speaker].name, cut)
            if not text:
                continue
            turn = Turn(
                number=ask.turn,
                speaker=speaker,
                text=text,
                model=completion.model,
                endpoint=completion.endpoint,
                finish_reason=completion.finish_reason,
                latency_s=round(completion.latency_s, 4),
                usage=spent,
            )
            found = () if self._policy.off else health.symptoms(brief, said, turn)
            turn = replace(turn, health=health.labels(found, before.health if before else ()))
            again = health.verdict(found, self._policy, retried=attempt == _RETRIES, late=late)
            if again != "retry":
                return turn
            before = turn
        if before is not None:
            return replace(before, usage=spent)
        raise ModelError("empty_reply", "nothing was left of the reply once it was cleaned", usage=spent)

    def _said(self, ask: Ask, known: _Entry | None) -> Earlier:
        """The turns before this one, as far as they are known here; none if no symptoms are looked for."""
        if self._policy.off:
            return Earlier()
        if ask.transcript is not None:
            return Earlier(turn.text for turn in ask.transcript)
        said = known.said if known and known.next_turn == ask.turn else Earlier()
        if ask.heard:
            said.add(ask.heard, ask.turn - 1)
        return said

    def _prompt_for(self, ask: Ask, brief: Brief, known: _Entry | None) -> Prompt | None:
        """The prompt up to this turn's cue; None if it is not known here."""
        if ask.turn <= len(brief.speakers):
            return self._beginning(ask.turn, brief)
        if ask.transcript is not None:
            prompt = self._beginning(ask.turn, brief)
            for turn in ask.transcript:
                if turn.speaker == self._speaker(ask.turn, brief):
                    heard = ask.transcript[turn.number - 2].text if turn.number > 1 else ""
                    cue = self._profile.cue(brief, turn.number, heard, self._plan.cultures)
                    prompt.add("user", cue.text).add("assistant", turn.text)
            return prompt
        return known.prompt.copy() if known and known.next_turn == ask.turn else None

    def _beginning(self, turn: int, brief: Brief) -> Prompt:
        speaker = self._speaker(turn, brief)
        return Prompt().add("system", self._profile.system(brief, speaker, self._plan.cultures))

    def _cache_prompt(self, ask: Ask, brief: Brief, prompt: Prompt, said: Earlier) -> None:
        key = _key(ask)
        following = ask.turn + len(brief.speakers)
        if following > brief.utterances:
            self._cache.pop(key, None)
            return
        known = self._cache.get(key)
        if known is not None and known.next_turn >= following:
            return  # asked twice: the answer that went out first is the one in the transcript
        self._cache[key] = _Entry(brief, prompt, following, said)
        self._cache.move_to_end(key)
        if len(self._cache) > _CACHED:
            self._cache.popitem(last=False)

    @staticmethod
    def _speaker(turn: int, brief: Brief) -> int:
        return (turn - 1) % len(brief.speakers)


def _key(ask: Ask) -> tuple[int, int, int]:
    """The dialogue, the moderator's term, and which of the two speakers is asked."""
    return ask.number, ask.term, (ask.turn - 1) % 2
