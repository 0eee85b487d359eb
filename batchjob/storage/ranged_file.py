"""An object opened as a seekable file that fetches only the byte ranges it is asked for."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from batchjob.storage.backend import Backend

__all__ = ["open_ranged"]

_READ_AHEAD = 1 << 20  # bytes per range request, at least


def open_ranged(backend: Backend, key: str) -> BinaryIO:
    """Open an object as a seekable file that fetches what is read from it. Raises NotFound, Unavailable."""
    return io.BufferedReader(_RangedFile(backend, key, backend.head(key).size), _READ_AHEAD)


class _RangedFile(io.RawIOBase):
    """An object of known size as a raw stream: each read is one range request.

    For example, in an object of 10 bytes, `seek(-4, SEEK_END)` moves to 6, and a read of 8 bytes fetches 6 to 10.
    """

    def __init__(self, backend: Backend, key: str, size: int) -> None:
        self._backend, self._key, self._size, self._position = backend, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._backend.get_range(self._key, self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
