"""Whether a worker's machine sees the same output as the driver's."""

from __future__ import annotations

from contextlib import suppress

from batchjob.errors import InvalidJob, StorageError
from batchjob.storage import Store

__all__ = ["see_witness"]


def see_witness(store: Store, witness: tuple[str, str] | None) -> None:
    """Read back what the driver wrote.

    Args:
        store: the output, as seen from here.
        witness: a key and a word in it; None where driver and worker share a machine.

    Raises:
        InvalidJob: this machine sees another output.
    """
    if witness is None:
        return
    key, word = witness
    with suppress(StorageError):
        if word.encode() in store.read(key).data:
            return
    raise InvalidJob(
        f"output.uri {store.uri}: a worker cannot see there what the driver wrote; give a place that all "
        "machines share, such as s3://bucket/folder/"
    )
