"""A server between a client and a real one, that loses answers, throttles and breaks as a test tells it to."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

__all__ = ["LOSE_ANSWER", "RESET", "Faulty", "Reply", "between"]


@dataclass(frozen=True)
class Reply:
    """An answer of our own, in place of the real server's."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


RESET = "reset"  # the connection breaks before the request arrives
LOSE_ANSWER = "lose"  # the request is carried out, then the connection breaks
Decide = Callable[[str, str], Reply | str | None]


@dataclass
class Faulty:
    """The running go-between.

    Attributes:
        endpoint: its URL.
        decide: method and raw path → what to do; None passes the request on.
        seen: method and raw path of every request so far.
    """

    endpoint: str
    decide: Decide = lambda method, path: None
    seen: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def between(upstream: str) -> Iterator[Faulty]:
    """A go-between in front of the server at the URL `upstream`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _GoBetween)
    server.daemon_threads = True
    faulty = Faulty(f"http://127.0.0.1:{server.server_port}")
    _GoBetween.serving[server.server_port] = (faulty, urlsplit(upstream).netloc)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield faulty
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _GoBetween(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    serving: dict[int, tuple[Faulty, str]] = {}  # noqa: RUF012 - port → who serves it

    def _answer(self) -> None:
        server = self.server
        assert isinstance(server, ThreadingHTTPServer)
        faulty, upstream = self.serving[server.server_port]
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        faulty.seen.append((self.command, self.path))
        action = faulty.decide(self.command, self.path)
        if action is None or action == LOSE_ANSWER:
            reply = self._pass_on(upstream, body)
        if isinstance(action, str):
            self.close_connection = True
            return
        self._send(action or reply)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer  # noqa: N815 - the names that http.server calls

    def _pass_on(self, upstream: str, body: bytes) -> Reply:
        connection = http.client.HTTPConnection(upstream, timeout=30)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():  # the host too: it is signed
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        reply = Reply(answer.status, answer.read(), dict(answer.getheaders()))
        connection.close()
        return reply

    def _send(self, reply: Reply) -> None:
        self.send_response_only(reply.status)
        lower = {name.lower(): value for name, value in reply.headers.items()}
        length = lower.get("content-length") if self.command == "HEAD" else None
        for name, value in lower.items():
            if name not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("content-length", length or str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
