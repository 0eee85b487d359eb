"""Shard queue: attempts are numbered, known while they are in flight, and dropped one by one."""

from __future__ import annotations

from dataclasses import replace

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
    assert not queue.is_wanted(first.attempt_number)
    assert queue.find_shard(batch_of(first)) is None
    assert queue.is_wanted(second.attempt_number)
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
    assert not queue.is_wanted(empty.attempt_number)
    assert [shard.key.index for shard in queue.in_flight()] == [1]
    assert queue.take_empty_shards() == [empty]
    assert queue.take_empty_shards() == []


def test_closed_queue_has_no_shards_and_wants_no_batches() -> None:
    is_open = True
    queue = ShardQueue.of([make_shard(0), make_shard(1)], is_open=lambda: is_open)
    shard = take(queue)
    assert queue.is_wanted(shard.attempt_number)
    is_open = False
    assert queue.next_shard() is None
    assert not queue.is_wanted(shard.attempt_number)
    assert queue.find_shard(batch_of(shard)) is None


def test_closed_queue_takes_no_shard_from_its_source() -> None:
    waiting, is_open = [make_shard(0)], False
    queue = ShardQueue(waiting.pop, is_open=lambda: is_open)
    assert queue.next_shard() is None
    assert len(waiting) == 1, "a shard that was taken and not returned would be lost"


def test_next_shard_keeps_everything_but_the_attempt_number() -> None:
    shard = replace(make_shard(5), attempt_number=99)
    assert replace(take(ShardQueue.of([shard])), attempt_number=99) == shard


def test_attempts_in_flight_are_listed_oldest_first() -> None:
    queue = ShardQueue.of(make_shard(index) for index in (4, 1, 3, 2))
    attempts = [take(queue) for _ in range(4)]
    queue.drop(attempts[1])
    assert [shard.key.index for shard in queue.in_flight()] == [4, 3, 2]


def test_second_drop_of_an_attempt_does_nothing() -> None:
    queue = ShardQueue.of([make_shard(0), make_shard(1)])
    first, second = take(queue), take(queue)
    queue.drop(first)
    queue.drop(first)
    assert queue.in_flight() == [second]


def test_shard_that_no_queue_has_handed_out_is_not_wanted() -> None:
    queue = ShardQueue.of([make_shard(0)])
    take(queue)
    assert not queue.is_wanted(make_shard(0).attempt_number)
    assert queue.find_shard(batch_of(make_shard(0))) is None


def test_attempt_is_wanted_only_by_its_own_queue() -> None:
    shard = take(ShardQueue.of([make_shard(0)]))
    other = ShardQueue.of([make_shard(0)])
    take(other)
    assert not other.is_wanted(shard.attempt_number)
