"""Which shard next, retry or give up: every shard ends once, whatever happens on the way."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjob.records import ShardKey
from batchjob.schedule import GivenUp, Schedule


def keys(count: int, start: int = 0) -> list[ShardKey]:
    return [ShardKey(index, f"id-{index}", 10, 0, 10 * index) for index in range(start, start + count)]


def taken(schedule: Schedule) -> ShardKey:
    key = schedule.take()
    assert key is not None
    return key


def test_shards_go_out_in_plan_order() -> None:
    schedule = Schedule(3)
    schedule.add(keys(2))
    schedule.add(keys(2, start=2))
    assert [taken(schedule).index for _ in range(4)] == [0, 1, 2, 3]
    assert schedule.take() is None
    assert (schedule.waiting, schedule.running, schedule.idle) == (0, 4, False)


def test_nothing_to_do_is_idle() -> None:
    schedule = Schedule(3)
    assert schedule.take() is None
    idle = [schedule.idle]
    schedule.add(keys(1))
    idle.append(schedule.idle)
    key = taken(schedule)
    idle.append(schedule.idle)
    assert schedule.finish(key)
    idle.append(schedule.idle)
    assert idle == [True, False, False, True]
    assert schedule.done == 1


def test_a_failed_shard_goes_to_the_back() -> None:
    schedule = Schedule(3)
    schedule.add(keys(3))
    assert not schedule.fail(taken(schedule), "poison")
    assert [taken(schedule).index for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_a_shard_is_given_up_after_its_attempts(attempts: int) -> None:
    schedule = Schedule(attempts)
    schedule.add(keys(1))
    gave_up = [schedule.fail(taken(schedule), f"fault {n}") for n in range(attempts)]
    assert gave_up == [False] * (attempts - 1) + [True]
    assert schedule.given_up == [GivenUp(keys(1)[0], f"fault {attempts - 1}")]
    assert schedule.idle
    assert schedule.done == 0


def test_faults_that_are_nobodys_use_up_no_attempt() -> None:
    schedule = Schedule(2)
    schedule.add(keys(1))
    for _ in range(50):
        assert not schedule.fail(taken(schedule), "the network", counts=False)
    assert not schedule.fail(taken(schedule), "poison")
    assert not schedule.fail(taken(schedule), "the network", counts=False)
    assert schedule.fail(taken(schedule), "poison")


def test_shards_have_attempts_of_their_own() -> None:
    schedule = Schedule(2)
    schedule.add(keys(2))
    for _ in range(2):
        assert not schedule.fail(taken(schedule), "poison")
    assert schedule.finish(taken(schedule))
    assert schedule.fail(taken(schedule), "poison")
    assert [gone.key.index for gone in schedule.given_up] == [1]


def test_late_answers_change_nothing() -> None:
    """A worker held for dead may still speak, when its shard is already with another one, or done."""
    schedule = Schedule(2)
    schedule.add(keys(1))
    key = taken(schedule)
    assert schedule.finish(key)
    assert not schedule.finish(key)
    assert not schedule.fail(key, "late")
    assert (schedule.done, schedule.given_up, schedule.idle) == (1, [], True)
    schedule.add(keys(1, start=1))
    key = taken(schedule)
    assert not schedule.fail(key, "its worker was lost")
    assert not schedule.fail(key, "late")  # waiting again: not counted twice
    assert schedule.waiting == 1
    assert schedule.finish(taken(schedule))
    assert schedule.idle


@settings(max_examples=200, deadline=None)
@given(
    shards=st.integers(0, 20),
    attempts=st.integers(1, 4),
    workers=st.integers(1, 5),
    poisoned=st.sets(st.integers(0, 19)),
    seed=st.integers(0, 2**32),
)
def test_every_shard_ends_exactly_once(shards: int, attempts: int, workers: int, poisoned: set[int], seed: int) -> None:
    """A cluster in which workers fail, the network fails, answers come late and twice, and some shards never work."""
    dice, schedule, running = random.Random(seed), Schedule(attempts), list[ShardKey]()
    ended: Counter[int] = Counter()
    faults: Counter[int] = Counter()
    plan = keys(shards)
    while plan or not schedule.idle:
        schedule.add([plan.pop(0) for _ in range(min(len(plan), dice.randrange(4)))])
        while len(running) < workers and (key := schedule.take()) is not None:
            running.append(key)
        assert schedule.running == len(running)
        if not running:
            continue
        key = running.pop(dice.randrange(len(running)))
        if dice.random() < 0.2:
            assert not schedule.fail(key, "the network", counts=False)
        elif key.index in poisoned or dice.random() < 0.1:
            faults[key.index] += 1
            ended[key.index] += schedule.fail(key, "poison")
        else:
            ended[key.index] += schedule.finish(key)
            assert not schedule.finish(key)
    assert +ended == Counter(range(shards))
    assert schedule.done + len(schedule.given_up) == shards
    given_up = {gone.key.index for gone in schedule.given_up}
    assert {index for index in range(shards) if faults[index] >= attempts} == given_up
    assert max(faults.values(), default=0) <= attempts
