"""A mock OpenAI-compatible endpoint on loopback, for tests and benchmarks: no model behind it.

    python scripts/mock_endpoint.py --port 8000 --latency-s 1 --sigma 0.3 --capacity 64

It parses HTTP by itself and answers by rule, so that it costs a fraction of what a client spends and
is not what a benchmark measures. What it says follows from the prompt alone. Rules can be changed
while it runs: `POST /rules` takes the same names as JSON. `GET /stats` tells what it has done.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import socket
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
import numpy as np
from msgspec import Struct

_SENTENCES = tuple(
    f"{when}, {who} {does} {what}, {why}."
    for when in (
        "In my childhood", "On feast days", "After the harvest", "At every wedding", "When times were hard",
        "Before exams", "In the city", "In the village", "In the war", "Among friends", "At work", "Today",
    )
    for who in ("my mother", "my father", "our neighbour", "my teacher", "our town", "my grandfather")
    for does in ("always said that", "showed me that", "believes that", "would never doubt that")
    for what in (
        "elders are to be heard first",
        "guests are fed before the family",
        "a promise binds the whole house",
        "help is given without being asked",
        "learning opens every door",
        "bread is never thrown away",
        "a quiet life is a good life",
    )
    for why in ("since it keeps the peace", "as it was in old times", "because life is short")
)  # fmt: skip
"""Six thousand, so that opinions repeat each other as seldom as people's do."""
_VERDICTS = ("entails", "entails", "entails", "novel", "contradicts")


class Rules(Struct, forbid_unknown_fields=True):
    """How the endpoint behaves. Shares are of chat requests, 0 to 1."""

    latency_s: float = 0.0
    """The median time that one reply takes."""
    sigma: float = 0.0
    """Of the lognormal distribution of that time; 0: always the same."""
    capacity: int = 0
    """Requests served at once; the others wait their turn, silently, as with vLLM. 0: no limit."""
    refuse_over: int = 0
    """More requests at once than this get 429. 0: no limit."""
    retry_after_s: float = 1.0
    """What a 429 asks for."""
    refused: float = 0.0
    """This share gets 429 in any case."""
    slow: float = 0.0
    """This share takes ten times as long."""
    broken: float = 0.0
    """This share gets status 500, a body that is no JSON, or a connection that is cut, in turn."""
    sentences: int = 4
    """Sentences of a reply."""
    dimensions: int = 384
    """Of an embedding."""
    down: bool = False
    """Every request's connection is cut."""


class _Chat(Struct):
    messages: list[dict[str, str]]


