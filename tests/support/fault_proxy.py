"""A proxy in front of a real HTTP server that throttles, delays, resets and truncates as a test decides."""

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
    """An answer that the proxy sends in place of the real server's."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Delay:
    """The real server's answer, sent some seconds late."""

    seconds: float


RESET = "reset"  # the connection breaks before the request arrives
LOSE_ANSWER = "lose"  # the request is carried out, then the connection breaks
TRUNCATE = "truncate"  # half of the answer's body is sent, then the connection breaks
Decide = Callable[[str, str], Reply | Delay | str | None]


@dataclass
class RandomFaults:
    """Random faults, which depend on the seed, the request, and the number of times it was sent, but not on the order.

    Attributes:
        seed: Seed of the random numbers.
        throttled: Share of requests that are answered with 503.
        reset: Share of requests whose connection is reset.
        lost: Share of requests whose answer is lost.
        truncated: Share of requests whose answer is cut in half.
        late: Share of requests that are answered late.
        seconds: Delay of late answers, in seconds.
        counts: Number of faults so far, by kind.
    """

    seed: int
    throttled: float = 0.0
    reset: float = 0.0
    lost: float = 0.0
    truncated: float = 0.0
    late: float = 0.0
    seconds: float = 0.1
    counts: Counter[str] = field(default_factory=Counter)
    _times_sent: Counter[str] = field(default_factory=Counter)

    def __call__(self, method: str, path: str) -> Reply | Delay | str | None:
        request = f"{method} {path}"
        self._times_sent[request] += 1
        chance = random.Random(f"{self.seed} {request} {self._times_sent[request]}").random()
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
    """A running proxy.

    Attributes:
        endpoint: URL of the proxy.
        decide: Function of method and raw path that returns a fault; None passes the request on.
        on_done: Called with method and raw path when the real server has answered, before the answer is sent back.
        requests: Method and raw path of every request so far.
        stop: Ends the proxy: later connections are refused.
    """

    endpoint: str
    decide: Decide = lambda method, path: None
    on_done: Callable[[str, str], object] = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    stop: Callable[[], None] = lambda: None


@contextmanager
def run_fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy in front of the server at the URL `upstream`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fault-proxy", daemon=True)
    thread.start()
    try:
        server = _ProxyServer(urlsplit(upstream).netloc)
        port = asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        server.proxy = proxy = FaultProxy(f"http://127.0.0.1:{port}")
        proxy.stop = lambda: asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        try:
            yield proxy
        finally:
            proxy.stop()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass
class _Message:
    """A request or an answer: first line, headers in lower case, whole body."""

    first: str
    headers: dict[str, str]
    body: bytes = b""


class _ProxyServer:
    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.partition(":")
        self._upstream = host, int(port or 80)
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.proxy: FaultProxy

    async def start(self) -> int:
        """Start to listen; return the port."""
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
        """Answer the requests of one connection, until it ends or breaks."""
        server = _Upstream(*self._upstream)
        try:
            with suppress(OSError, EOFError):  # the client has gone
                while (request := await _read_request(reader, writer)) is not None:
                    if not await self._answer(request, server, writer):
                        break
        finally:
            server.close()
            writer.transport.abort()

    async def _answer(self, request: _Message, server: _Upstream, writer: asyncio.StreamWriter) -> bool:
        """Answer a request; return True if the connection stays open."""
        method, path, _ = request.first.split(" ", 2)
        self.proxy.requests.append((method, path))
        action = self.proxy.decide(method, path)
        if action == RESET:
            _reset_connection(writer)
            return False
        if isinstance(action, Delay):
            await asyncio.sleep(action.seconds)
        if isinstance(action, Reply):
            reply = action
        else:
            reply = await server.ask(request)
            self.proxy.on_done(method, path)
        if action == LOSE_ANSWER:
            _reset_connection(writer)
            return False
        half = action == TRUNCATE and method != "HEAD" and len(reply.body) > 1
        writer.write(_encode_reply(reply, method == "HEAD", len(reply.body) // 2 if half else None))
        await writer.drain()
        if half:
            await asyncio.sleep(0.01)  # the data arrives before the end of the connection
        return not half


class _Upstream:
    """The connection to the real server for the connection of one client."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: _Message) -> Reply:
        try:
            return await self._ask(request)
        except (OSError, EOFError):  # the connection was idle for too long
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
        answer = await _read_message(reader, head=request.first.startswith("HEAD "))
        if answer is None:
            raise EOFError
        return Reply(int(answer.first.split(" ", 2)[1]), answer.body, answer.headers)


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Message | None:
    return await _read_message(reader, send_continue=lambda: writer.write(b"HTTP/1.1 100 Continue\r\n\r\n"))


async def _read_message(
    reader: asyncio.StreamReader, *, head: bool = False, send_continue: Callable[[], None] = lambda: None
) -> _Message | None:
    """Read the next message; None if the connection ended before it."""
    first = (await reader.readline()).decode("latin-1").rstrip("\r\n")
    if not first:
        return None
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").rstrip("\r\n"):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        send_continue()
    if head:
        return _Message(first, headers)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return _Message(first, headers, await _read_chunks(reader))
    return _Message(first, headers, await reader.readexactly(int(headers.get("content-length") or 0)))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


def _encode_reply(reply: Reply, head: bool, max_body: int | None) -> bytes:
    """Return the bytes of an answer, with at most `max_body` bytes of its body."""
    lower = {name.lower(): value for name, value in reply.headers.items()}
    length = lower.get("content-length") if head else None
    kept = {name: value for name, value in lower.items() if name not in _OWN_HEADERS}
    kept["content-length"] = length or str(len(reply.body))
    lines = [f"HTTP/1.1 {reply.status} -", *(f"{name}: {value}" for name, value in kept.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (b"" if head else reply.body[:max_body])


_OWN_HEADERS = {"content-length", "transfer-encoding", "connection"}


def _reset_connection(writer: asyncio.StreamWriter) -> None:
    """End a connection by a TCP reset."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
