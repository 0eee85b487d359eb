"""A small HTTP server for tests, on the loopback interface."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.loopback import serve_in_thread

__all__ = ["HttpServer", "Response", "run_http_server"]


@dataclass(frozen=True)
class Response:
    """One answer of the server.

    Attributes:
        body: Body; not sent if there are `pieces`.
        status: HTTP status.
        headers: Headers besides `Content-Length`.
        pieces: Parts of the body that are sent one by one.
        pause: Seconds to wait before each part.
        length: Value of `Content-Length`, if it is not the true one.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: tuple[bytes, ...] | None = None
    pause: float = 0.0
    length: int | None = None


@dataclass
class HttpServer:
    """A running server.

    Attributes:
        port: Port on 127.0.0.1.
        responses: Answer by path, or a function of the request's headers; may be filled at any time.
        requests: Path and headers of each request so far.
    """

    port: int
    responses: dict[str, Response | Callable[[Mapping[str, str]], Response]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def run_http_server(tls: ssl.SSLContext | None = None) -> Iterator[HttpServer]:
    """Run a server that sends its `responses`, and 404 for every other path."""
    stopped = threading.Event()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.requests.append((self.path, dict(self.headers)))
            found = server.responses.get(self.path, Response(b"no such page", 404))
            response = found if isinstance(found, Response) else found(dict(self.headers))
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            pieces = response.pieces or (response.body,)
            size = sum(map(len, pieces)) if response.length is None else response.length
            self.send_header("Content-Length", str(size))
            self.end_headers()
            for piece in pieces:
                stopped.wait(response.pause)
                try:
                    self.wfile.write(piece)
                    self.wfile.flush()
                except OSError:
                    return
            self.close_connection = response.length is not None

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    if tls is not None:
        listener.socket = tls.wrap_socket(listener.socket, server_side=True)
    server = HttpServer(listener.server_port)
    with serve_in_thread(listener):
        try:
            yield server
        finally:
            stopped.set()
