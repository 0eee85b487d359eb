"""A longer way to a server: what a client sends arrives so many seconds later, in order; answers do not wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

__all__ = ["delaying_proxy"]

_CHUNK = 1 << 18
_Opened = Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]]


@contextmanager
def delaying_proxy(endpoint: str, seconds: float) -> Iterator[str]:
    """URL that leads to the server at `endpoint`; each request, however many at once, takes so much longer."""
    opened: _Opened = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(endpoint, seconds, opened)), daemon=True)
    thread.start()
    loop, over, port = opened.result(30)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


async def _serve(endpoint: str, seconds: float, opened: _Opened) -> None:
    there = urlsplit(endpoint)

    async def meet(client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        try:
            server, requests = await asyncio.open_connection(there.hostname, there.port)
        except OSError:
            answers.close()
            return
        with suppress(asyncio.CancelledError):  # the end of it all
            await asyncio.gather(_carry(client, requests, seconds), _carry(server, answers, 0.0))

    over = asyncio.Event()
    listening = await asyncio.start_server(meet, "127.0.0.1", 0)
    opened.set_result((asyncio.get_running_loop(), over, listening.sockets[0].getsockname()[1]))
    await over.wait()
    listening.close()


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, seconds: float) -> None:
    """Bytes from one side to the other; a body's chunks are under way together, so they wait once and not each."""
    due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
    reading = asyncio.create_task(_read(source, due, seconds))
    clock = asyncio.get_running_loop().time
    try:
        with suppress(ConnectionError):
            while (sent := await due.get())[1]:
                if (wait := sent[0] - clock()) > 0:
                    await asyncio.sleep(wait)
                target.write(sent[1])
                await target.drain()
    finally:
        reading.cancel()
        target.close()


async def _read(source: asyncio.StreamReader, due: asyncio.Queue[tuple[float, bytes]], seconds: float) -> None:
    """What comes, with the time at which it is to go on; nothing at the end."""
    chunk = b"-"
    while chunk:
        try:
            chunk = await source.read(_CHUNK)
        except ConnectionError:
            chunk = b""
        await due.put((asyncio.get_running_loop().time() + seconds, chunk))
