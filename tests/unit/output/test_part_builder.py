"""PartBuilder: a part that fails ends its attempt once, and delays no other part."""

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
from batchjob.tasks.settings import TaskContext
from batchjob.types import Batch, ErrorRecord, ImageInfo, ImageRef, Shard, ShardKey

MISSING_IMAGES = Batch(0, 0, (ImageInfo(error=ErrorRecord("fetch", "not_found", "it is not there")),) * 2, None)


def make_shard(index: int, rows: int = 4, attempt_number: int | None = None) -> Shard:
    refs = tuple(ImageRef(index * rows + n, f"{n}.png", f"{n}.png") for n in range(rows))
    key = ShardKey(index, f"{index:016x}", rows, 0, 0)
    return Shard(
        key, refs, pa.table({"nothing": [None] * rows}).select([]), index if attempt_number is None else attempt_number
    )


def make_postprocess() -> Postprocess:
    import torch

    return EmbeddingTask().build_postprocess(torch.zeros(2, 3), TaskContext(None, Reader(), Path()))


def start_builder(
    tmp_path: Path, scratch_folder: Path, results: list[tuple[ShardKey, ShardResult | BatchjobError]]
) -> PartBuilder:
    return PartBuilder(
        store=open_store(str(tmp_path / "out")),
        scratch_folder=scratch_folder,
        metadata=PartMetadata(
            "plan", "fingerprint", "model", "net@1", "eager", build_row_schema([], make_postprocess().fields)
        ),
        postprocess=make_postprocess(),
        get_geometry=lambda info: ImageGeometry(1, 1, 1, 1),
        raise_if_discarded=lambda: None,
        on_result=lambda key, result: results.append((key, result)),
    )


def test_unwritable_scratch_folder_fails_each_shard_once(tmp_path: Path) -> None:
    results: list[tuple[ShardKey, ShardResult | BatchjobError]] = []
    builder = start_builder(tmp_path, tmp_path / "no such folder", results)
    for index in (0, 1):
        for last in (False, True):
            builder.add(make_shard(index), MISSING_IMAGES, None, forward_seconds=0.0, is_last=last)
    builder.add_empty_shard(make_shard(2, 0))
    builder.close()
    assert [key.index for key, result in results if isinstance(result, BatchjobError)] == [0, 1, 2]


def test_full_disk_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    """A limit on the file size stands in for a full disk: the kernel refuses both at the same place."""
    results: list[tuple[ShardKey, ShardResult | BatchjobError]] = []
    builder = start_builder(tmp_path, tmp_path, results)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        builder.add(make_shard(0, rows=2), MISSING_IMAGES, None, forward_seconds=0.0, is_last=True)
        builder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    ((_, error),) = results
    assert isinstance(error, AttemptFailed)
    assert error.message == (
        f"{tmp_path}: the disk is full (File too large), so no part can be made there; make room, set TMPDIR to a "
        "folder on another disk, or lower runtime.shard_size, then run again"
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_attempt_that_failed_before_the_loader_died_is_reported_once(tmp_path: Path) -> None:
    results: list[tuple[ShardKey, ShardResult | BatchjobError]] = []
    builder = start_builder(tmp_path, tmp_path, results)
    builder.fail_attempt(make_shard(0), Unavailable("no network"))
    builder.add(make_shard(1), MISSING_IMAGES, None, forward_seconds=0.0, is_last=False)
    for index in range(3):
        builder.fail_attempt(make_shard(index), AttemptFailed("the loader died"))
    builder.close()
    assert all(builder.has_failed(attempt) for attempt in range(3))
    failed = [(key, result) for key, result in results if isinstance(result, BatchjobError)]
    assert [(key.index, error.message) for key, error in failed] == [
        (0, "no network"),
        (1, "the loader died"),
        (2, "the loader died"),
    ]
    assert not list(tmp_path.glob("*.parquet"))


def test_second_attempt_ignores_late_batches_of_the_first(tmp_path: Path) -> None:
    results: list[tuple[ShardKey, ShardResult | BatchjobError]] = []
    builder = start_builder(tmp_path, tmp_path, results)
    first, second = make_shard(0, attempt_number=0), make_shard(0, attempt_number=1)
    builder.fail_attempt(first, Unavailable("no network"))
    late = replace(MISSING_IMAGES, start=2)
    builder.add(second, MISSING_IMAGES, None, forward_seconds=0.0, is_last=False)
    builder.add(first, late, None, forward_seconds=0.0, is_last=True)
    builder.add(second, late, None, forward_seconds=0.0, is_last=True)
    builder.close()
    assert [type(result) for _, result in results] == [Unavailable, ShardResult]
    assert not list(tmp_path.glob("*.parquet"))
