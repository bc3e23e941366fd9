"""Agents and refiners as workers: what they are asked is begun only while its result would be kept."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from actors.base import MessagingActor
from actors.worker import Work, Worker
from culturepark.messages import Ask, Refine, Shares, encode, pack
from culturepark.models.endpoint import HttpEndpoint
from culturepark.models.errors import ModelError
from culturepark.settings import LimitSettings, ModelSettings


class _Careless(Worker):
    """A worker whose work raises, which it never may."""

    def __init__(self) -> None:
        MessagingActor.__init__(self, ("namespace", "token"))
        self._inbox.count_senders(1)  # the moderator is connected
        self._busy = {}
        self._incarnation = "one"
        self._work = self.open()

    def open(self) -> Work:
        async def work(message: Ask | Refine) -> None:
            raise OSError(28, "no space left on device")

        return work


async def test_work_that_raises_is_told_to_those_that_watch() -> None:
    worker = _Careless()
    watching = asyncio.create_task(worker.watch("one"))
    await asyncio.sleep(0)
    worker.receive(pack([encode(Ask(1, 1, 1, ""))]))
    with pytest.raises(OSError, match="no space"):
        await asyncio.wait_for(watching, 5)


class _Idle(Worker):
    """A worker with an endpoint."""

    def __init__(self, rate: int = 0) -> None:
        model = ModelSettings(engine="openai", model="m", base_urls=("http://127.0.0.1:9/v1",))
        self.endpoint = HttpEndpoint(model, LimitSettings(requests_per_minute=rate, retries=0))
        self.context = SimpleNamespace(endpoints=[self.endpoint])  # pyright: ignore[reportAttributeAccessIssue]
        self._busy, self._unreachable = {}, {"moderator"}

    @property
    def held(self) -> bool:
        return self.endpoint.replicas.all[0].gate.held


async def test_no_call_is_begun_while_its_reply_would_not_be_kept() -> None:
    worker, shares = _Idle(), pack([encode(Shares(()))])
    worker._hold()
    assert worker.held
    worker._moderator_connected(True)
    assert not worker.held
    worker._moderator_connected(False)
    worker.receive(shares)  # of the one that is gone
    assert worker.held
    worker._moderator_connected(True)
    assert worker.held
    worker.receive(shares)  # comes after what the new one asks for
    assert not worker.held
    worker.connected("collector", False)
    worker.receive(shares)
    assert worker.held
    worker.connected("collector", True)
    assert not worker.held


@pytest.mark.parametrize("rate", [0, 600])
async def test_what_was_held_does_not_begin_once_all_is_halted(rate: int) -> None:
    worker = _Idle(rate)
    worker._moderator_connected(False)
    calls = [asyncio.create_task(worker.endpoint.post("/x", b"{}")) for _ in range(5)]
    await asyncio.sleep(0.05)
    worker._moderator_connected(True)
    worker.receive(pack([encode(Shares((), halt=True))]))
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, ModelError)
        assert not error.usage.calls


async def test_held_calls_keep_to_a_rate_afterwards() -> None:
    worker = _Idle(rate=600)
    worker._moderator_connected(False)
    calls = [asyncio.create_task(worker.endpoint.post("/x", b"{}")) for _ in range(40)]
    await asyncio.sleep(1.0)
    (seen,) = worker.endpoint.replicas.report()
    assert seen.waiting == 40
    assert worker.endpoint.replicas.all[0].waiting_for_rate == 40  # none has had its turn
    worker.endpoint.replicas.hold(False)
    await asyncio.sleep(0.3)
    assert 0 < sum(call.done() for call in calls) <= 10 + 5  # a second's worth at once, then ten a second
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
