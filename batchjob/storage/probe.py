"""Checks of an output before it is used: a store lets one writer win, and every machine sees the same store."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from uuid import uuid4

from batchjob.concurrency import parallel_map
from batchjob.errors import AlreadyExists, InvalidJob, StorageError, Unavailable
from batchjob.storage.store import Store

__all__ = ["check_visibility", "probe_store"]

_RACING_WRITERS = 4


def probe_store(store: Store) -> None:
    """Check that of several writers who create the same object, exactly one wins. Leaves nothing behind.

    Raises:
        InvalidJob: The store lets two writers win, or nothing can be written.
        Unavailable: The store cannot be reached.
    """
    folder = f"_batchjob/probe/{uuid4().hex}"
    twice, race = f"{folder}/twice", f"{folder}/race"
    try:
        _try_create(store, twice, b"first")
        if _try_create(store, twice, b"second"):
            raise _two_winners(store)
        bodies = [f"creator {number}".encode() for number in range(_RACING_WRITERS)]
        wins = list(parallel_map(partial(_try_create, store, race), bodies, threads=len(bodies)))
        if wins.count(True) > 1:
            raise _two_winners(store)
        # The winner's body must be the one that is stored. No winner at all is a lost answer, and no fault.
        if True in wins and store.read(race).data != bodies[wins.index(True)]:
            raise _two_winners(store)
    finally:
        for key in (twice, race):
            with suppress(Unavailable):
                store.delete(key)


def check_visibility(store: Store, marker: tuple[str, str] | None) -> None:
    """Check that this machine sees what the driver wrote.

    Args:
        store: Output, as seen from this machine.
        marker: Key of an object and a word in it; None if driver and worker share a machine.

    Raises:
        InvalidJob: This machine sees another output.
    """
    if marker is None:
        return
    key, word = marker
    with suppress(StorageError):
        if word.encode() in store.read(key).data:
            return
    raise InvalidJob(
        f"output.uri {store.uri}: a worker cannot see there what the driver wrote; give a place that all "
        "machines share, such as s3://bucket/folder/"
    )


def _try_create(store: Store, key: str, body: bytes) -> bool:
    try:
        store.put_if_absent(key, body)
    except AlreadyExists:
        return False
    return True


def _two_winners(store: Store) -> InvalidJob:
    return InvalidJob(
        f"{store.uri}: this store lets two writers create the same object, so results could be lost or doubled; "
        "choose an output on a store with conditional PUT (Amazon S3, GCS, Azure, SeaweedFS, MinIO) or a local disk"
    )