class Endpoint:
    """The rules, the queue and the counts; connections are `_Connection`."""

    def __init__(self, rules: Rules, seed: int = 1) -> None:
        self.rules = rules
        self.stats = dict.fromkeys(
            ("requests", "chats", "embeddings", "refused", "broken", "now", "most_at_once", "prompt_bytes"), 0
        )
        self._dice = random.Random(seed)
        self._serving = 0
        self._queue: deque[Callable[[], None]] = deque()
        self._chat = msgspec.json.Decoder(_Chat)

    def chat(self, body: bytes, answer: Callable[[int, bytes], None], cut: Callable[[], None]) -> None:
        """Answer a chat request when its time has come."""
        rules, stats = self.rules, self.stats
        stats["requests"] += 1
        stats["prompt_bytes"] += len(body)
        draw = self._dice.random()
        over = rules.refuse_over and stats["now"] >= rules.refuse_over
        if over or draw < rules.refused:
            stats["refused"] += 1
            answer(429, b'{"error":{"message":"too many requests"}}')
            return
        stats["now"] += 1
        stats["most_at_once"] = max(stats["most_at_once"], stats["now"])

        def serve() -> None:
            self._serving += 1
            asyncio.get_running_loop().call_later(self._time(), finish)

        def finish() -> None:
            self._serving -= 1
            stats["now"] -= 1
            if self._queue:
                self._queue.popleft()()
            if draw < rules.refused + rules.broken:
                stats["broken"] += 1
                self._break(answer, cut)
            else:
                stats["chats"] += 1
                answer(200, self._reply(body))

        if rules.capacity and self._serving >= rules.capacity:
            self._queue.append(serve)
        else:
            serve()

    def _time(self) -> float:
        rules = self.rules
        time_s = rules.latency_s
        if rules.sigma:
            time_s *= self._dice.lognormvariate(0, rules.sigma)
        if rules.slow and self._dice.random() < rules.slow:
            time_s *= 10
        return time_s

    def _break(self, answer: Callable[[int, bytes], None], cut: Callable[[], None]) -> None:
        way = self.stats["broken"] % 3
        if way == 0:
            answer(500, b'{"error":{"message":"the mock is broken on purpose"}}')
        elif way == 1:
            answer(200, b'{"choices":[{"mess')
        else:
            cut()

    def _reply(self, body: bytes) -> bytes:
        dice = zlib.crc32(body)
        tail = body[-1200:]
        if b'"json_schema"' not in tail:
            text = _sentences(dice, self.rules.sentences)
        elif b'"opinions"' in tail:
            said = self._chat.decode(body).messages[-1]["content"]
            some = [s.strip() + "." for s in _quoted(said).split(".") if s.strip()][:3]
            text = msgspec.json.encode({"opinions": [{"opinion": s, "quote": s} for s in some]}).decode()
        else:
            verdict = _VERDICTS[dice % len(_VERDICTS)]
            text = msgspec.json.encode({"reason": "by rule", "verdict": verdict}).decode()
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": len(text) // 4}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return msgspec.json.encode({"id": "mock", "model": "mock", "choices": [choice], "usage": usage})

    def embeddings(self, body: bytes) -> bytes:
        """Vectors that are far apart for any two texts."""
        request: Any = msgspec.json.decode(body)
        data: list[dict[str, Any]] = []
        for i, text in enumerate(request["input"]):
            dice = np.random.default_rng(zlib.crc32(text.encode()))
            vector = dice.standard_normal(self.rules.dimensions, np.float32)
            as_base64 = request.get("encoding_format") == "base64"
            data.append(
                {
                    "index": i,
                    "embedding": base64.b64encode(vector.tobytes()).decode()
                    if as_base64
                    else vector.tolist(),
                }
            )
        self.stats["embeddings"] += 1
        usage = {"prompt_tokens": len(body) // 4, "total_tokens": len(body) // 4}
        return msgspec.json.encode({"object": "list", "model": "mock", "data": data, "usage": usage})

    def told(self) -> bytes:
        """The counts, with the time and this process's CPU time."""
        return msgspec.json.encode(self.stats | {"time_s": time.monotonic(), "cpu_s": time.process_time()})


def _sentences(dice: int, count: int) -> str:
    place, picked = dice, list[str]()
    for _ in range(count):
        place = (place * 1103515245 + 12345) & 0x7FFFFFFF
        picked.append(_SENTENCES[(place >> 8) % len(_SENTENCES)])
    return " ".join(picked)


def _quoted(said: str) -> str:
    try:
        return str(msgspec.json.decode(said)["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return said


class _Connection(asyncio.Protocol):
    """One connection: requests come one after the other, each answered before the next is read."""

    _REASONS: ClassVar = {200: b"OK", 404: b"Not Found", 429: b"Too Many Requests", 500: b"Broken"}

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._buffer = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end]
        at = head.lower().find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self._buffer) < end + 4 + length:
            return
        body = self._buffer[end + 4 : end + 4 + length]
        self._buffer = self._buffer[end + 4 + length :]
        self._route(head.split(b" ", 2)[1], body)

    def _route(self, path: bytes, body: bytes) -> None:
        endpoint = self._endpoint
        if endpoint.rules.down and path.startswith(b"/v1"):
            self._transport.abort()
        elif path == b"/v1/chat/completions":
            endpoint.chat(body, self._answer, self._transport.abort)
        elif path == b"/v1/embeddings":
            self._answer(200, endpoint.embeddings(body))
        elif path == b"/v1/models":
            self._answer(200, b'{"object":"list","data":[{"id":"mock","object":"model"}]}')
        elif path == b"/stats":
            self._answer(200, endpoint.told())
        elif path == b"/rules":
            endpoint.rules = msgspec.json.decode(body, type=Rules)
            endpoint.stats["most_at_once"] = endpoint.stats["now"]
            self._answer(200, b"{}")
        else:
            self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        if self._transport.is_closing():
            return
        wait = b"Retry-After: %g\r\n" % self._endpoint.rules.retry_after_s if status == 429 else b""
        head = b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n" % (
            status,
            self._REASONS[status],
            wait,
            len(body),
        )
        self._transport.write(head + body)


async def _serve(rules: Rules, port: int) -> None:
    endpoint = Endpoint(rules)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(endpoint), sock=sock, backlog=4096
    )
    print(f"listening on {sock.getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve until the process is ended. Port 0 takes a free one; the first line printed tells it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    for name, default in msgspec.structs.asdict(Rules()).items():
        if not isinstance(default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args())
    port = given.pop("port")
    asyncio.run(_serve(Rules(**given), port))


if __name__ == "__main__":
    main()
