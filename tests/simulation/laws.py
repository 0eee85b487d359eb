"""What must hold of an output after every write, read from its bytes alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from memory_store import Call

from batchjob.storage.objects import ObjectData

__all__ = ["Broken", "Laws", "rows_of"]

_PLAN = re.compile(r"_batchjob/plans/(\d{4})/(head\.json|discarded|schema\.arrow|chunk-(\d{7})\.arrow)")
_PART = re.compile(r"predictions/part-(\d{7})-([0-9a-f]{16})\.parquet")
_LEASE = re.compile(r"_batchjob/lease/(\d{10})\.json")


class Broken(AssertionError):
    """A law does not hold."""


@dataclass
class _Plan:
    """What has been seen of one plan."""

    id: str = ""
    size: int = 0
    buried: bool = False
    chunks: dict[int, dict[str, Any]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    shards: dict[str, tuple[int, int]] = field(default_factory=dict)  # key of the part → first position, rows


class Laws:
    """Looks at each object that is written or deleted.

    Args:
        images: that a plan must hold, in their order.

    Attributes:
        late: parts that came when their plan was discarded already.
    """

    def __init__(self, images: list[str]) -> None:
        self._images = images
        self._known: dict[str, ObjectData] = {}
        self._plans: dict[int, _Plan] = {}
        self._parts: dict[str, tuple[_Plan, str]] = {}  # every part ever, with its attempt
        self.late: set[str] = set()
        self._owners: dict[str, str] = {}
        self._calls: Sequence[Call] = ()
        self.commits = self.replacements = 0

    @property
    def in_force(self) -> _Plan | None:
        """The plan that is not buried."""
        return next((known for known in self._plans.values() if not known.buried), None)

    @property
    def discards(self) -> int:
        """Plans that were discarded."""
        return sum(known.buried for known in self._plans.values())

    @property
    def nothing_stands(self) -> bool:
        """No plan is in force, and there is neither `_SUCCESS` nor any part."""
        return self.in_force is None and not any(key.startswith(("predictions/", "_SUCCESS")) for key in self._known)

    @property
    def strays(self) -> set[str]:
        """Parts of discarded plans that are there."""
        return {key for key, (owner, _) in self._parts.items() if owner.buried and key in self._known}

    def hold(self, objects: Mapping[str, ObjectData], calls: Sequence[Call] = ()) -> None:
        """Raises Broken where they do not.

        Args:
            objects: all there are.
            calls: that whoever wrote last has made, its write the last of them.
        """
        before, self._calls = self._known, calls
        if objects.keys() == before.keys() and all(before[key] is blob for key, blob in objects.items()):
            return
        self._known = dict(objects)
        for key in before.keys() - objects.keys():
            self._deleted(key)
        for key in sorted(key for key, blob in objects.items() if before.get(key) is not blob):
            self._written(key, objects[key], before.get(key))
        self._success(objects, before.get("_SUCCESS") is not objects.get("_SUCCESS"))

    def _deleted(self, key: str) -> None:
        self._owners.pop(key, None)  # an epoch of long ago: who comes late and makes it anew must see that, and leave
        if key == "_SUCCESS":
            verb = self._calls[-1].method if self._calls else ""
            _must(verb == "delete_if_match", "_SUCCESS was deleted, whosever it had become")
        elif key in self._parts:
            _must(self._parts[key][0].buried, f"{key} of a plan in force was deleted")
        else:
            _must(not _PLAN.fullmatch(key), f"{key} was deleted")

    def _written(self, key: str, blob: ObjectData, before: ObjectData | None) -> None:
        if match := _PLAN.fullmatch(key):
            _must(before is None, f"{key} was written twice")
            self._planned(int(match[1]), match[2], blob)
        elif match := _PART.fullmatch(key):
            if before is not None:
                self._replaced(key, before, blob)
            self._committed(key, match[2], blob)
        elif _LEASE.fullmatch(key):
            owner = json.loads(blob.data)["owner"]
            _must(self._owners.setdefault(key, owner) == owner, f"{key} passed from one owner to another")
        else:
            _must(not key.startswith("predictions/"), f"{key} is no part")

    # -- plan ----------------------------------------------------------------------------------------------------------

    def _planned(self, number: int, name: str, blob: ObjectData) -> None:
        _must(all(self._plans[n].buried for n in self._plans if n < number), f"plan {number} beside one in force")
        known = self._plans.setdefault(number, _Plan())
        if name == "head.json":
            facts = json.loads(blob.data)
            known.id, known.size = facts["plan"], facts["shard_size"]
        elif name == "discarded":
            known.buried = True
        elif name.startswith("chunk-"):
            self._chunk(known, blob)

    def _chunk(self, known: _Plan, blob: ObjectData) -> None:
        with pa.ipc.open_stream(blob.data) as stream:
            table = stream.read_all()
        facts = json.loads(table.schema.metadata[b"batchjob.chunk"])
        number, start = facts["number"], facts["start"]
        _must(facts["plan"] == known.id, f"chunk {number} of another plan")
        known.chunks[number], known.digests[number] = facts, hashlib.sha256(blob.data).hexdigest()
        _must(sorted(known.chunks) == list(range(len(known.chunks))), "a chunk before its predecessor")
        for one, next_one in pairwise(known.chunks[n] for n in sorted(known.chunks)):
            _must(one["cursor"]["rows"] == next_one["start"] and not one["last"], "chunks do not follow each other")
            _must(next_one["previous"] == known.digests[one["number"]], "a chunk does not know its predecessor")
        end = facts["cursor"]["rows"]
        _must(table.column("uri").to_pylist() == self._images[start:end], f"chunk {number} holds other images")
        _must(not facts["last"] or end == len(self._images), "the plan ends before its input")
        for shard, rows in facts["shards"]:
            key = f"predictions/part-{start // known.size:07d}-{shard}.parquet"
            _must(key not in known.shards, f"{key} is planned twice")
            known.shards[key] = start, rows
            start += rows
        _must(start == end, f"shards of chunk {number} do not add up")

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _committed(self, key: str, shard: str, blob: ObjectData) -> None:
        made, positions, uris = rows_of(blob)
        owner = next((known for known in self._plans.values() if known.id == made["plan"]), None)
        _must(owner is not None and key in owner.shards, f"{key} belongs to no plan")
        assert owner is not None
        start, count = owner.shards[key]
        _must(made["shard"] == shard and made["rows"] == count, f"{key}: its footer is another shard's")
        _must(positions == list(range(start, start + count)), f"{key}: holds positions {positions}")
        _must(uris == self._images[start : start + count], f"{key}: holds {uris}")
        attempt = made["attempt"]
        if owner.buried:
            self._must_have_looked(key)
            self.late |= {key} - self._parts.keys()
        elif made["revision"] == 0:
            _must(self._parts.get(key, (owner, attempt))[1] == attempt, f"{key} was committed twice")
            self.commits += 1
        self._parts[key] = owner, attempt

    def _replaced(self, key: str, before: ObjectData, blob: ObjectData) -> None:
        """By the next revision, which has the same rows, but for those that held an error."""
        old, new = whole(before), whole(blob)
        _must(new[0]["revision"] == old[0]["revision"] + 1, f"{key} was replaced by another than its next revision")
        good = [row for row in old[1] if row["error_stage"] is None]
        _must(all(row in new[1] for row in good), f"{key}: a row that worked was lost")
        _must(len(good) < len(old[1]), f"{key} was replaced, though all of its rows worked")
        if "_SUCCESS" in self._known:
            looked = [call.key for call in self._calls[-3:-1]]
            _must("_SUCCESS" in looked, f"{key} was replaced under _SUCCESS, without a look")
        self.replacements += 1

    def _success(self, objects: Mapping[str, ObjectData], fresh: bool) -> None:
        """Where `_SUCCESS` stands, all it lists is there, and is the whole plan; when it is put, nothing else is."""
        if "_SUCCESS" not in objects:
            return
        facts = json.loads(objects["_SUCCESS"].data)
        known = next(known for known in self._plans.values() if known.id == facts["plan"])
        there = {key for key in objects if key.startswith("predictions/")}
        listed = {part["name"]: part for part in facts["parts"]}
        _must(bool(known.chunks) and known.chunks[len(known.chunks) - 1]["last"], "_SUCCESS before the plan's end")
        _must(listed.keys() == known.shards.keys(), "_SUCCESS lists other parts than the plan")
        bad = sum(part["failed"] for part in listed.values())
        _must(bad <= sum("bad" in name for name in self._images), "_SUCCESS says that a good image failed")
        counts = {"planned": len(self._images), "predicted": len(self._images) - bad, "failed": bad}
        _must(facts["counts"] == counts, f"_SUCCESS says {facts['counts']}")
        if known.buried:  # what was there when the tombstone came goes by and by
            if fresh:
                self._must_have_looked("_SUCCESS")
            return
        _must(listed.keys() <= there, "_SUCCESS lists parts that are not there")
        other = {name for name, part in listed.items() if part["etag"] != objects[name].etag}
        # A worker that was late with a retry may come after all, see `_replaced`; the next run sees to it.
        _must(all(rows_of(objects[name])[0]["revision"] for name in other), "_SUCCESS has other tags")

    def _must_have_looked(self, key: str) -> None:
        """The last call before a write for a plan that is buried by now was the look at its tombstone."""
        looked = self._calls[-2] if len(self._calls) > 1 else None
        _must(looked is not None and looked.key.endswith("/discarded"), f"{key} of a discarded plan, without a look")

    def complete(self, mended: bool = False) -> None:
        """The whole plan is there, every position once, nothing else, and `_SUCCESS` says so. Raises Broken.

        Args:
            mended: no row holds an error any more.
        """
        known, objects = self.in_force, self._known
        _must(known is not None and "_SUCCESS" in objects, "no _SUCCESS at the end")
        assert known is not None
        facts = json.loads(objects["_SUCCESS"].data)
        _must(facts["plan"] == known.id, "_SUCCESS is another plan's")
        tags = {part["name"]: part["etag"] for part in facts["parts"]}
        _must(all(objects[name].etag == tag for name, tag in tags.items()), "_SUCCESS has other tags at the end")
        _must(not mended or not facts["counts"]["failed"], "an error row was not retried")
        there = sorted(key for key in objects if key.startswith("predictions/"))
        found = [position for key in there for position in rows_of(objects[key])[1]]
        missing, twice = set(range(len(self._images))) - set(found), len(found) - len(set(found))
        _must(not missing and not twice, f"missing: {sorted(missing)}, twice: {twice} of {found}")
        _must(there == sorted(known.shards), "other parts than the plan's")


def rows_of(blob: ObjectData) -> tuple[dict[str, Any], list[int], list[str]]:
    """A part's footer, positions and URIs."""
    with pq.ParquetFile(pa.BufferReader(blob.data)) as file:
        table = file.read(columns=["position", "uri"], use_threads=False)
        made = json.loads(file.metadata.metadata[b"batchjob"])
    return made, table.column("position").to_pylist(), table.column("uri").to_pylist()


def whole(blob: ObjectData) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A part's footer and all its rows."""
    with pq.ParquetFile(pa.BufferReader(blob.data)) as file:
        found: list[dict[str, Any]] = file.read(use_threads=False).to_pylist()
        return json.loads(file.metadata.metadata[b"batchjob"]), found


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)
