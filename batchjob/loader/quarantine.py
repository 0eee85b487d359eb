"""Images that kill the process which decodes or predicts them, recorded beside the plan so that none is retried."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from batchjob.concurrency import parallel_map
from batchjob.errors import NotFound
from batchjob.storage.store import Store, put_or_get
from batchjob.types import ErrorRecord, ImageInfo, overlaps

__all__ = ["Quarantine"]

_MAX_REVISIONS = 64  # shards of a retry whose revision is kept: more than a worker has at the same time


class Quarantine:
    """Deadly images by their position in the plan, and ranges of images of which one may be deadly.

    Records are objects in the plan's folder. They are listed once, and again for a shard that has been tried before:
    only then can another worker have recorded some of its images in the meantime. A retry starts without records: what
    was found for one revision of a part says nothing about the next one.

    Example: image 5 kills a decoder and is recorded as `quarantine/000000000005.json`; in a retry that makes revision
    1 of its part, as `quarantine/000000000005.r1.json`. Images 24 to 27, of which one kills the model's process, are
    recorded as `quarantine/000000000024-000000000028.json`.

    Args:
        store: Store of the output; None keeps records only as long as this object.
        folder: Folder of the plan, with a slash at the end.
    """

    def __init__(self, store: Store | None = None, folder: str = "") -> None:
        self._store, self._folder = store, f"{folder}quarantine/"
        self._listed: list[str] | None = None
        self._known: dict[int, ImageInfo] = {}
        self._suspects: set[range] = set()
        self._revisions: dict[range, int] = {}  # of the latest shards that are retried

    def load(self, positions: Sequence[int], revision: int = 0, refresh: bool = False) -> None:
        """Read the records about the images of a shard.

        Args:
            positions: Positions of the images, ascending.
            revision: Revision of the part that will be made of them.
            refresh: List again, because the shard has been tried before, here or in another worker.

        Raises:
            Unavailable: The store cannot be reached.
        """
        if self._store is None or not positions:
            return
        shard, suffix = range(positions[0], positions[-1] + 1), _suffix(revision)
        if revision:
            latest = list(self._revisions.items())[-_MAX_REVISIONS:]
            self._revisions = {**dict(latest), shard: revision}
        if self._listed is None or refresh:
            self._listed = [info.uri for info in self._store.list(self._folder)]
        names = [name.removesuffix(suffix) for name in self._listed if name.endswith(suffix)]
        self._suspects.update(suspects for suspects in map(_parse_range, names) if overlaps(suspects, shard))
        recorded = map(_parse_position, names)
        unknown = [position for position in recorded if position in shard and position not in self._known]
        for position, info in zip(unknown, parallel_map(self._read, unknown), strict=True):
            if info is not None:
                self._known[position] = info

    def errors_by_row(self, positions: Iterable[int]) -> dict[int, ImageInfo]:
        """Return the known deadly images among these, by their index. Sends no request.

        Example: if image 40 is deadly, `errors_by_row([39, 40, 41])` is `{1: info}`.
        """
        if not self._known:
            return {}
        return {row: self._known[position] for row, position in enumerate(positions) if position in self._known}

    def find(self, position: int) -> ImageInfo | None:
        """Return the record of an image, read from the store if it is not known here. Raises Unavailable."""
        info = self._known.get(position) or self._read(position)
        if info is not None:
            self._known[position] = info
        return info

    def record(self, position: int, info: ImageInfo) -> ImageInfo:
        """Record a deadly image for all workers and later runs; return the first record that any worker wrote.

        Raises:
            Unavailable: The store cannot be reached.
        """
        if self._store is not None:
            body = json.dumps(_to_json(position, info), indent=1).encode()
            info = _from_json(put_or_get(self._store, self._key(position), body)) or info
        self._known[position] = info
        return info

    def record_suspects(self, positions: range, reason: str) -> None:
        """Record for all workers and later runs that one of these images may kill the process that predicts it.

        Args:
            positions: Positions of the images.
            reason: One sentence.

        Raises:
            Unavailable: The store cannot be reached.
        """
        self._suspects.add(positions)
        if self._store is not None:
            body = {"first": positions.start, "after": positions.stop, "message": reason}
            name = f"{positions.start:012d}-{positions.stop:012d}{self._suffix_of(positions.start)}"
            put_or_get(self._store, f"{self._folder}{name}", json.dumps(body, indent=1).encode())

    def has_suspect(self, positions: range) -> bool:
        """Return True if one of these images may be deadly, so that they are predicted one by one. Sends no request."""
        # A copy, because other threads add to the set.
        return any(overlaps(positions, suspects) for suspects in tuple(self._suspects))

    def _read(self, position: int) -> ImageInfo | None:
        with suppress(NotFound):
            return _from_json(self._store.read(self._key(position)).data) if self._store is not None else None
        return None

    def _key(self, position: int) -> str:
        return f"{self._folder}{position:012d}{self._suffix_of(position)}"

    def _suffix_of(self, position: int) -> str:
        return _suffix(next((revision for shard, revision in self._revisions.items() if position in shard), 0))


def _suffix(revision: int) -> str:
    """Return the end of the names of records about one revision of a part."""
    return f".r{revision}.json" if revision else ".json"


def _parse_position(key: str) -> int:
    """Parse the position from the key of an image's record; -1 for other keys."""
    name = key.rpartition("/")[2]
    return int(name) if name.isdecimal() else -1


def _parse_range(key: str) -> range:
    """Parse the range from the key of a record of suspects; an empty range for other keys."""
    first, _, after = key.rpartition("/")[2].partition("-")
    return range(int(first), int(after)) if first.isdecimal() and after.isdecimal() else range(0)


def _to_json(position: int, info: ImageInfo) -> dict[str, Any]:
    assert info.error is not None, "only errors are recorded"
    return {"position": position, "etag": info.etag, **asdict(info.error)}


def _from_json(data: bytes) -> ImageInfo | None:
    """Parse a record; None if the object is not one of ours."""
    try:
        record = json.loads(data)
        return ImageInfo(record["etag"], error=ErrorRecord(record["stage"], record["type"], record["message"]))
    except (ValueError, KeyError, TypeError):
        return None
