"""Which shard next, retry or give up: every shard ends once, whatever happens on the way."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjob.driver.scheduler import AbandonedShard, Scheduler
from batchjob.types import ShardKey


def keys(count: int, start: int = 0) -> list[ShardKey]:
    return [ShardKey(index, f"id-{index}", 10, 0, 10 * index) for index in range(start, start + count)]


def taken(schedule: Scheduler) -> ShardKey:
    key = schedule.take_next()
    assert key is not None
    return key


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def usual(count: int, seconds: float) -> tuple[Scheduler, Clock]:
    """A schedule in which so many shards are done that took so long; more may be added, from that index on."""
    clock = Clock()
    schedule = Scheduler(3, clock)
    schedule.add(keys(count))
    for _ in range(count):
        key = taken(schedule)
        clock.now += seconds
        assert schedule.finish(key)
    return schedule, clock


def test_shards_go_out_in_plan_order() -> None:
    schedule = Scheduler(3)
    schedule.add(keys(2))
    schedule.add(keys(2, start=2))
    assert [taken(schedule).index for _ in range(4)] == [0, 1, 2, 3]
    assert schedule.take_next() is None
    assert (schedule.waiting, schedule.running, schedule.idle) == (0, 4, False)


def test_nothing_to_do_is_idle() -> None:
    schedule = Scheduler(3)
    assert schedule.take_next() is None
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
    schedule = Scheduler(3)
    schedule.add(keys(3))
    assert not schedule.fail(taken(schedule), "poison")
    assert [taken(schedule).index for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_a_shard_is_given_up_after_its_attempts(attempts: int) -> None:
    schedule = Scheduler(attempts)
    schedule.add(keys(1))
    gave_up = [schedule.fail(taken(schedule), f"fault {n}") for n in range(attempts)]
    assert gave_up == [False] * (attempts - 1) + [True]
    assert schedule.given_up == [AbandonedShard(keys(1)[0], f"fault {attempts - 1}")]
    assert schedule.idle
    assert schedule.done == 0


def test_faults_that_are_nobodys_use_up_no_attempt() -> None:
    schedule = Scheduler(2)
    schedule.add(keys(1))
    for _ in range(50):
        assert not schedule.fail(taken(schedule), "the network", uses_attempt=False)
    assert not schedule.fail(taken(schedule), "poison")
    assert not schedule.fail(taken(schedule), "the network", uses_attempt=False)
    assert schedule.fail(taken(schedule), "poison")


def test_shards_have_attempts_of_their_own() -> None:
    schedule = Scheduler(2)
    schedule.add(keys(2))
    for _ in range(2):
        assert not schedule.fail(taken(schedule), "poison")
    assert schedule.finish(taken(schedule))
    assert schedule.fail(taken(schedule), "poison")
    assert [gone.key.index for gone in schedule.given_up] == [1]


def test_late_answers_change_nothing() -> None:
    """A worker held for dead may still speak, when its shard is already with another one, or done."""
    schedule = Scheduler(2)
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


def test_a_late_shard_goes_out_once_more_when_nothing_waits() -> None:
    schedule, clock = usual(3, seconds=10)
    schedule.add(keys(2, start=3))
    late = taken(schedule)
    clock.now += 19
    assert schedule.take_straggler() is None, "another one waits"
    other = taken(schedule)
    assert schedule.take_straggler() is None, "not yet twice as long as usual"
    clock.now += 2
    assert schedule.take_straggler() == late
    assert schedule.take_straggler() is None, "once each"
    clock.now += 100
    assert schedule.take_straggler() == other
    assert schedule.running == 2


@pytest.mark.parametrize(("usually", "after", "late"), [(0.1, 4.0, False), (0.1, 6.0, True), (60, 119, False)])
def test_late_is_twice_the_usual_time_and_some_seconds_at_least(usually: float, after: float, late: bool) -> None:
    schedule, clock = usual(5, usually)
    schedule.add(keys(1, start=5))
    taken(schedule)
    clock.now += after
    assert (schedule.take_straggler() is not None) == late


def test_without_a_shard_that_is_done_none_is_late() -> None:
    clock = Clock()
    schedule = Scheduler(3, clock)
    schedule.add(keys(1))
    taken(schedule)
    clock.now += 1e6
    assert schedule.take_straggler() is None


def backed_up() -> tuple[Scheduler, ShardKey]:
    """A schedule that has one shard out twice, and may fail twice."""
    schedule, clock = usual(1, seconds=1)
    schedule.max_attempts = 2
    schedule.add(keys(1, start=1))
    key = taken(schedule)
    clock.now += 100
    assert schedule.take_straggler() == key
    return schedule, key


def test_the_first_of_two_commits_counts_and_the_other_attempt_changes_nothing() -> None:
    for loser_commits in (True, False):
        schedule, key = backed_up()
        assert schedule.finish(key)
        assert not (schedule.finish(key) if loser_commits else schedule.fail(key, "late"))
        assert (schedule.done, schedule.given_up, schedule.idle) == (2, [], True)


def test_of_two_attempts_one_may_fail() -> None:
    schedule, key = backed_up()
    assert not schedule.fail(key, "poison")
    assert (schedule.running, schedule.waiting) == (1, 0)
    assert schedule.finish(key)
    assert schedule.idle


def test_of_two_attempts_each_failure_counts_and_the_last_one_ends_it() -> None:
    schedule, key = backed_up()
    assert not schedule.fail(key, "poison")
    assert schedule.fail(key, "poison again")
    assert schedule.given_up == [AbandonedShard(key, "poison again")]

    schedule, key = backed_up()
    assert not schedule.fail(key, "its worker was lost", uses_attempt=False)
    assert not schedule.fail(key, "poison")
    assert (schedule.waiting, taken(schedule)) == (1, key)


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
    dice, schedule, running = random.Random(seed), Scheduler(attempts), list[ShardKey]()
    ended: Counter[int] = Counter()
    faults: Counter[int] = Counter()
    plan = keys(shards)
    while plan or not schedule.idle:
        schedule.add([plan.pop(0) for _ in range(min(len(plan), dice.randrange(4)))])
        while len(running) < workers and (key := schedule.take_next()) is not None:
            running.append(key)
        assert schedule.running == len(running)
        if not running:
            continue
        key = running.pop(dice.randrange(len(running)))
        if dice.random() < 0.2:
            assert not schedule.fail(key, "the network", uses_attempt=False)
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


@settings(max_examples=200, deadline=None)
@given(
    shards=st.integers(1, 30),
    workers=st.integers(1, 5),
    slow=st.sets(st.integers(0, 4)),
    failing=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_slow_workers_hold_up_nobody_for_long(
    shards: int, workers: int, slow: set[int], failing: bool, seed: int
) -> None:
    """A cluster of which some workers are a hundred times slower, and maybe a tenth of all attempts fail."""
    dice, clock = random.Random(seed), Clock()
    schedule = Scheduler(1_000_000, clock)
    schedule.add(keys(shards))
    busy: dict[int, tuple[float, ShardKey]] = {}  # worker: when it is through, and with what
    ended: Counter[int] = Counter()
    twice: Counter[int] = Counter()
    while not schedule.idle:
        for worker in set(range(workers)) - busy.keys():
            key = schedule.take_next()
            if key is None and (key := schedule.take_straggler()) is not None:
                assert key in [other for _, other in busy.values()], "it is with another worker"
                twice[key.index] += 1
            if key is not None:
                busy[worker] = clock.now + (1000 if worker in slow else 10), key
        worker = min(busy, key=lambda worker: busy[worker][0])
        clock.now = min(clock.now + 1, busy[worker][0]) if len(busy) < workers else busy[worker][0]
        if busy[worker][0] > clock.now:
            continue
        key = busy.pop(worker)[1]
        if failing and dice.random() < 0.1:
            schedule.fail(key, "lost")
        else:
            ended[key.index] += schedule.finish(key)
    assert ended == Counter(range(shards))
    assert schedule.done == shards
    if workers == 1:
        assert not twice
    if shards > workers and set(range(workers)) - slow and not failing:
        assert clock.now < 1000, "the fast ones have done it all"
