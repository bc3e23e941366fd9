"""The benchmark's baselines: the same dialogues without actors. `bench.py` runs them as processes.

    python scripts/bench_subjects.py bare|sdk URL DIALOGUES IN_FLIGHT

`bare` is the practical limit: one process, aiohttp, msgspec, nothing durable, no retries. `sdk` is the
usual way: AsyncOpenAI as it comes. Both send what culturepark's
speakers would: each speaker's own history, growing from turn to turn.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp
import msgspec
from msgspec import Struct

from culturepark.cultures import load_cultures
from culturepark.plan import Plan
from culturepark.prompts.registry import profile_named
from culturepark.seeds import load_seeds
from culturepark.settings import Settings
from culturepark.settings_load import load_settings

UTTERANCES = 14
_SHAPES = 64
"""Dialogues whose prompts are rendered beforehand; the others use the same words again."""


class Shape(Struct, frozen=True):
    """The words of one dialogue but for what is said: systems by speaker, cues by turn."""

    systems: tuple[str, str]
    cues: tuple[str, ...]


class _Message(Struct):
    content: str


class _Choice(Struct):
    message: _Message


class Reply(Struct):
    choices: list[_Choice]


def shapes() -> list[Shape]:
    """Prompts of the first dialogues of the benchmark's plan. `{heard}` stands for the other's words."""
    settings: Settings = load_settings(
        None, ["plan.utterances=14", "plan.dialogues_per_question=4", "plan.questions=[]"]
    )
    cultures = load_cultures()
    plan, profile = Plan(settings, load_seeds(("builtin",)), cultures), profile_named("full")
    found: list[Shape] = []
    for number in range(_SHAPES):
        brief = plan.brief(number)
        systems = (profile.system(brief, 0, cultures), profile.system(brief, 1, cultures))
        heard = ["", *["{heard}"] * (UTTERANCES - 1)]
        cues = tuple(
            profile.cue(brief, turn, heard[turn - 1], cultures).text for turn in range(1, UTTERANCES + 1)
        )
        found.append(Shape(systems, cues))
    return found


async def bare(url: str, dialogues: int, in_flight: int) -> None:
    """aiohttp and msgspec, nothing else."""
    reply = msgspec.json.Decoder(Reply)
    encode = msgspec.json.encode
    tail = b'],"model":"mock","temperature":0.7,"max_tokens":168}'
    headers = {"Content-Type": "application/json"}
    known = shapes()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:

        async def hold(number: int) -> None:
            shape = known[number % _SHAPES]
            histories = [[encode({"role": "system", "content": text})] for text in shape.systems]
            heard = ""
            for turn, cue in enumerate(shape.cues):
                history = histories[turn % 2]
                history.append(encode({"role": "user", "content": cue.replace("{heard}", heard)}))
                body = b'{"messages":[' + b",".join(history) + tail
                async with session.post(url, data=body, headers=headers) as response:
                    heard = reply.decode(await response.read()).choices[0].message.content
                history.append(encode({"role": "assistant", "content": heard}))

        await _all(hold, dialogues, in_flight)


async def sdk(url: str, dialogues: int, in_flight: int) -> None:
    """AsyncOpenAI, as in its own documentation. Its own limit is 1,000 connections."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=url.removesuffix("/chat/completions"), api_key="none", timeout=120)
    known = shapes()

    async def hold(number: int) -> None:
        shape = known[number % _SHAPES]
        histories: list[list[Any]] = [[{"role": "system", "content": text}] for text in shape.systems]
        heard = ""
        for turn, cue in enumerate(shape.cues):
            history = histories[turn % 2]
            history.append({"role": "user", "content": cue.replace("{heard}", heard)})
            completion = await client.chat.completions.create(
                model="mock", messages=history, temperature=0.7, max_tokens=168
            )
            heard = completion.choices[0].message.content or ""
            history.append({"role": "assistant", "content": heard})

    await _all(hold, dialogues, in_flight)
    await client.close()


async def _all(hold: Callable[[int], Awaitable[None]], dialogues: int, in_flight: int) -> None:
    numbers = iter(range(dialogues))

    async def work() -> None:
        for number in numbers:
            await hold(number)

    await asyncio.gather(*(work() for _ in range(in_flight)))


def main() -> None:
    """Hold the dialogues."""
    subject, url, dialogues, in_flight = sys.argv[1:]
    hold = {"bare": bare, "sdk": sdk}[subject]
    asyncio.run(hold(f"{url}/v1/chat/completions", int(dialogues), int(in_flight)))


if __name__ == "__main__":
    main()
