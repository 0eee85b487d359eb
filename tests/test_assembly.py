"""A part that cannot even be begun fails its attempt, once, and holds up nothing."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from batchjob.errors import AttemptFailed, BatchjobError, Unavailable
from batchjob.output.part_builder import PartBuilder, PartMetadata
from batchjob.output.provenance import ShardResult
from batchjob.output.schema import build_row_schema
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.postprocess import Postprocess
from batchjob.types import Batch, ErrorRecord, ImageInfo, ImageRef, Shard, ShardKey

GONE = Batch(0, 0, (ImageInfo(error=ErrorRecord("fetch", "not_found", "it is not there")),) * 2, None)


def shard(index: int, rows: int = 4, take: int | None = None) -> Shard:
    refs = tuple(ImageRef(index * rows + n, f"{n}.png", f"{n}.png") for n in range(rows))
    key = ShardKey(index, f"{index:016x}", rows, 0, 0)
    return Shard(key, refs, pa.table({"nothing": [None] * rows}).select([]), index if take is None else take)


def post() -> Postprocess:
    import torch

    return EmbeddingTask().build_postprocess(torch.zeros(2, 3), None, Reader(), Path())


def assembly(tmp_path: Path, spool: Path, told: list[tuple[ShardKey, ShardResult | BatchjobError]]) -> PartBuilder:
    return PartBuilder(
        store=open_store(str(tmp_path / "out")),
        scratch_folder=spool,
        metadata=PartMetadata("plan", "fingerprint", "model", "net@1", "eager", build_row_schema([], post().fields)),
        postprocess=post(),
        get_geometry=lambda facts: ImageGeometry(1, 1, 1, 1),
        raise_if_discarded=lambda: None,
        on_result=lambda key, result: told.append((key, result)),
    )


def test_a_spool_that_cannot_be_written_fails_each_shard_once(tmp_path: Path) -> None:
    told: list[tuple[ShardKey, ShardResult | BatchjobError]] = []
    making = assembly(tmp_path, tmp_path / "no such folder", told)
    for index in (0, 1):
        for last in (False, True):
            making.add(shard(index), GONE, None, forward_seconds=0.0, is_last=last)
    making.add_empty_shard(shard(2, 0))
    making.close()
    assert [key.index for key, result in told if isinstance(result, BatchjobError)] == [0, 1, 2]


def test_a_spool_without_room_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit on the size of a file stands for the disk's end: the kernel refuses both in the same place."""
    told: list[tuple[ShardKey, ShardResult | BatchjobError]] = []
    making = assembly(tmp_path, tmp_path, told)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        making.add(shard(0, rows=2), GONE, None, forward_seconds=0.0, is_last=True)
        making.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    ((_, error),) = told
    assert isinstance(error, AttemptFailed)
    assert error.message == (
        f"{tmp_path}: the disk is full (File too large), so no part can be made there; make room, set TMPDIR to a "
        "folder on another disk, or lower runtime.shard_size, then run again"
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_failed_before_is_not_told_twice_when_the_loader_dies(tmp_path: Path) -> None:
    told: list[tuple[ShardKey, ShardResult | BatchjobError]] = []
    making = assembly(tmp_path, tmp_path, told)
    making.fail_attempt(shard(0), Unavailable("no network"))
    making.add(shard(1), GONE, None, forward_seconds=0.0, is_last=False)
    for index in range(3):
        making.fail_attempt(shard(index), AttemptFailed("the loader died"))
    making.close()
    assert all(making.has_failed(take) for take in range(3))
    failed = [(key, result) for key, result in told if isinstance(result, BatchjobError)]
    assert [(key.index, error.message) for key, error in failed] == [
        (0, "no network"),
        (1, "the loader died"),
        (2, "the loader died"),
    ]
    assert not list(tmp_path.glob("*.parquet"))


def test_a_shard_that_is_taken_again_is_not_held_up_by_what_is_left_of_its_first_attempt(tmp_path: Path) -> None:
    told: list[tuple[ShardKey, ShardResult | BatchjobError]] = []
    making = assembly(tmp_path, tmp_path, told)
    first, second = shard(0, take=0), shard(0, take=1)
    making.fail_attempt(first, Unavailable("no network"))
    late = replace(GONE, start=2)
    making.add(second, GONE, None, forward_seconds=0.0, is_last=False)
    making.add(first, late, None, forward_seconds=0.0, is_last=True)
    making.add(second, late, None, forward_seconds=0.0, is_last=True)
    making.close()
    assert [type(result) for _, result in told] == [Unavailable, ShardResult]
    assert not list(tmp_path.glob("*.parquet"))
