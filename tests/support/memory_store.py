"""A `Store` in memory that injects faults and records its calls."""

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

__all__ = ["WRITE_METHODS", "Call", "Fault", "Killed", "MemoryStore", "StoreState"]

T = TypeVar("T")
WRITE_METHODS = ("put_if_absent", "replace_if_match", "delete", "delete_if_match")


class Killed(BaseException):
    """Death of the process at this line: no code after it runs, and no exception handler."""


class Fault(Enum):
    """A way in which a call to the store fails."""

    DOWN = auto()  # the call is not carried out, and not answered
    LOST = auto()  # the call is carried out, but its answer is lost
    REPEATED = auto()  # the answer is lost, and the client's repeated call meets its own first write
    CONFLICT = auto()  # the call is not carried out; the answer is that another client has written first
    KILLED_BEFORE = auto()  # the caller dies before the call is carried out
    KILLED_AFTER = auto()  # the caller dies after the call was carried out
    STALE = auto()  # a listing returns the objects as they were before the last writes; other calls are up to date


_STALE_WRITES = 3
_CARRIED_OUT = {Fault.LOST, Fault.REPEATED, Fault.KILLED_AFTER}


@dataclass(frozen=True)
class Call:
    """A recorded call: method and key, or prefix for `list`."""

    method: str
    key: str


@dataclass
class _InjectedFault:
    method: str
    pattern: str
    fault: Fault | Callable[[], object]
    skip: int
    times: int


@dataclass
class StoreState:
    """Objects of a store, which all its clients share."""

    objects: dict[str, ObjectData] = field(default_factory=dict)
    writes: int = 0
    history: deque[dict[str, ObjectData]] = field(default_factory=lambda: deque([{}], maxlen=_STALE_WRITES))
    lock: threading.Lock = field(default_factory=threading.Lock)


