"""What a process tells of its endpoints: all that happened, and no more often than there is news."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from msgspec.structs import replace

from actors import load_reports
from culturepark.messages import LoadReport, Seen, pack, unpack
from culturepark.models.endpoint import HttpEndpoint

BLANK = Seen("http://127.0.0.1:1/v1", "model", in_flight=2)


class Endpoint:
    """Reports what it is given, look by look, and the last of it for ever."""

    def __init__(self, looks: Sequence[Seen]) -> None:
        self._looks = list(looks)
        self.reported = 0
        self.replicas = self

    def obey(self, shares: Sequence[Any]) -> None:
        assert not shares

    def report(self) -> list[Seen]:
        self.reported += 1
        return [self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]]


async def posted(monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint, intervals: int) -> list[Seen]:
    """What is posted within so many times REPORT_EVERY_S, at a clock that only waiting moves."""
    now_s, posts = [0.0], list[Seen]()

    def post(payload: bytes) -> None:
        [message] = unpack(pack([payload]))
        assert isinstance(message, LoadReport)
        posts.extend(message.seen)

    async def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if now_s[0] >= intervals * load_reports.REPORT_EVERY_S:
            raise asyncio.CancelledError

    monkeypatch.setattr(load_reports.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(load_reports.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await load_reports.report_load("agent/korean/0", [cast(HttpEndpoint, endpoint)], post)
    return posts


async def test_without_news_it_is_posted_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await posted(monkeypatch, Endpoint([BLANK]), 40) == [BLANK] * 10


async def test_without_news_it_is_looked_for_seldom_and_after_some_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet, busy = Endpoint([BLANK]), Endpoint([replace(BLANK, waiting=1)])
    for endpoint in (quiet, busy):
        await posted(monkeypatch, endpoint, 40)
    assert quiet.reported < 25
    assert busy.reported == 40


@pytest.mark.parametrize(
    "news",
    [
        {"completed": 1, "latency_s": 8.0},
        {"refused": 1, "retry_after_s": 2.0},
        {"broken": 1},
        {"retried": 1},
        {"waiting": 1},
        {"in_flight": 3},
        {"in_flight": 1},
        {"prompt_tokens": 300},
        {"completion_tokens": 40},
    ],
)
async def test_news_are_posted_at_once_and_never_lost(
    monkeypatch: pytest.MonkeyPatch, news: dict[str, Any]
) -> None:
    told = replace(BLANK, **news)
    endpoint = Endpoint([BLANK, told, BLANK])
    assert (await posted(monkeypatch, endpoint, 3))[:2] == [BLANK, told]
