"""Images that kill the process which decodes them, remembered beside the plan so that nobody meets them again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from batchjob.errors import NotFound
from batchjob.parallel import side_by_side
from batchjob.records import Fault, ImageFacts
from batchjob.storage import Store, settle

__all__ = ["Quarantine"]


class Quarantine:
    """What is known of deadly images, by their position in the plan.

    Args:
        store: of the output; without one, it lasts as long as this object.
        folder: of the plan, ends with `/`.
    """

    def __init__(self, store: Store | None = None, folder: str = "") -> None:
        self._store, self._folder = store, f"{folder}quarantine/"
        self._known: dict[int, ImageFacts] = {}

    def learn(self, positions: range) -> None:
        """Read what others have found among these images. Raises Unavailable."""
        if self._store is None:
            return
        listed = (_position(stat.uri) for stat in self._store.list(self._folder))
        unknown = [position for position in listed if position in positions and position not in self._known]
        for position, facts in zip(unknown, side_by_side(self._read, unknown), strict=True):
            if facts is not None:
                self._known[position] = facts

    def among(self, positions: Iterable[int]) -> dict[int, ImageFacts]:
        """Which of these are known here, by their place among them. Asks nobody."""
        if not self._known:
            return {}
        return {row: self._known[position] for row, position in enumerate(positions) if position in self._known}

    def find(self, position: int) -> ImageFacts | None:
        """What anybody knows of this image. Raises Unavailable."""
        facts = self._known.get(position) or self._read(position)
        if facts is not None:
            self._known[position] = facts
        return facts

    def remember(self, position: int, facts: ImageFacts) -> ImageFacts:
        """For all workers and all later runs of this plan; the first verdict stands. Raises Unavailable."""
        if self._store is not None:
            body = json.dumps(_record(position, facts), indent=1).encode()
            facts = _facts(settle(self._store, self._key(position), body)) or facts
        self._known[position] = facts
        return facts

    def _read(self, position: int) -> ImageFacts | None:
        with suppress(NotFound):
            return _facts(self._store.read(self._key(position)).data) if self._store is not None else None
        return None

    def _key(self, position: int) -> str:
        return f"{self._folder}{position:012d}.json"


def _position(key: str) -> int:
    """That of a record, -1 of what is none."""
    name = key.rpartition("/")[2].removesuffix(".json")
    return int(name) if name.isdecimal() else -1


def _record(position: int, facts: ImageFacts) -> dict[str, Any]:
    assert facts.fault is not None, "only faults are remembered"
    fault = facts.fault
    return {
        "position": position,
        "etag": facts.etag,
        "stage": fault.stage,
        "type": fault.type,
        "message": fault.message,
    }


def _facts(data: bytes) -> ImageFacts | None:
    """None where it is no record of ours."""
    try:
        record = json.loads(data)
        return ImageFacts(record["etag"], fault=Fault(record["stage"], record["type"], record["message"]))
    except (ValueError, KeyError, TypeError):
        return None
