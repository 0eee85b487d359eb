"""TCP proxy that makes the way to a server longer: requests arrive later, in order; answers are not delayed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

__all__ = ["delaying_proxy"]

_CHUNK_BYTES = 1 << 18
_Started = Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]]


@contextmanager
def delaying_proxy(endpoint: str, seconds: float) -> Iterator[str]:
    """Run a proxy to the server at `endpoint` and yield its URL; each request, however many at once, takes longer.

    Args:
        endpoint: URL of the server.
        seconds: Delay of each request, in seconds.
    """
    started: _Started = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(endpoint, seconds, started)), daemon=True)
    thread.start()
    loop, stop, port = started.result(30)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _serve(endpoint: str, seconds: float, started: _Started) -> None:
    server = urlsplit(endpoint)

    async def connect(client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(server.hostname, server.port)
        except OSError:
            client_writer.close()
            return
        with suppress(asyncio.CancelledError):  # the proxy stops
            await asyncio.gather(
                _forward(client_reader, server_writer, seconds), _forward(server_reader, client_writer, 0.0)
            )

    stop = asyncio.Event()
    listener = await asyncio.start_server(connect, "127.0.0.1", 0)
    started.set_result((asyncio.get_running_loop(), stop, listener.sockets[0].getsockname()[1]))
    await stop.wait()
    listener.close()


async def _forward(source: asyncio.StreamReader, target: asyncio.StreamWriter, seconds: float) -> None:
    """Forward bytes with a delay. Chunks of one body are on their way together, so the body waits once."""
    chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
    reader = asyncio.create_task(_read_chunks(source, chunks, seconds))
    clock = asyncio.get_running_loop().time
    try:
        with suppress(ConnectionError):
            while (received := await chunks.get())[1]:
                due, chunk = received
                if (wait := due - clock()) > 0:
                    await asyncio.sleep(wait)
                target.write(chunk)
                await target.drain()
    finally:
        reader.cancel()
        target.close()


async def _read_chunks(
    source: asyncio.StreamReader, chunks: asyncio.Queue[tuple[float, bytes]], seconds: float
) -> None:
    """Queue each chunk with the time at which it is due; an empty chunk marks the end."""
    chunk = b"-"
    while chunk:
        try:
            chunk = await source.read(_CHUNK_BYTES)
        except ConnectionError:
            chunk = b""
        await chunks.put((asyncio.get_running_loop().time() + seconds, chunk))
