"""Small web servers for the tests, on the loopback."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["HttpServer", "Response", "run_http_server"]


@dataclass(frozen=True)
class Response:
    """One answer. `pieces` are sent one by one, each after `pause` seconds on an event that ends with the server."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: tuple[bytes, ...] | None = None
    pause: float = 0.0
    length: int | None = None


@dataclass
class HttpServer:
    """A running server; `pages` by path may be filled at any time, `asked` holds each request's path and headers."""

    port: int
    responses: dict[str, Response | Callable[[Mapping[str, str]], Response]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def run_http_server(tls: ssl.SSLContext | None = None) -> Iterator[HttpServer]:
    """A server that answers what `pages` say, 404 for all else."""
    over = threading.Event()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.requests.append((self.path, dict(self.headers)))
            found = site.responses.get(self.path, Response(b"no such page", 404))
            page = found if isinstance(found, Response) else found(dict(self.headers))
            self.send_response(page.status)
            for name, value in page.headers.items():
                self.send_header(name, value)
            pieces = page.pieces or (page.body,)
            size = sum(map(len, pieces)) if page.length is None else page.length
            self.send_header("Content-Length", str(size))
            self.end_headers()
            for piece in pieces:
                over.wait(page.pause)
                try:
                    self.wfile.write(piece)
                    self.wfile.flush()
                except OSError:
                    return
            self.close_connection = page.length is not None

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    site = HttpServer(server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
