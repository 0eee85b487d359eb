"""Which worker gets which shard: enough to do, shared out evenly, and no innocent beside a suspect."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjob.driver.scheduler import Scheduler
from batchjob.pool.placement import Placement
from batchjob.types import ShardKey


def keys(count: int, rows: int = 1000) -> list[ShardKey]:
    return [ShardKey(index, f"id-{index}", rows, 0, rows * index) for index in range(count)]


def with_workers(*names: str, least: int = 1, ahead: int = 0) -> Placement:
    placement = Placement(least)
    for name in names:
        placement.add_worker(name, ahead)
    return placement


def fill(placement: Placement, plan: list[ShardKey]) -> list[tuple[str, int]]:
    """Submit as a driver does, as long as there is room; who got which."""
    while placement.free_slots() > 0 and plan:
        placement.submit(plan.pop(0), 0)
    return handed(placement)


def handed(placement: Placement) -> list[tuple[str, int]]:
    return [(due.worker, due.key.index) for due in placement.take_assignments()]


def test_two_are_queued_beside_the_one_at_work_and_the_one_being_committed() -> None:
    placement, plan = with_workers("a"), keys(9)
    assert placement.free_slots() == 4
    assert fill(placement, plan) == [("a", 0), ("a", 1), ("a", 2), ("a", 3)]
    assert placement.free_slots() == 0
    placement.finish("a", keys(1)[0])
    assert fill(placement, plan) == [("a", 4)]


@pytest.mark.parametrize(("rows", "ahead", "taken"), [(64, 512, 16), (8192, 4096, 4), (64, 0, 4), (500, 1024, 5)])
def test_small_shards_are_as_many_as_keep_the_loader_busy(rows: int, ahead: int, taken: int) -> None:
    """Its loader has so many images under way; as many again wait, or are on their way into the output."""
    assert len(fill(with_workers("a", ahead=ahead), keys(99, rows))) == taken


def test_workers_get_equal_shares() -> None:
    found = Counter(worker for worker, _ in fill(with_workers("a", "b", "c"), keys(9)))
    assert found == {"a": 3, "b": 3, "c": 3}


def test_nothing_is_taken_on_before_the_least_number_of_workers_is_there() -> None:
    placement = with_workers("a", "b", least=3)
    assert (placement.free_slots(), placement.ready_workers, placement.required_workers) == (0, 2, 3)
    placement.add_worker("c")
    assert placement.free_slots() == 12


def test_a_lost_worker_does_not_idle_the_others() -> None:
    placement = with_workers("a", "b", least=2)
    placement.remove_worker("a")
    assert (placement.free_slots(), placement.ready_workers, placement.required_workers) == (4, 1, 1)


def test_what_a_lost_worker_held_is_told_oldest_first() -> None:
    placement = with_workers("a")
    fill(placement, keys(4))
    placement.finish("a", keys(1)[0])
    assert [key.index for key in placement.remove_worker("a")] == [1, 2, 3]
    assert placement.remove_worker("a") == []


def test_suspects_travel_alone() -> None:
    placement, plan = with_workers("a"), keys(9)
    fill(placement, plan)
    plan = placement.remove_worker("a")[:2] + plan
    placement.add_worker("a")
    assert fill(placement, plan) == [("a", 0)]
    placement.finish("a", keys(1)[0])
    assert fill(placement, plan) == [("a", 1)]
    placement.fail("a", keys(2)[1], suspect=False)  # the network: it stays a suspect all the same
    plan.insert(0, keys(2)[1])
    assert fill(placement, plan) == [("a", 1)]
    placement.finish("a", keys(2)[1])
    assert fill(placement, plan) == [("a", index) for index in range(4, 8)]


def test_a_suspect_waits_until_a_worker_has_nothing_else_and_the_others_go_on() -> None:
    placement, plan = with_workers("a", "b"), keys(99)
    held = fill(placement, plan)
    suspect, *with_a = [keys(99)[index] for worker, index in held if worker == "a"]
    placement.fail("a", suspect)
    placement.submit(suspect, 0)
    assert handed(placement) == []
    for key in [keys(99)[index] for worker, index in held if worker == "b"]:
        placement.finish("b", key)
        assert [worker for worker, _ in fill(placement, plan)] == ["b"]
    for key in with_a:
        assert handed(placement) == []
        placement.finish("a", key)
    assert handed(placement) == [("a", suspect.index)]
    placement.finish("a", suspect)
    assert placement.free_slots() == 4


def test_a_second_attempt_goes_to_a_worker_that_has_nothing() -> None:
    placement = with_workers("a", "b")
    (late, *_), plan = keys(9), keys(2)
    assert placement.idle_workers() == 2
    assert fill(placement, plan) == [("a", 0), ("b", 1)]
    assert placement.idle_workers() == 0
    placement.finish("b", keys(2)[1])
    assert placement.idle_workers() == 1
    placement.submit_speculative(late, 0)
    assert handed(placement) == [("b", 0)]
    assert placement.idle_workers() == 0
    placement.finish("b", late)
    assert (placement.idle_workers(), placement.free_slots()) == (1, 7)  # the other one is still at it
    placement.finish("a", late)
    assert (placement.idle_workers(), placement.free_slots()) == (2, 8)


def test_a_second_attempt_at_a_suspect_is_alone_with_its_worker() -> None:
    placement = with_workers("a")
    fill(placement, keys(1))
    placement.remove_worker("a")
    placement.add_worker("a")
    placement.add_worker("b")
    placement.submit(keys(1)[0], 0)
    assert handed(placement) == [("a", 0)]
    placement.submit_speculative(keys(1)[0], 0)
    assert handed(placement) == [("b", 0)]
    assert placement.free_slots() == 0


def test_an_assignment_to_a_worker_that_is_gone_is_not_told() -> None:
    placement = with_workers("a")
    placement.submit(keys(1)[0], 0)
    assert [key.index for key in placement.remove_worker("a")] == [0]
    assert handed(placement) == []


@settings(max_examples=300, deadline=None)
@given(workers=st.integers(1, 6), ahead=st.sampled_from([0, 64, 512]), seed=st.integers(0, 2**32))
def test_rooms_and_shares_are_as_if_all_workers_were_looked_at(workers: int, ahead: int, seed: int) -> None:
    """Against the plain rule: a shard goes to the worker with the most room, of these to the one with the fewest."""
    dice = random.Random(seed)
    placement = with_workers(*map(str, range(workers)), ahead=ahead)
    hands: dict[str, list[ShardKey]] = {f"{n}": [] for n in range(workers)}
    plan = iter(keys(10_000, rows=dice.choice([10, 100, 1000])))

    def room(name: str) -> int:
        return max(4 - len(hands[name]), int(sum(key.rows for key in hands[name]) < 2 * ahead))

    for _ in range(200):
        assert placement.free_slots() == sum(map(room, hands))
        assert placement.idle_workers() == sum(not held for held in hands.values())
        if placement.free_slots() and dice.random() < 0.7:
            placement.submit(key := next(plan), 0)
            (due,) = placement.take_assignments()
            assert due.key == key
            assert room(due.worker) == max(map(room, hands))
            assert len(hands[due.worker]) == min(len(hands[name]) for name in hands if room(name))
            hands[due.worker].append(key)
        elif held := [name for name, held in hands.items() if held]:
            name = dice.choice(held)
            placement.finish(name, hands[name].pop(dice.randrange(len(hands[name]))))
        if dice.random() < 0.05:
            name = dice.choice(list(hands))
            assert placement.remove_worker(name) == hands.pop(name)
            placement.add_worker(name, ahead)
            hands[name] = []


@settings(max_examples=200, deadline=None)
@given(
    shards=st.integers(0, 30),
    workers=st.integers(1, 4),
    poisoned=st.sets(st.integers(0, 29), max_size=4),
    attempts=st.integers(2, 3),
    seed=st.integers(0, 2**32),
)
def test_poison_is_given_up_and_no_innocent_with_it(
    shards: int, workers: int, poisoned: set[int], attempts: int, seed: int
) -> None:
    """Each worker does its shards in order and commits late; a poisoned one kills it, with all that it has in hand."""
    dice, schedule, placement = random.Random(seed), Scheduler(attempts), Placement(workers)
    schedule.add(keys(shards))
    hands: dict[str, list[ShardKey]] = {f"{n}": [] for n in range(workers)}
    for name in hands:
        placement.add_worker(name)
    for _ in range(10_000):
        while placement.free_slots() > 0 and (key := schedule.take_next()) is not None:
            placement.submit(key, 0)
        for due in placement.take_assignments():
            hands[due.worker].append(due.key)
        if schedule.idle:
            break
        busy = [name for name, held in hands.items() if held]
        assert busy, "something waits, and nobody has anything to do"
        name = dice.choice(busy)
        held = hands[name]
        if any(key.index in poisoned for key in held[:2]):  # the second is at work, the first not yet committed
            blamed, *others = placement.remove_worker(name)
            schedule.fail(blamed, "lost")
            for key in others:
                schedule.fail(key, "lost", uses_attempt=False)
            held.clear()
            placement.add_worker(name)
        else:
            placement.finish(name, held[0])
            schedule.finish(held.pop(0))
    assert {gone.key.index for gone in schedule.given_up} == {index for index in poisoned if index < shards}
    assert schedule.done + len(schedule.given_up) == shards


def test_who_gets_a_shard_that_was_tried_before_is_told() -> None:
    placement, plan = with_workers("a", "b"), keys(2)
    placement.submit(plan[0], 0)
    placement.submit(plan[1], 0)
    assert [(due.key.index, due.reattempt) for due in placement.take_assignments()] == [(0, False), (1, False)]
    placement.remove_worker("b")
    placement.finish("a", plan[0])
    placement.submit(plan[1], 0)
    assert [due.reattempt for due in placement.take_assignments()] == [True], "it was in hand at a worker that is gone"
    placement.add_worker("b")
    placement.submit_speculative(plan[1], 0)
    assert [due.reattempt for due in placement.take_assignments()] == [True], "it is tried elsewhere"


def test_so_is_who_gets_one_that_failed_by_no_fault_of_its_own() -> None:
    placement, plan = with_workers("a", "b"), keys(1)
    placement.submit(plan[0], 0)
    ((first, _),) = handed(placement)
    placement.fail(first, plan[0], suspect=False)
    placement.submit(plan[0], 0)
    assert [due.reattempt for due in placement.take_assignments()] == [True], (
        "the first may have found a deadly image in it"
    )
