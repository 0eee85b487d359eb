"""A server between a client and a real one, that loses answers, throttles, lags and breaks as a test tells it to."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

__all__ = ["LOSE_ANSWER", "RESET", "TRUNCATE", "Delay", "FaultProxy", "RandomFaults", "Reply", "run_fault_proxy"]


@dataclass(frozen=True)
class Reply:
    """An answer of our own, in place of the real server's."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Delay:
    """The real server's answer, so many seconds late."""

    seconds: float


RESET = "reset"  # the connection breaks before the request arrives
LOSE_ANSWER = "lose"  # the request is carried out, then the connection breaks
TRUNCATE = "truncate"  # half of the answer's body comes, then the connection breaks
Decide = Callable[[str, str], Reply | Delay | str | None]


@dataclass
class RandomFaults:
    """Faults that come by chance: of a seed, a request, and how often it has been made.

    Attributes:
        seed: the same requests meet the same faults under it, in whatever order they come.
        throttled: share of requests that are answered with 503; `reset`, `lost`, `truncated` and `late` likewise.
        seconds: that those are late.
        met: how often each fault came.
    """

    seed: int
    throttled: float = 0.0
    reset: float = 0.0
    lost: float = 0.0
    truncated: float = 0.0
    late: float = 0.0
    seconds: float = 0.1
    counts: Counter[str] = field(default_factory=Counter)
    _made: Counter[str] = field(default_factory=Counter)

    def __call__(self, method: str, path: str) -> Reply | Delay | str | None:
        request = f"{method} {path}"
        self._made[request] += 1
        chance = random.Random(f"{self.seed} {request} {self._made[request]}").random()
        slow_down = Reply(503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>")
        faults: list[tuple[str, float, Reply | Delay | str]] = [
            ("503", self.throttled, slow_down),
            ("reset", self.reset, RESET),
            ("lost", self.lost, LOSE_ANSWER),
            ("truncated", self.truncated, TRUNCATE),
            ("late", self.late, Delay(self.seconds)),
        ]
        for name, share, action in faults:
            if chance < share:
                self.counts[name] += 1
                return action
            chance -= share
        return None


@dataclass
class FaultProxy:
    """The running go-between.

    Attributes:
        endpoint: its URL.
        decide: method and raw path → what to do; None passes the request on.
        carried_out: told method and raw path of what the real server has done, before its answer goes back.
        seen: method and raw path of every request so far.
    """

    endpoint: str
    decide: Decide = lambda method, path: None
    on_done: Callable[[str, str], object] = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    stop: Callable[[], None] = lambda: None
    """Ends it for good: whoever connects from now on is refused."""


@contextmanager
def run_fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A go-between in front of the server at the URL `upstream`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="go-between", daemon=True)
    thread.start()
    try:
        going = _GoBetween(urlsplit(upstream).netloc)
        port = asyncio.run_coroutine_threadsafe(going.start(), loop).result()
        going.faulty = faulty = FaultProxy(f"http://127.0.0.1:{port}")
        faulty.stop = lambda: asyncio.run_coroutine_threadsafe(going.stop(), loop).result()
        try:
            yield faulty
        finally:
            faulty.stop()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass
class _Message:
    """A request or an answer: its first line, its headers in lower case, its whole body."""

    first: str
    headers: dict[str, str]
    body: bytes = b""


class _GoBetween:
    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.partition(":")
        self._upstream = host, int(port or 80)
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.faulty: FaultProxy

    async def start(self) -> int:
        """The port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=512, limit=1 << 20)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The requests of one connection, until it ends or breaks."""
        server = _Upstream(*self._upstream)
        try:
            with suppress(OSError, EOFError):  # the client has gone
                while (request := await _request(reader, writer)) is not None:
                    if not await self._answer(request, server, writer):
                        break
        finally:
            server.close()
            writer.transport.abort()

    async def _answer(self, request: _Message, server: _Upstream, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        method, path, _ = request.first.split(" ", 2)
        self.faulty.requests.append((method, path))
        action = self.faulty.decide(method, path)
        if action == RESET:
            _break(writer)
            return False
        if isinstance(action, Delay):
            await asyncio.sleep(action.seconds)
        if isinstance(action, Reply):
            reply = action
        else:
            reply = await server.ask(request)
            self.faulty.on_done(method, path)
        if action == LOSE_ANSWER:
            _break(writer)
            return False
        half = action == TRUNCATE and method != "HEAD" and len(reply.body) > 1
        writer.write(_encoded(reply, method == "HEAD", len(reply.body) // 2 if half else None))
        await writer.drain()
        if half:
            await asyncio.sleep(0.01)  # so that what was sent arrives before the end does
        return not half


class _Upstream:
    """The connection to the real server that goes with one client's."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: _Message) -> Reply:
        try:
            return await self._ask(request)
        except (OSError, EOFError):  # it was idle for too long
            self.close()
            return await self._ask(request)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None

    async def _ask(self, request: _Message) -> Reply:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        reader, writer = self._streams
        headers = {name: value for name, value in request.headers.items() if name != "expect"}
        lines = [request.first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode("latin-1") + request.body)
        await writer.drain()
        answer = await _message(reader, head=request.first.startswith("HEAD "))
        if answer is None:
            raise EOFError
        return Reply(int(answer.first.split(" ", 2)[1]), answer.body, answer.headers)


async def _request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Message | None:
    return await _message(reader, go_on=lambda: writer.write(b"HTTP/1.1 100 Continue\r\n\r\n"))


async def _message(
    reader: asyncio.StreamReader, *, head: bool = False, go_on: Callable[[], None] = lambda: None
) -> _Message | None:
    """The next one; None where the connection has ended before it began."""
    first = (await reader.readline()).decode("latin-1").rstrip("\r\n")
    if not first:
        return None
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").rstrip("\r\n"):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        go_on()
    if head:
        return _Message(first, headers)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return _Message(first, headers, await _chunks(reader))
    return _Message(first, headers, await reader.readexactly(int(headers.get("content-length") or 0)))


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


def _encoded(reply: Reply, head: bool, most: int | None) -> bytes:
    """The answer on the wire, with so many bytes of its body at most."""
    lower = {name.lower(): value for name, value in reply.headers.items()}
    length = lower.get("content-length") if head else None
    kept = {name: value for name, value in lower.items() if name not in _OURS}
    kept["content-length"] = length or str(len(reply.body))
    lines = [f"HTTP/1.1 {reply.status} -", *(f"{name}: {value}" for name, value in kept.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (b"" if head else reply.body[:most])


_OURS = {"content-length", "transfer-encoding", "connection"}


def _break(writer: asyncio.StreamWriter) -> None:
    """End the connection by a reset."""
    broken: socket.socket = writer.get_extra_info("socket")
    broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
