"""A store in memory, for the rooms that commit: it breaks where a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, TypeVar

from batchjob.errors import AlreadyExists, BatchjobError, NotFound, PreconditionFailed, Unavailable
from batchjob.storage.objects import ObjectData, ObjectInfo

__all__ = ["WRITE_METHODS", "Call", "Fault", "Killed", "MemoryStore"]

T = TypeVar("T")
WRITE_METHODS = ("put_if_absent", "replace_if_match", "delete", "delete_if_match")


class Killed(BaseException):
    """The process died here: nothing after this line runs, no handler either."""


class Fault(Enum):
    """How a call goes wrong."""

    DOWN = auto()  # nothing happens; no answer
    LOST = auto()  # it happens; no answer
    REPEATED = auto()  # it happens, the answer is lost, and the client's repeat meets its own first write
    CONFLICT = auto()  # nothing happens; the answer is that of a lost race
    KILLED_BEFORE = auto()
    KILLED_AFTER = auto()
    STALE = auto()  # a listing shows what lay there some writes ago; all other calls are right


_STALE_WRITES = 3
_HAPPENS = {Fault.LOST, Fault.REPEATED, Fault.KILLED_AFTER}


@dataclass(frozen=True)
class Call:
    """What was asked of the store."""

    method: str
    key: str


@dataclass
class _Planned:
    verb: str
    pattern: str
    fault: Fault | Callable[[], object]
    skip: int
    times: int


@dataclass
class _Disk:
    """What outlives every client."""

    objects: dict[str, ObjectData] = field(default_factory=dict)
    writes: int = 0
    before: deque[dict[str, ObjectData]] = field(default_factory=lambda: deque([{}], maxlen=_STALE_WRITES))
    lock: threading.Lock = field(default_factory=threading.Lock)


class MemoryStore:
    """A `Store`. Several clients may share its objects, each with faults and calls of its own."""

    uri = "memory://out"

    def __init__(self, disk: _Disk | None = None) -> None:
        self._disk = disk or _Disk()
        self._planned: list[_Planned] = []
        self.calls: list[Call] = []

    # -- for tests ---------------------------------------------------------------------------------------------------

    def client(self) -> MemoryStore:
        """Another client of the same objects."""
        return MemoryStore(self._disk)

    def inject(
        self, method: str, pattern: str, fault: Fault | Callable[[], object], *, skip: int = 0, times: int = 1
    ) -> None:
        """Let the calls of `verb` on keys like `pattern` go wrong: after the first `skip`, the next `times`.

        A callable is what somebody else does just before the call, which then goes its way.
        """
        self._planned.append(_Planned(method, pattern, fault, skip, times))

    def written_keys(self) -> list[str]:
        """Keys of all creates, replacements and deletions asked for, in order."""
        return [call.key for call in self.calls if call.method in WRITE_METHODS]

    def stored_keys(self) -> list[str]:
        """Everything that lies there."""
        return sorted(self._disk.objects)

    # -- Store -------------------------------------------------------------------------------------------------------

    def read(self, key: str) -> ObjectData:
        """Raises NotFound, Unavailable."""
        return self._asked("read", key, lambda: self._blob(key))

    def read_tail(self, key: str, size: int) -> bytes:
        """The last `size` bytes, or all."""
        return self._asked("read_tail", key, lambda: self._blob(key).data[-size:] if size else b"")

    def read_head(self, key: str, size: int) -> bytes:
        """The first `size` bytes, or all."""
        return self._asked("read_head", key, lambda: self._blob(key).data[:size])

    def open(self, key: str) -> BinaryIO:
        """Its bytes as a file."""
        return self._asked("open", key, lambda: io.BytesIO(self._blob(key).data))

    def stat(self, key: str) -> ObjectInfo:
        """Raises NotFound, Unavailable."""
        return self._asked("stat", key, lambda: _stat(key, self._blob(key)))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in key order."""
        fault = self._fault("list", prefix)
        lying = self._disk.before[0] if fault is Fault.STALE else self._disk.objects
        found = self._answered("list", prefix, fault, lambda: dict(lying))
        return (_stat(key, found[key]) for key in sorted(found) if key.startswith(prefix))

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        """Raises AlreadyExists, Unavailable."""
        return self._asked("put_if_absent", key, lambda: self._create(key, body))

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        """Raises Changed, Unavailable."""
        return self._asked("replace_if_match", key, lambda: self._replace(key, body, version), PreconditionFailed)

    def delete(self, key: str) -> None:
        """Absent is fine."""
        self._asked("delete", key, lambda: self._remove(key))

    def delete_if_match(self, key: str, version: str) -> None:
        """Absent is fine. Raises Changed, Unavailable."""
        self._asked("delete_if_match", key, lambda: self._remove(key, version), PreconditionFailed)

    # -- how -----------------------------------------------------------------------------------------------------------

    def _asked(self, verb: str, key: str, happen: Callable[[], T], lost_race: type[BatchjobError] = AlreadyExists) -> T:
        return self._answered(verb, key, self._fault(verb, key), happen, lost_race)

    def _fault(self, verb: str, key: str) -> Fault | None:
        fault = self._next_fault(verb, key)
        if not callable(fault):
            return fault
        fault()
        return None

    def _answered(
        self,
        verb: str,
        key: str,
        fault: Fault | None,
        happen: Callable[[], T],
        lost_race: type[BatchjobError] = AlreadyExists,
    ) -> T:
        with self._disk.lock:
            self.calls.append(Call(verb, key))
            if fault is None or fault is Fault.STALE:
                return happen()
            if fault in _HAPPENS:
                happen()
        if fault in (Fault.KILLED_BEFORE, Fault.KILLED_AFTER):
            raise Killed(f"{verb} {key}")
        if fault in (Fault.CONFLICT, Fault.REPEATED):
            raise lost_race(f"{self.uri}/{key}: lost a race, says the store")
        raise Unavailable(f"{self.uri}/{key}: the store does not answer")

    def _next_fault(self, verb: str, key: str) -> Fault | Callable[[], object] | None:
        for planned in self._planned:
            if planned.verb == verb and fnmatchcase(key, planned.pattern) and planned.times:
                if planned.skip:
                    planned.skip -= 1
                    continue
                planned.times -= 1
                return planned.fault
        return None

    def _blob(self, key: str) -> ObjectData:
        if key not in self._disk.objects:
            raise NotFound(f"{self.uri}/{key}: not there")
        return self._disk.objects[key]

    def _create(self, key: str, body: bytes | Path) -> ObjectInfo:
        if key in self._disk.objects:
            raise AlreadyExists(f"{self.uri}/{key}: already there")
        return self._write(key, body)

    def _replace(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        if key not in self._disk.objects or self._disk.objects[key].version != version:
            raise PreconditionFailed(f"{self.uri}/{key}: replaced by another writer")
        return self._write(key, body)

    def _remove(self, key: str, version: str | None = None) -> None:
        if version is not None and key in self._disk.objects and self._disk.objects[key].version != version:
            raise PreconditionFailed(f"{self.uri}/{key}: replaced by another writer")
        self._disk.before.append(dict(self._disk.objects))
        self._disk.objects.pop(key, None)

    def _write(self, key: str, body: bytes | Path) -> ObjectInfo:
        data = body.read_bytes() if isinstance(body, Path) else body
        self._disk.before.append(dict(self._disk.objects))
        self._disk.writes += 1
        self._disk.objects[key] = ObjectData(data, hashlib.sha256(data).hexdigest()[:32], str(self._disk.writes))
        return _stat(key, self._disk.objects[key])


def _stat(key: str, blob: ObjectData) -> ObjectInfo:
    return ObjectInfo(key, len(blob.data), blob.etag, blob.version)
