"""How fast a model answers on this machine, served as a run would serve it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import date

from culturepark.models.chat import HttpChatModel
from culturepark.models.local.engine import own_cpus
from culturepark.models.local.installed import Speed
from culturepark.models.local.serving import served
from culturepark.ports import Prompt, Sampling
from culturepark.settings import LimitSettings, ModelSettings

_AT_ONCE = 8
"""Conversations that are held at once in the second half of a measurement."""
_GENERATED = 32
"""Tokens that each conversation generates."""
_SENTENCES = 12
"""Sentences of the prompt whose reading is timed, of some twenty tokens each."""
_DEADLINE_S = 600.0
"""Seconds that one request may last, on a slow or busy machine."""


async def measure(name: str) -> Speed:
    """Serve the installed model `name` and time a few requests: less than a minute for 1.5 billion
    parameters on two cores. Raises ConfigError if it is not installed, ModelError if it does not answer."""
    limits = LimitSettings(adaptive=False, deadline_s=_DEADLINE_S)
    async with served(ModelSettings(engine="embedded", model=name)) as ready:
        chat = HttpChatModel(ready, limits)
        try:
            await _answers(chat, [_prompt(0, 1)], 1)  # reads the weights from disk
            long = _prompt(1, _SENTENCES)
            read, _, read_s = await _answers(chat, [long], 1)
            _, one, one_s = await _answers(chat, [long], _GENERATED)
            several = [_prompt(2 + place, 1) for place in range(_AT_ONCE)]
            await _answers(chat, several, 1)  # so that all prompts are in the servers' cache
            _, eight, eight_s = await _answers(chat, several, _GENERATED)
        finally:
            await chat.close()
    return Speed(
        prompt=round(read / read_s, 1),
        one=round(one / one_s, 1),
        eight=round(eight / eight_s, 1),
        cores=own_cpus(),
        date=date.today().isoformat(),
    )


def _prompt(number: int, sentences: int) -> Prompt:
    """A prompt unlike the others from its first words on, so that no cache knows its beginning."""
    words = [
        f"In house {number}, on day {day}, the neighbours talked of work and rest."
        for day in range(sentences)
    ]
    return Prompt().add("user", " ".join(words) + " Go on with this story.")


async def _answers(chat: HttpChatModel, prompts: Sequence[Prompt], tokens: int) -> tuple[int, int, float]:
    """Answer all prompts at once; returns their prompt tokens, the generated tokens and the seconds."""
    sampling = Sampling(temperature=0.7, max_tokens=tokens, seed=1, extra={"ignore_eos": True})
    began = time.perf_counter()
    replies = await asyncio.gather(
        *(chat.complete(prompt, sampling, affinity=str(place)) for place, prompt in enumerate(prompts))
    )
    elapsed_s = time.perf_counter() - began
    usages = [reply.usage for reply in replies]
    return sum(one.prompt_tokens for one in usages), sum(one.completion_tokens for one in usages), elapsed_s
