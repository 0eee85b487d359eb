"""One driver at a time: numbered epoch objects, rewritten by their owner as long as its control loop turns.

It saves GPUs. Safety never rests on it: two drivers at once commit each part once all the same.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from batchjob.errors import (
    AlreadyExists,
    BatchjobError,
    CheckFailed,
    NotFound,
    PreconditionFailed,
    Temporary,
    Unavailable,
)
from batchjob.storage.store import Store

__all__ = ["EXPIRY_SECONDS", "HEARTBEAT_SECONDS", "Lease"]

HEARTBEAT_SECONDS = 2.0
EXPIRY_SECONDS = 20.0
_POLL_SECONDS = 0.5
_FOLDER = "_batchjob/lease/"
_NAME = re.compile(r"(\d{10})\.json")
_LOOKS = 4


@dataclass(frozen=True)
class _LeaseState:
    epoch: int
    version: str
    owner: str
    where: str
    released: bool
    data: bytes


class Lease:
    """A held lease. Get one by `acquire`, call `beat` in every turn of the control loop, `release` at the end."""

    def __init__(self, store: Store, epoch: int, owner: str, version: str, clock: Callable[[], float]) -> None:
        self._store, self._owner, self._version, self._clock = store, owner, version, clock
        self.epoch = epoch
        self._beats = 0
        self._last = clock()

    @classmethod
    def acquire(
        cls,
        store: Store,
        *,
        expiry_seconds: float = EXPIRY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        note: Callable[[str], None] = lambda text: None,
    ) -> Lease:
        """Take the lease: at once when it is free, after `silence` seconds without a beat when its owner is gone.

        Raises:
            Temporary: another driver is at work.
        """
        owner = secrets.token_hex(8)
        newest = _newest(store)
        if newest is not None and not newest.released:
            note(
                f"a driver ({newest.where}) holds {store.uri}; waiting up to {expiry_seconds:.0f} s "
                "to see whether it lives"
            )
            _watch(store, newest, expiry_seconds, clock, sleep)
        epoch = newest.epoch + 1 if newest else 1
        lease = cls(store, epoch, owner, _create(store, epoch, owner), clock)
        lease._delete_old_epochs()
        return lease

    @property
    def visibility_check(self) -> tuple[str, str]:
        """Key of the epoch object and a word in it: who can read it sees the same output as this driver."""
        return _key(self.epoch), self._owner

    @property
    def heartbeat_due(self) -> bool:
        """Whether the last beat is two seconds old."""
        return self._clock() - self._last >= HEARTBEAT_SECONDS

    def heartbeat(self) -> None:
        """Show life, at most every two seconds.

        Raises:
            Temporary: another driver has taken over.
        """
        if not self.heartbeat_due:
            return
        self._last = self._clock()
        self._beats += 1
        self.confirm_ownership()
        self._rewrite(released=False)

    def confirm_ownership(self) -> None:
        """Look whether it is still ours.

        Raises:
            Temporary: another driver has taken over.
        """
        newest = _newest(self._store)
        if newest is None or newest.epoch != self.epoch or newest.owner != self._owner:
            raise _busy(self._store, newest)

    def release(self) -> None:
        """Let the next driver start at once. A lease lost meanwhile is left as it is, and so is an unwritable one."""
        with suppress(BatchjobError):
            self._rewrite(released=True)

    def _rewrite(self, released: bool) -> None:
        body = _body(self.epoch, self._owner, self._beats, released)
        for _ in range(_LOOKS):
            doubt: BatchjobError
            try:
                self._version = self._store.replace_if_match(_key(self.epoch), body, self._version).version or ""
                return
            except (PreconditionFailed, NotFound, Unavailable) as error:
                doubt = error
            seen = _look(self._store, self.epoch)
            if seen is None or seen.owner != self._owner:
                raise _busy(self._store, seen)
            self._version = seen.version
            if seen.data == body:  # our own write, whose answer was lost
                return
            if isinstance(doubt, Unavailable):
                raise doubt
        raise Temporary(f"{self._store.uri}/{_key(self.epoch)}: the lease cannot be rewritten; run again")

    def _delete_old_epochs(self) -> None:
        """Delete epochs of long ago. Raises Temporary where ours is one: whoever looked before, and slept, is late."""
        epochs = _epochs(self._store)
        if max(epochs, default=0) > self.epoch:
            self._store.delete(_key(self.epoch))
            raise _busy(self._store, _newest(self._store))
        for epoch in epochs:
            if epoch < self.epoch - 1:
                self._store.delete(_key(epoch))


def _create(store: Store, epoch: int, owner: str) -> str:
    """Make the epoch ours; its version. Raises Temporary where another driver was faster."""
    for _ in range(_LOOKS):
        doubt: BatchjobError
        try:
            return store.put_if_absent(_key(epoch), _body(epoch, owner, 0)).version or ""
        except (AlreadyExists, Unavailable) as error:
            doubt = error
        seen = _look(store, epoch)
        if seen is not None and seen.owner == owner:  # our own write, whose answer was lost
            return seen.version
        if seen is not None:
            raise _busy(store, seen)
        if isinstance(doubt, Unavailable):
            raise doubt
    raise _busy(store, None)


def _watch(
    store: Store, seen: _LeaseState, silence: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    """Return when the owner released or stayed silent; only successful reads count as silence."""
    quiet_since = clock()
    while clock() - quiet_since < silence:
        sleep(_POLL_SECONDS)
        before = clock()
        newest = _newest(store)
        if newest is None or newest.epoch != seen.epoch or newest.version != seen.version:
            if newest is not None and newest.epoch == seen.epoch and newest.released:
                return
            raise _busy(store, newest)
        quiet_since += max(0.0, clock() - before - _POLL_SECONDS)  # a slow read says nothing about the owner


def _busy(store: Store, seen: _LeaseState | None) -> Temporary:
    who = f" ({seen.where})" if seen else ""
    return Temporary(f"another driver{who} is at work on {store.uri}; let it finish, or try again later")


def _newest(store: Store) -> _LeaseState | None:
    """The highest epoch, however often the listing and the read disagree."""
    while True:
        epochs = _epochs(store)
        if not epochs:
            return None
        seen = _look(store, max(epochs))
        if seen is not None:
            return seen


def _look(store: Store, epoch: int) -> _LeaseState | None:
    try:
        blob = store.read(_key(epoch))
    except NotFound:
        return None
    try:
        facts = json.loads(blob.data)
        return _LeaseState(epoch, blob.version or "", facts["owner"], facts["where"], facts["released"], blob.data)
    except (ValueError, LookupError, TypeError) as error:
        raise CheckFailed(f"{store.uri}/{_key(epoch)} is no lease of batchjob's; remove it and run again") from error


def _key(epoch: int) -> str:
    return f"{_FOLDER}{epoch:010d}.json"


def _epochs(store: Store) -> list[int]:
    """Numbers of the epoch objects; what else a file browser may have left there is passed over."""
    names = (_NAME.fullmatch(stat.uri.removeprefix(_FOLDER)) for stat in store.list(_FOLDER))
    return [int(name[1]) for name in names if name]


def _body(epoch: int, owner: str, beats: int, released: bool = False) -> bytes:
    where = f"host {socket.gethostname()}, process {os.getpid()}"
    facts = {"epoch": epoch, "owner": owner, "where": where, "beats": beats, "released": released}
    return json.dumps(facts).encode()
