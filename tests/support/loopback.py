"""Servers on the loopback interface: free ports, ports that answer, and HTTP servers in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import ThreadingHTTPServer

__all__ = ["find_free_port", "find_free_ports", "is_listening", "serve_in_thread"]


def find_free_ports(count: int) -> list[int]:
    """Return ports that no one listens on, all different."""
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def find_free_port() -> int:
    """Return a port that no one listens on."""
    return find_free_ports(1)[0]


def is_listening(port: int) -> bool:
    """Return True if someone accepts connections on the port."""
    with closing(socket.socket()) as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serve_in_thread(server: ThreadingHTTPServer) -> Iterator[None]:
    """Answer requests in a thread until the context ends."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
