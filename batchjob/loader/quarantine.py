"""Images that kill the process which decodes or predicts them, remembered beside the plan: nobody meets them again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from batchjob.concurrency import parallel_map
from batchjob.errors import NotFound
from batchjob.storage.store import Store, put_or_get
from batchjob.types import ErrorRecord, ImageInfo, overlaps

__all__ = ["Quarantine"]

_IN_HAND = 64  # shards: more than a worker has at once


class Quarantine:
    """What is known of deadly images, by their position in the plan, and of runs of images among which one may be.

    It is listed once, and anew for a shard that somebody has tried before: no other could have found out anything about
    its images since. A retry begins with a clean slate: what was found for one revision of a part says nothing for the
    next.

    Args:
        store: of the output; without one, it lasts as long as this object.
        folder: of the plan, ends with `/`.
    """

    def __init__(self, store: Store | None = None, folder: str = "") -> None:
        self._store, self._folder = store, f"{folder}quarantine/"
        self._listed: list[str] | None = None
        self._known: dict[int, ImageInfo] = {}
        self._runs: set[range] = set()
        self._revisions: dict[range, int] = {}  # of the parts that images are retried for, those of the last shards

    def load(self, positions: Sequence[int], revision: int = 0, refresh: bool = False) -> None:
        """Read what others have found among the images of a shard. Raises Unavailable.

        Args:
            images: their positions.
            revision: of the part that is to be made of them.
            again: it has been tried before, since this worker began or beside it.
        """
        if self._store is None or not positions:
            return
        positions, ending = range(positions[0], positions[-1] + 1), _ending(revision)
        if revision:
            latest = list(self._revisions.items())[-_IN_HAND:]
            self._revisions = {**dict(latest), positions: revision}
        if self._listed is None or refresh:
            self._listed = [stat.uri for stat in self._store.list(self._folder)]
        names = [name.removesuffix(ending) for name in self._listed if name.endswith(ending)]
        self._runs.update(run for run in map(_run, names) if overlaps(run, positions))
        found = map(_position, names)
        unknown = [position for position in found if position in positions and position not in self._known]
        for position, facts in zip(unknown, parallel_map(self._read, unknown), strict=True):
            if facts is not None:
                self._known[position] = facts

    def errors_by_row(self, positions: Iterable[int]) -> dict[int, ImageInfo]:
        """Which of these are known here, by their place among them. Asks nobody."""
        if not self._known:
            return {}
        return {row: self._known[position] for row, position in enumerate(positions) if position in self._known}

    def find(self, position: int) -> ImageInfo | None:
        """What anybody knows of this image. Raises Unavailable."""
        facts = self._known.get(position) or self._read(position)
        if facts is not None:
            self._known[position] = facts
        return facts

    def record(self, position: int, facts: ImageInfo) -> ImageInfo:
        """For all workers and all later runs of this plan; the first verdict stands. Raises Unavailable."""
        if self._store is not None:
            body = json.dumps(_record(position, facts), indent=1).encode()
            facts = _facts(put_or_get(self._store, self._key(position), body)) or facts
        self._known[position] = facts
        return facts

    def record_suspects(self, positions: range, reason: str) -> None:
        """One of these images may be deadly to who predicts it, for all workers and all later runs. Raises Unavailable.

        Args:
            run: their positions.
            why: one sentence.
        """
        self._runs.add(positions)
        if self._store is not None:
            body = json.dumps({"first": positions.start, "after": positions.stop, "message": reason}, indent=1).encode()
            put_or_get(
                self._store,
                f"{self._folder}{positions.start:012d}-{positions.stop:012d}{self._ending(positions.start)}",
                body,
            )

    def has_suspect(self, positions: range) -> bool:
        """Whether one of these may be deadly, so that they are to be predicted one by one. Asks nobody."""
        return any(overlaps(positions, suspect) for suspect in tuple(self._runs))  # other threads add to them

    def _read(self, position: int) -> ImageInfo | None:
        with suppress(NotFound):
            return _facts(self._store.read(self._key(position)).data) if self._store is not None else None
        return None

    def _key(self, position: int) -> str:
        return f"{self._folder}{position:012d}{self._ending(position)}"

    def _ending(self, position: int) -> str:
        return _ending(next((made for run, made in self._revisions.items() if position in run), 0))


def _ending(revision: int) -> str:
    """Of the names of what was found for one revision of a part."""
    return f".r{revision}.json" if revision else ".json"


def _position(key: str) -> int:
    """That of a record of one image, -1 of what is none."""
    name = key.rpartition("/")[2]
    return int(name) if name.isdecimal() else -1


def _run(key: str) -> range:
    """That of a record of several, empty of what is none."""
    first, _, after = key.rpartition("/")[2].partition("-")
    return range(int(first), int(after)) if first.isdecimal() and after.isdecimal() else range(0)


def _record(position: int, facts: ImageInfo) -> dict[str, Any]:
    assert facts.error is not None, "only faults are remembered"
    fault = facts.error
    return {
        "position": position,
        "etag": facts.etag,
        "stage": fault.stage,
        "type": fault.type,
        "message": fault.message,
    }


def _facts(data: bytes) -> ImageInfo | None:
    """None where it is no record of ours."""
    try:
        record = json.loads(data)
        return ImageInfo(record["etag"], error=ErrorRecord(record["stage"], record["type"], record["message"]))
    except (ValueError, KeyError, TypeError):
        return None
