"""The embedder of this machine over HTTP: both forms that vectors may be asked for in."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import aiohttp
import numpy as np
import pytest

from culturepark.models.local.embedding_server import EmbeddingServer


async def test_vectors_come_as_numbers_or_in_base64_as_asked() -> None:
    server = EmbeddingServer(0)
    url = await server.start()
    try:
        async with aiohttp.ClientSession() as session:

            async def asked(**more: Any) -> list[Any]:
                body = {"input": ["Bread is shared.", "Guests come first."], **more}
                async with session.post(f"{url}/embeddings", json=body) as response:
                    assert response.status == 200
                    return [row["embedding"] for row in (await response.json())["data"]]

            numbers = np.array(await asked(), dtype=np.float32)
            assert numbers.shape == (2, 384)
            coded = await asked(encoding_format="base64")
            same = np.array([np.frombuffer(base64.b64decode(one), "<f4") for one in coded])
            assert np.array_equal(numbers, same)
            assert np.array_equal(numbers, np.array(await asked(encoding_format="float"), dtype=np.float32))
    finally:
        await server.stop()


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"input": 1},
        {"input": [1]},
        {"input": None},
        {"input": ["bread"] * 2049},
        {"input": ["b" * 1_000] * 600},
    ],
    ids=["no object", "nothing", "a number", "numbers", "null", "too many", "too much"],
)
async def test_what_cannot_be_embedded_is_refused_and_the_next_request_is_answered(body: Any) -> None:
    server = EmbeddingServer(0)
    url = await server.start()
    try:
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{url}/embeddings", json=body) as response:
                assert response.status == 400
                assert "error" in await response.json()
            both = (session.post(f"{url}/embeddings", json={"input": texts}) for texts in (["bread"], []))
            answers = await asyncio.gather(*both)
            assert [len((await answer.json())["data"]) for answer in answers] == [1, 0]
    finally:
        await server.stop()
