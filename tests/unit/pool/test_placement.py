"""Placement: workers get enough shards, in equal numbers; a suspect is alone with its worker."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjob.driver.scheduler import Scheduler
from batchjob.pool.placement import Placement
from batchjob.types import ShardKey


def make_keys(count: int, rows: int = 1000) -> list[ShardKey]:
    return [ShardKey(index, f"id-{index}", rows, 0, rows * index) for index in range(count)]


def make_placement(*workers: str, min_workers: int = 1, images_in_flight: int = 0) -> Placement:
    placement = Placement(min_workers)
    for worker in workers:
        placement.add_worker(worker, images_in_flight)
    return placement


def submit(placement: Placement, keys: list[ShardKey]) -> list[tuple[str, int]]:
    """Submit shards as long as there are free slots; return worker and shard index of each assignment."""
    while placement.free_slots() > 0 and keys:
        placement.submit(keys.pop(0), 0)
    return take(placement)


def take(placement: Placement) -> list[tuple[str, int]]:
    return [(assignment.worker, assignment.key.index) for assignment in placement.take_assignments()]


def test_worker_holds_two_shards_in_line_beside_one_at_work_and_one_being_committed() -> None:
    placement, keys = make_placement("a"), make_keys(9)
    assert placement.free_slots() == 4
    assert submit(placement, keys) == [("a", 0), ("a", 1), ("a", 2), ("a", 3)]
    assert placement.free_slots() == 0
    placement.finish("a", make_keys(1)[0])
    assert submit(placement, keys) == [("a", 4)]


@pytest.mark.parametrize(
    ("rows", "images_in_flight", "assigned"), [(64, 512, 16), (8192, 4096, 4), (64, 0, 4), (500, 1024, 5)]
)
def test_small_shards_are_assigned_until_the_loader_is_busy(rows: int, images_in_flight: int, assigned: int) -> None:
    """Besides the images that the loader keeps in flight, as many wait or are on their way into the output."""
    placement = make_placement("a", images_in_flight=images_in_flight)
    assert len(submit(placement, make_keys(99, rows))) == assigned


def test_workers_get_equal_shares() -> None:
    assignments = submit(make_placement("a", "b", "c"), make_keys(9))
    assert Counter(worker for worker, _ in assignments) == {"a": 3, "b": 3, "c": 3}


def test_no_shard_is_assigned_before_the_minimum_of_workers_is_ready() -> None:
    placement = make_placement("a", "b", min_workers=3)
    assert (placement.free_slots(), placement.ready_workers, placement.required_workers) == (0, 2, 3)
    placement.add_worker("c")
    assert placement.free_slots() == 12


def test_lost_worker_does_not_stop_the_others() -> None:
    placement = make_placement("a", "b", min_workers=2)
    placement.remove_worker("a")
    assert (placement.free_slots(), placement.ready_workers, placement.required_workers) == (4, 1, 1)


def test_shards_of_a_lost_worker_are_returned_oldest_first() -> None:
    placement = make_placement("a")
    submit(placement, make_keys(4))
    placement.finish("a", make_keys(1)[0])
    assert [key.index for key in placement.remove_worker("a")] == [1, 2, 3]
    assert placement.remove_worker("a") == []


def test_suspect_is_alone_with_its_worker() -> None:
    placement, keys = make_placement("a"), make_keys(9)
    submit(placement, keys)
    keys = placement.remove_worker("a")[:2] + keys
    placement.add_worker("a")
    assert submit(placement, keys) == [("a", 0)]
    placement.finish("a", make_keys(1)[0])
    assert submit(placement, keys) == [("a", 1)]
    placement.fail("a", make_keys(2)[1], suspect=False)  # the network: the shard stays a suspect from before
    keys.insert(0, make_keys(2)[1])
    assert submit(placement, keys) == [("a", 1)]
    placement.finish("a", make_keys(2)[1])
    assert submit(placement, keys) == [("a", index) for index in range(4, 8)]


def test_suspect_waits_for_an_idle_worker_while_the_others_go_on() -> None:
    placement, keys = make_placement("a", "b"), make_keys(99)
    assignments = submit(placement, keys)
    suspect, *others_of_a = [make_keys(99)[index] for worker, index in assignments if worker == "a"]
    placement.fail("a", suspect)
    placement.submit(suspect, 0)
    assert take(placement) == []
    for key in [make_keys(99)[index] for worker, index in assignments if worker == "b"]:
        placement.finish("b", key)
        assert [worker for worker, _ in submit(placement, keys)] == ["b"]
    for key in others_of_a:
        assert take(placement) == []
        placement.finish("a", key)
    assert take(placement) == [("a", suspect.index)]
    placement.finish("a", suspect)
    assert placement.free_slots() == 4


def test_speculative_attempt_goes_to_an_idle_worker() -> None:
    placement = make_placement("a", "b")
    (straggler, *_), keys = make_keys(9), make_keys(2)
    assert placement.idle_workers() == 2
    assert submit(placement, keys) == [("a", 0), ("b", 1)]
    assert placement.idle_workers() == 0
    placement.finish("b", make_keys(2)[1])
    assert placement.idle_workers() == 1
    placement.submit_speculative(straggler, 0)
    assert take(placement) == [("b", 0)]
    assert placement.idle_workers() == 0
    placement.finish("b", straggler)
    assert (placement.idle_workers(), placement.free_slots()) == (1, 7)  # the first attempt still runs
    placement.finish("a", straggler)
    assert (placement.idle_workers(), placement.free_slots()) == (2, 8)


def test_speculative_attempt_at_a_suspect_is_alone_with_its_worker() -> None:
    placement = make_placement("a")
    submit(placement, make_keys(1))
    placement.remove_worker("a")
    placement.add_worker("a")
    placement.add_worker("b")
    placement.submit(make_keys(1)[0], 0)
    assert take(placement) == [("a", 0)]
    placement.submit_speculative(make_keys(1)[0], 0)
    assert take(placement) == [("b", 0)]
    assert placement.free_slots() == 0


def test_assignment_to_a_lost_worker_is_withdrawn() -> None:
    placement = make_placement("a")
    placement.submit(make_keys(1)[0], 0)
    assert [key.index for key in placement.remove_worker("a")] == [0]
    assert take(placement) == []


@settings(max_examples=100, deadline=None)
@given(workers=st.integers(1, 6), images_in_flight=st.sampled_from([0, 64, 512]), seed=st.integers(0, 2**32))
def test_assignments_are_those_of_a_search_over_all_workers(workers: int, images_in_flight: int, seed: int) -> None:
    """Compare with the plain rule: a shard goes to a worker with free slots that has the fewest shards."""
    chance = random.Random(seed)
    placement = make_placement(*map(str, range(workers)), images_in_flight=images_in_flight)
    shards: dict[str, list[ShardKey]] = {f"{n}": [] for n in range(workers)}
    keys = iter(make_keys(10_000, rows=chance.choice([10, 100, 1000])))

    def free_slots(worker: str) -> int:
        return max(4 - len(shards[worker]), int(sum(key.rows for key in shards[worker]) < 2 * images_in_flight))

    for _ in range(200):
        assert placement.free_slots() == sum(map(free_slots, shards))
        assert placement.idle_workers() == sum(not queue for queue in shards.values())
        if placement.free_slots() and chance.random() < 0.7:
            placement.submit(key := next(keys), 0)
            (assignment,) = placement.take_assignments()
            assert assignment.key == key
            assert free_slots(assignment.worker) == max(map(free_slots, shards))
            assert len(shards[assignment.worker]) == min(len(shards[name]) for name in shards if free_slots(name))
            shards[assignment.worker].append(key)
        elif busy := [name for name, queue in shards.items() if queue]:
            name = chance.choice(busy)
            placement.finish(name, shards[name].pop(chance.randrange(len(shards[name]))))
        if chance.random() < 0.05:
            name = chance.choice(list(shards))
            assert placement.remove_worker(name) == shards.pop(name)
            placement.add_worker(name, images_in_flight)
            shards[name] = []


@settings(max_examples=200, deadline=None)
@given(
    shards=st.integers(0, 30),
    workers=st.integers(1, 4),
    poisoned=st.sets(st.integers(0, 29), max_size=4),
    attempts=st.integers(2, 3),
    seed=st.integers(0, 2**32),
)
def test_only_poisoned_shards_are_given_up(
    shards: int, workers: int, poisoned: set[int], attempts: int, seed: int
) -> None:
    """Each worker runs its shards in order and commits late; a poisoned shard kills it, with all shards it holds."""
    chance, scheduler, placement = random.Random(seed), Scheduler(attempts), Placement(workers)
    scheduler.add(make_keys(shards))
    held: dict[str, list[ShardKey]] = {f"{n}": [] for n in range(workers)}
    for name in held:
        placement.add_worker(name)
    for _ in range(10_000):
        while placement.free_slots() > 0 and (key := scheduler.take_next()) is not None:
            placement.submit(key, 0)
        for assignment in placement.take_assignments():
            held[assignment.worker].append(assignment.key)
        if scheduler.idle:
            break
        busy = [name for name, queue in held.items() if queue]
        assert busy, "a shard waits, and no worker has anything to do"
        name = chance.choice(busy)
        queue = held[name]
        if any(key.index in poisoned for key in queue[:2]):  # the second is at work, the first not yet committed
            blamed, *others = placement.remove_worker(name)
            scheduler.fail(blamed, "lost")
            for key in others:
                scheduler.fail(key, "lost", uses_attempt=False)
            queue.clear()
            placement.add_worker(name)
        else:
            placement.finish(name, queue[0])
            scheduler.finish(queue.pop(0))
    assert {given_up.key.index for given_up in scheduler.given_up} == {index for index in poisoned if index < shards}
    assert scheduler.done + len(scheduler.given_up) == shards


def test_assignment_says_that_a_shard_was_tried_before() -> None:
    placement, keys = make_placement("a", "b"), make_keys(2)
    placement.submit(keys[0], 0)
    placement.submit(keys[1], 0)
    assert [(one.key.index, one.reattempt) for one in placement.take_assignments()] == [(0, False), (1, False)]
    placement.remove_worker("b")
    placement.finish("a", keys[0])
    placement.submit(keys[1], 0)
    assert [one.reattempt for one in placement.take_assignments()] == [True], "the worker that had it is lost"
    placement.add_worker("b")
    placement.submit_speculative(keys[1], 0)
    assert [one.reattempt for one in placement.take_assignments()] == [True], "another worker is trying it"


def test_assignment_says_that_a_shard_failed_without_being_the_cause() -> None:
    placement, keys = make_placement("a", "b"), make_keys(1)
    placement.submit(keys[0], 0)
    ((worker, _),) = take(placement)
    placement.fail(worker, keys[0], suspect=False)
    placement.submit(keys[0], 0)
    assert [one.reattempt for one in placement.take_assignments()] == [True], (
        "the first attempt may have found a deadly image in it"
    )
