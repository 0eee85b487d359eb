"""Shard queue: attempts are numbered, known while they are in flight, and dropped one by one."""

from __future__ import annotations

import pyarrow as pa

from batchjob.loader.shard_queue import ShardQueue
from batchjob.types import Batch, ImageRef, Shard, ShardKey


def make_shard(index: int, images: int = 2) -> Shard:
    refs = tuple(ImageRef(n, f"{n}.png", f"{n}.png") for n in range(images))
    return Shard(ShardKey(index, f"{index:016x}", images, 0, 0), refs, pa.table({}))


def take(queue: ShardQueue) -> Shard:
    shard = queue.next_shard()
    assert shard is not None
    return shard


def batch_of(shard: Shard) -> Batch:
    return Batch(shard.key.index, 0, (), None, attempt_number=shard.attempt_number)


def test_attempts_at_the_same_shard_have_different_numbers() -> None:
    queue = ShardQueue.of([make_shard(0), make_shard(0)])
    first, second = take(queue), take(queue)
    assert first.attempt_number != second.attempt_number
    queue.drop(first)
    assert not queue.is_wanted(first)
    assert queue.find_shard(batch_of(first)) is None
    assert queue.is_wanted(second)
    assert queue.find_shard(batch_of(second)) == second
    assert queue.in_flight() == [second]


def test_numbers_are_never_used_again_in_another_queue() -> None:
    numbers = {take(ShardQueue.of([make_shard(0)])).attempt_number for _ in range(9)}
    assert len(numbers) == 9
    assert 0 not in numbers, "0 means that no queue has handed out the shard"


def test_queue_may_be_empty_for_a_while() -> None:
    waiting: list[Shard] = []
    queue = ShardQueue(lambda: waiting.pop() if waiting else None)
    assert queue.next_shard() is None
    waiting.append(make_shard(3))
    assert take(queue).key.index == 3
    assert queue.next_shard() is None


def test_shard_without_images_is_never_in_flight() -> None:
    queue = ShardQueue.of([make_shard(0, images=0), make_shard(1)])
    empty, _ = take(queue), take(queue)
    assert not queue.is_wanted(empty)
    assert [shard.key.index for shard in queue.in_flight()] == [1]
    assert queue.take_empty_shards() == [empty]
    assert queue.take_empty_shards() == []


def test_closed_queue_has_no_shards_and_wants_no_batches() -> None:
    is_open = True
    queue = ShardQueue.of([make_shard(0), make_shard(1)], is_open=lambda: is_open)
    shard = take(queue)
    assert queue.is_wanted(shard)
    is_open = False
    assert queue.next_shard() is None
    assert not queue.is_wanted(shard)
    assert queue.find_shard(batch_of(shard)) is None