class MemoryStore:
    """A `Store`. Several clients may share the objects; each has faults and recorded calls of its own.

    Args:
        state: Objects that it shares with other clients; None for objects of its own.
        before_call: Called before each call, without the lock; returns the fault of the call, or None.

    Attributes:
        state: Its objects.
        calls: Its calls, in order.
    """

    uri = "memory://out"

    def __init__(
        self, state: StoreState | None = None, before_call: Callable[[Call], Fault | None] = lambda call: None
    ) -> None:
        self.state, self._before_call = state or StoreState(), before_call
        self._faults: list[_InjectedFault] = []
        self.calls: list[Call] = []

    # -- for tests ---------------------------------------------------------------------------------------------------

    def client(self) -> MemoryStore:
        """Return another client of the same objects."""
        return MemoryStore(self.state)

    def inject(
        self, method: str, pattern: str, fault: Fault | Callable[[], object], *, skip: int = 0, times: int = 1
    ) -> None:
        """Make calls fail.

        Args:
            method: Name of the method, such as `put_if_absent`.
            pattern: Pattern of the keys, as for `fnmatch`.
            fault: Way to fail; or a function that runs just before the call, which is then carried out: a rival.
            skip: Number of matching calls that are carried out before.
            times: Number of matching calls that fail.
        """
        self._faults.append(_InjectedFault(method, pattern, fault, skip, times))

    def written_keys(self) -> list[str]:
        """Return the keys of all calls that write or delete, in order."""
        return [call.key for call in self.calls if call.method in WRITE_METHODS]

    def stored_keys(self) -> list[str]:
        """Return the keys of all objects, sorted."""
        return sorted(self.state.objects)

    # -- Store -------------------------------------------------------------------------------------------------------

    def read(self, key: str) -> ObjectData:
        """Return an object. Raises NotFound, Unavailable."""
        return self._call("read", key, lambda: self._get(key))

    def read_tail(self, key: str, size: int) -> bytes:
        """Return the last `size` bytes, or all of them."""
        return self._call("read_tail", key, lambda: self._get(key).data[-size:] if size else b"")

    def read_head(self, key: str, size: int) -> bytes:
        """Return the first `size` bytes, or all of them."""
        return self._call("read_head", key, lambda: self._get(key).data[:size])

    def open(self, key: str) -> BinaryIO:
        """Open an object as a file."""
        return self._call("open", key, lambda: io.BytesIO(self._get(key).data))

    def stat(self, key: str) -> ObjectInfo:
        """Return size, tag and version of an object. Raises NotFound, Unavailable."""
        return self._call("stat", key, lambda: _object_info(key, self._get(key)))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with `prefix`, in key order."""
        fault = self._take_fault("list", prefix)
        listed = self.state.history[0] if fault is Fault.STALE else self.state.objects
        found = self._carry_out("list", prefix, fault, lambda: dict(listed))
        return (_object_info(key, found[key]) for key in sorted(found) if key.startswith(prefix))

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        """Create an object. Raises AlreadyExists, Unavailable."""
        return self._call("put_if_absent", key, lambda: self._create(key, body))

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        """Replace an object. Raises PreconditionFailed, Unavailable."""
        return self._call("replace_if_match", key, lambda: self._replace(key, body, version), PreconditionFailed)

    def delete(self, key: str) -> None:
        """Delete an object; one that does not exist is no error."""
        self._call("delete", key, lambda: self._remove(key))

    def delete_if_match(self, key: str, version: str) -> None:
        """Delete an object that has this version, if it exists. Raises PreconditionFailed, Unavailable."""
        self._call("delete_if_match", key, lambda: self._remove(key, version), PreconditionFailed)

    # -- implementation ----------------------------------------------------------------------------------------------

    def _call(
        self, method: str, key: str, action: Callable[[], T], conflict_error: type[BatchjobError] = AlreadyExists
    ) -> T:
        return self._carry_out(method, key, self._take_fault(method, key), action, conflict_error)

    def _take_fault(self, method: str, key: str) -> Fault | None:
        if (fault := self._before_call(Call(method, key))) is not None:
            return fault
        injected = self._find_injected_fault(method, key)
        if not callable(injected):
            return injected
        injected()
        return None

    def _carry_out(
        self,
        method: str,
        key: str,
        fault: Fault | None,
        action: Callable[[], T],
        conflict_error: type[BatchjobError] = AlreadyExists,
    ) -> T:
        with self.state.lock:
            self.calls.append(Call(method, key))
            if fault is None or fault is Fault.STALE:
                return action()
            if fault in _CARRIED_OUT:
                action()
        if fault in (Fault.KILLED_BEFORE, Fault.KILLED_AFTER):
            raise Killed(f"{method} {key}")
        if fault in (Fault.CONFLICT, Fault.REPEATED):
            raise conflict_error(f"{self.uri}/{key}: lost a race, says the store")
        raise Unavailable(f"{self.uri}/{key}: the store does not answer")

    def _find_injected_fault(self, method: str, key: str) -> Fault | Callable[[], object] | None:
        for injected in self._faults:
            if injected.method == method and fnmatchcase(key, injected.pattern) and injected.times:
                if injected.skip:
                    injected.skip -= 1
                    continue
                injected.times -= 1
                return injected.fault
        return None

    def _get(self, key: str) -> ObjectData:
        if key not in self.state.objects:
            raise NotFound(f"{self.uri}/{key}: not there")
        return self.state.objects[key]

    def _create(self, key: str, body: bytes | Path) -> ObjectInfo:
        if key in self.state.objects:
            raise AlreadyExists(f"{self.uri}/{key}: already there")
        return self._write(key, body)

    def _replace(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        if key not in self.state.objects or self.state.objects[key].version != version:
            raise PreconditionFailed(f"{self.uri}/{key}: replaced by another writer")
        return self._write(key, body)

    def _remove(self, key: str, version: str | None = None) -> None:
        if version is not None and key in self.state.objects and self.state.objects[key].version != version:
            raise PreconditionFailed(f"{self.uri}/{key}: replaced by another writer")
        self.state.history.append(dict(self.state.objects))
        self.state.objects.pop(key, None)

    def _write(self, key: str, body: bytes | Path) -> ObjectInfo:
        data = body.read_bytes() if isinstance(body, Path) else body
        self.state.history.append(dict(self.state.objects))
        self.state.writes += 1
        self.state.objects[key] = ObjectData(data, hashlib.sha256(data).hexdigest()[:32], str(self.state.writes))
        return _object_info(key, self.state.objects[key])


def _object_info(key: str, data: ObjectData) -> ObjectInfo:
    return ObjectInfo(key, len(data.data), data.etag, data.version)
