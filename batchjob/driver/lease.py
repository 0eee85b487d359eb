"""Lease on an output: one driver at a time. Numbered objects, each rewritten by its owner every two seconds.

The lease saves GPUs. Safety never rests on it: two drivers at once still commit each part once.
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
from batchjob.storage.store import Store, read_if_present

__all__ = ["EXPIRY_SECONDS", "HEARTBEAT_SECONDS", "Lease"]

HEARTBEAT_SECONDS = 2.0
EXPIRY_SECONDS = 20.0
_POLL_SECONDS = 0.5
_MAX_TRIES = 4
_FOLDER = "_batchjob/lease/"
_EPOCH_NAME = re.compile(r"(\d{10})\.json")


@dataclass(frozen=True)
class _LeaseState:
    """Content of an epoch object.

    Attributes:
        epoch: Number of the epoch.
        version: Version of the object, for conditional writes.
        owner: Random id of the driver that created the epoch.
        where: Host and process of that driver, for a person.
        released: True if that driver has given the lease back.
        data: The object's bytes.
    """

    epoch: int
    version: str
    owner: str
    where: str
    released: bool
    data: bytes


class Lease:
    """A held lease: get one by `acquire`, call `heartbeat` in every tick of the control loop, `release` it at the end.

    Each owner creates the next epoch with one put-if-absent, and rewrites it every 2 s on the condition that it is
    unchanged. A newcomer reads the newest epoch and measures with its own monotonic clock, so no two clocks are ever
    compared:

        epoch 3 changes while it watches                        → another driver is at work: Temporary
        epoch 3 is unchanged for 20 s of reads, or is released  → create epoch 4; who loses that race: Temporary
        epoch 3 is gone: its owner has ended without a plan     → create epoch 4, as above
        the owner of epoch 3 comes back and sees epoch 4        → it has lost the lease: Temporary

    Attributes:
        epoch: Number of the epoch that this driver owns.
    """

    def __init__(self, store: Store, epoch: int, owner: str, version: str, clock: Callable[[], float]) -> None:
        self._store, self._owner, self._version, self._clock = store, owner, version, clock
        self.epoch = epoch
        self._heartbeats = 0
        self._last_heartbeat = clock()

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
        """Take the lease, at once if it is free; otherwise wait to see whether its owner is alive.

        Args:
            store: The output.
            expiry_seconds: Time without a heartbeat after which an owner counts as gone, in seconds.
            clock: Monotonic clock, in seconds.
            sleep: Called between two reads of the owner's epoch; what it raises ends the wait.
            note: Called with a line for the user before a wait.

        Raises:
            Temporary: Another driver is at work.
        """
        owner = secrets.token_hex(8)
        newest = _read_newest_epoch(store)
        if newest is not None and not newest.released:
            note(
                f"a driver ({newest.where}) holds {store.uri}; waiting up to {expiry_seconds:.0f} s "
                "to see whether it lives"
            )
            _wait_for_expiry(store, newest, expiry_seconds, clock, sleep)
        epoch = newest.epoch + 1 if newest else 1
        lease = cls(store, epoch, owner, _create_epoch(store, epoch, owner), clock)
        lease._delete_old_epochs()
        return lease

    @property
    def visibility_check(self) -> tuple[str, str]:
        """Key of the epoch object and a word in it: a process that can read both sees the same output as this one."""
        return _epoch_key(self.epoch), self._owner

    @property
    def heartbeat_due(self) -> bool:
        """True if the last heartbeat is at least 2 s old."""
        return self._clock() - self._last_heartbeat >= HEARTBEAT_SECONDS

    def heartbeat(self) -> None:
        """Rewrite the epoch object if the last heartbeat is at least 2 s old.

        Raises:
            Temporary: Another driver has taken the lease.
        """
        if not self.heartbeat_due:
            return
        self._last_heartbeat = self._clock()
        self._heartbeats += 1
        self.confirm_ownership()
        self._rewrite_epoch(released=False)

    def confirm_ownership(self) -> None:
        """Check that the newest epoch is this driver's.

        Raises:
            Temporary: Another driver has taken the lease.
        """
        newest = _read_newest_epoch(self._store, self.epoch)
        if newest is None or newest.epoch != self.epoch or newest.owner != self._owner:
            raise _busy_error(self._store, newest)

    def release(self, *, is_unused: Callable[[], bool] = lambda: False) -> None:
        """Mark the epoch as released, so that the next driver starts at once; do nothing if the lease is lost.

        Args:
            is_unused: Returns True if there is nothing in the output that a lease is for; then the epoch is deleted.
        """
        with suppress(BatchjobError):
            if is_unused():
                self._store.delete_if_match(_epoch_key(self.epoch), self._version)
            else:
                self._rewrite_epoch(released=True)

    def _rewrite_epoch(self, released: bool) -> None:
        body = _encode_epoch(self.epoch, self._owner, self._heartbeats, released)
        for _ in range(_MAX_TRIES):
            write_error: BatchjobError
            try:
                self._version = self._store.replace_if_match(_epoch_key(self.epoch), body, self._version).version or ""
                return
            except (PreconditionFailed, NotFound, Unavailable) as error:
                write_error = error
            state = _read_epoch(self._store, self.epoch)
            if state is None or state.owner != self._owner:
                raise _busy_error(self._store, state)
            self._version = state.version
            # Our own write succeeded, and only its answer was lost.
            if state.data == body:
                return
            if isinstance(write_error, Unavailable):
                raise write_error
        raise Temporary(f"{self._store.uri}/{_epoch_key(self.epoch)}: the lease cannot be rewritten; run again")

    def _delete_old_epochs(self) -> None:
        """Delete all epochs but the newest two.

        Raises:
            Temporary: Ours is not the newest: this driver was suspended between its look and its create.
        """
        epochs = _list_epochs(self._store)
        if max(epochs, default=0) > self.epoch:
            self._store.delete(_epoch_key(self.epoch))
            raise _busy_error(self._store, _read_newest_epoch(self._store))
        for epoch in epochs:
            if epoch < self.epoch - 1:
                self._store.delete(_epoch_key(epoch))


def _create_epoch(store: Store, epoch: int, owner: str) -> str:
    """Create an epoch object and return its version; raise Temporary if another driver was first."""
    for _ in range(_MAX_TRIES):
        write_error: BatchjobError
        try:
            return store.put_if_absent(_epoch_key(epoch), _encode_epoch(epoch, owner, 0)).version or ""
        except (AlreadyExists, Unavailable) as error:
            write_error = error
        state = _read_epoch(store, epoch)
        # Our own write succeeded, and only its answer was lost.
        if state is not None and state.owner == owner:
            return state.version
        if state is not None:
            raise _busy_error(store, state)
        if isinstance(write_error, Unavailable):
            raise write_error
    raise _busy_error(store, None)


def _wait_for_expiry(
    store: Store, owned: _LeaseState, expiry_seconds: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    """Return once the owner has released its epoch or let it expire; raise Temporary if the epoch changes."""
    unchanged_since = clock()
    while clock() - unchanged_since < expiry_seconds:
        sleep(_POLL_SECONDS)
        read_started = clock()
        newest = _read_newest_epoch(store)
        if newest is None:  # deleted by its owner, which has left nothing in the output
            return
        if newest.epoch != owned.epoch or newest.version != owned.version:
            if newest.epoch == owned.epoch and newest.released:
                return
            raise _busy_error(store, newest)
        # A slow read is no evidence that the owner is gone, so the time that it took does not count.
        unchanged_since += max(0.0, clock() - read_started - _POLL_SECONDS)


def _busy_error(store: Store, state: _LeaseState | None) -> Temporary:
    owner = f" ({state.where})" if state else ""
    return Temporary(f"another driver{owner} is at work on {store.uri}; let it finish, or try again later")


def _read_newest_epoch(store: Store, own_epoch: int | None = None) -> _LeaseState | None:
    """Read the epoch with the highest number; None if there is none.

    Raises:
        Temporary: The epoch cannot be read, but it is newer than `own_epoch`, so that lease is lost.
    """
    # The object may be deleted between the listing and the read. Then the listing is made again.
    while epochs := _list_epochs(store):
        try:
            state = _read_epoch(store, max(epochs))
        except Unavailable as error:
            if own_epoch is not None and max(epochs) > own_epoch:
                raise _busy_error(store, None) from error
            raise
        if state is not None:
            return state
    return None


def _read_epoch(store: Store, epoch: int) -> _LeaseState | None:
    if (found := read_if_present(store, _epoch_key(epoch))) is None:
        return None
    try:
        fields = json.loads(found.data)
        return _LeaseState(epoch, found.version or "", fields["owner"], fields["where"], fields["released"], found.data)
    except (ValueError, LookupError, TypeError) as error:
        message = f"{store.uri}/{_epoch_key(epoch)} is no lease of batchjob's; remove it and run again"
        raise CheckFailed(message) from error


def _epoch_key(epoch: int) -> str:
    return f"{_FOLDER}{epoch:010d}.json"


def _list_epochs(store: Store) -> list[int]:
    """List the numbers of the epoch objects; other files, such as a file browser leaves, are ignored."""
    names = (_EPOCH_NAME.fullmatch(info.uri.removeprefix(_FOLDER)) for info in store.list(_FOLDER))
    return [int(name[1]) for name in names if name]


def _encode_epoch(epoch: int, owner: str, heartbeats: int, released: bool = False) -> bytes:
    where = f"host {socket.gethostname()}, process {os.getpid()}"
    fields = {"epoch": epoch, "owner": owner, "where": where, "beats": heartbeats, "released": released}
    return json.dumps(fields).encode()
