"""Scheduler: order of shards, retries, stragglers; every shard ends exactly once."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjob.driver.scheduler import AbandonedShard, Scheduler
from batchjob.types import ShardKey


def make_keys(count: int, start: int = 0) -> list[ShardKey]:
    return [ShardKey(index, f"id-{index}", 10, 0, 10 * index) for index in range(start, start + count)]


def take(scheduler: Scheduler) -> ShardKey:
    key = scheduler.take_next()
    assert key is not None
    return key


class FakeClock:
    """Clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_scheduler(count: int, seconds: float) -> tuple[Scheduler, FakeClock]:
    """Make a scheduler in which the first shards are done and took so long each."""
    clock = FakeClock()
    scheduler = Scheduler(3, clock)
    scheduler.add(make_keys(count))
    for _ in range(count):
        key = take(scheduler)
        clock.now += seconds
        assert scheduler.finish(key)
    return scheduler, clock


def test_shards_are_taken_in_plan_order() -> None:
    scheduler = Scheduler(3)
    scheduler.add(make_keys(2))
    scheduler.add(make_keys(2, start=2))
    assert [take(scheduler).index for _ in range(4)] == [0, 1, 2, 3]
    assert scheduler.take_next() is None
    assert (scheduler.waiting, scheduler.running, scheduler.idle) == (0, 4, False)


def test_scheduler_is_idle_without_shards() -> None:
    scheduler = Scheduler(3)
    assert scheduler.take_next() is None
    idle = [scheduler.idle]
    scheduler.add(make_keys(1))
    idle.append(scheduler.idle)
    key = take(scheduler)
    idle.append(scheduler.idle)
    assert scheduler.finish(key)
    idle.append(scheduler.idle)
    assert idle == [True, False, False, True]
    assert scheduler.done == 1


def test_failed_shard_goes_to_the_back() -> None:
    scheduler = Scheduler(3)
    scheduler.add(make_keys(3))
    assert not scheduler.fail(take(scheduler), "poison")
    assert [take(scheduler).index for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_shard_is_abandoned_after_its_attempts(attempts: int) -> None:
    scheduler = Scheduler(attempts)
    scheduler.add(make_keys(1))
    gave_up = [scheduler.fail(take(scheduler), f"fault {n}") for n in range(attempts)]
    assert gave_up == [False] * (attempts - 1) + [True]
    assert scheduler.given_up == [AbandonedShard(make_keys(1)[0], f"fault {attempts - 1}")]
    assert scheduler.idle
    assert scheduler.done == 0


def test_faults_of_the_environment_use_up_no_attempt() -> None:
    scheduler = Scheduler(2)
    scheduler.add(make_keys(1))
    for _ in range(50):
        assert not scheduler.fail(take(scheduler), "the network", uses_attempt=False)
    assert not scheduler.fail(take(scheduler), "poison")
    assert not scheduler.fail(take(scheduler), "the network", uses_attempt=False)
    assert scheduler.fail(take(scheduler), "poison")


def test_attempts_are_counted_per_shard() -> None:
    scheduler = Scheduler(2)
    scheduler.add(make_keys(2))
    for _ in range(2):
        assert not scheduler.fail(take(scheduler), "poison")
    assert scheduler.finish(take(scheduler))
    assert scheduler.fail(take(scheduler), "poison")
    assert [abandoned.key.index for abandoned in scheduler.given_up] == [1]


def test_late_results_change_nothing() -> None:
    """A worker that was taken for dead may still report when its shard is running elsewhere or done."""
    scheduler = Scheduler(2)
    scheduler.add(make_keys(1))
    key = take(scheduler)
    assert scheduler.finish(key)
    assert not scheduler.finish(key)
    assert not scheduler.fail(key, "late")
    assert (scheduler.done, scheduler.given_up, scheduler.idle) == (1, [], True)
    scheduler.add(make_keys(1, start=1))
    key = take(scheduler)
    assert not scheduler.fail(key, "its worker was lost")
    assert not scheduler.fail(key, "late")  # the shard is waiting again, so nothing is counted twice
    assert scheduler.waiting == 1
    assert scheduler.finish(take(scheduler))
    assert scheduler.idle


def test_straggler_is_taken_once_when_no_shard_waits() -> None:
    scheduler, clock = make_scheduler(3, seconds=10)
    scheduler.add(make_keys(2, start=3))
    straggler = take(scheduler)
    clock.now += 19
    assert scheduler.take_straggler() is None, "another shard is waiting"
    other_shard = take(scheduler)
    assert scheduler.take_straggler() is None, "not yet twice the median"
    clock.now += 2
    assert scheduler.take_straggler() == straggler
    assert scheduler.take_straggler() is None, "one speculative attempt per shard"
    clock.now += 100
    assert scheduler.take_straggler() == other_shard
    assert scheduler.running == 2


@pytest.mark.parametrize(
    ("median_seconds", "seconds", "straggler"), [(0.1, 4.0, False), (0.1, 6.0, True), (60, 119, False)]
)
def test_straggler_exceeds_twice_the_median_and_five_seconds(
    median_seconds: float, seconds: float, straggler: bool
) -> None:
    scheduler, clock = make_scheduler(5, median_seconds)
    scheduler.add(make_keys(1, start=5))
    take(scheduler)
    clock.now += seconds
    assert (scheduler.take_straggler() is not None) == straggler


def test_no_straggler_before_the_first_commit() -> None:
    clock = FakeClock()
    scheduler = Scheduler(3, clock)
    scheduler.add(make_keys(1))
    take(scheduler)
    clock.now += 1e6
    assert scheduler.take_straggler() is None


def make_speculated_shard() -> tuple[Scheduler, ShardKey]:
    """Make a scheduler with two attempts at one shard, which may fail twice."""
    scheduler, clock = make_scheduler(1, seconds=1)
    scheduler.max_attempts = 2
    scheduler.add(make_keys(1, start=1))
    key = take(scheduler)
    clock.now += 100
    assert scheduler.take_straggler() == key
    return scheduler, key


def test_first_commit_of_two_attempts_counts() -> None:
    for loser_commits in (True, False):
        scheduler, key = make_speculated_shard()
        assert scheduler.finish(key)
        assert not (scheduler.finish(key) if loser_commits else scheduler.fail(key, "late"))
        assert (scheduler.done, scheduler.given_up, scheduler.idle) == (2, [], True)


def test_one_of_two_attempts_may_fail() -> None:
    scheduler, key = make_speculated_shard()
    assert not scheduler.fail(key, "poison")
    assert (scheduler.running, scheduler.waiting) == (1, 0)
    assert scheduler.finish(key)
    assert scheduler.idle


def test_each_failure_of_two_attempts_counts() -> None:
    scheduler, key = make_speculated_shard()
    assert not scheduler.fail(key, "poison")
    assert scheduler.fail(key, "poison again")
    assert scheduler.given_up == [AbandonedShard(key, "poison again")]

    scheduler, key = make_speculated_shard()
    assert not scheduler.fail(key, "its worker was lost", uses_attempt=False)
    assert not scheduler.fail(key, "poison")
    assert (scheduler.waiting, take(scheduler)) == (1, key)


@settings(max_examples=200, deadline=None)
@given(
    shards=st.integers(0, 20),
    attempts=st.integers(1, 4),
    workers=st.integers(1, 5),
    poisoned=st.sets(st.integers(0, 19)),
    seed=st.integers(0, 2**32),
)
def test_every_shard_ends_exactly_once(shards: int, attempts: int, workers: int, poisoned: set[int], seed: int) -> None:
    """Cluster in which workers and network fail, results come late and twice, and some shards always fail."""
    random_numbers, scheduler, running = random.Random(seed), Scheduler(attempts), list[ShardKey]()
    ended: Counter[int] = Counter()
    faults: Counter[int] = Counter()
    plan = make_keys(shards)
    while plan or not scheduler.idle:
        scheduler.add([plan.pop(0) for _ in range(min(len(plan), random_numbers.randrange(4)))])
        while len(running) < workers and (key := scheduler.take_next()) is not None:
            running.append(key)
        assert scheduler.running == len(running)
        if not running:
            continue
        key = running.pop(random_numbers.randrange(len(running)))
        if random_numbers.random() < 0.2:
            assert not scheduler.fail(key, "the network", uses_attempt=False)
        elif key.index in poisoned or random_numbers.random() < 0.1:
            faults[key.index] += 1
            ended[key.index] += scheduler.fail(key, "poison")
        else:
            ended[key.index] += scheduler.finish(key)
            assert not scheduler.finish(key)
    assert +ended == Counter(range(shards))
    assert scheduler.done + len(scheduler.given_up) == shards
    given_up = {abandoned.key.index for abandoned in scheduler.given_up}
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
def test_slow_workers_do_not_delay_the_run(shards: int, workers: int, slow: set[int], failing: bool, seed: int) -> None:
    """Cluster in which some workers are a hundred times slower, and a tenth of the attempts may fail."""
    random_numbers, clock = random.Random(seed), FakeClock()
    scheduler = Scheduler(1_000_000, clock)
    scheduler.add(make_keys(shards))
    busy: dict[int, tuple[float, ShardKey]] = {}  # worker → time at which its shard ends, and the shard
    ended: Counter[int] = Counter()
    twice: Counter[int] = Counter()
    while not scheduler.idle:
        for worker in set(range(workers)) - busy.keys():
            key = scheduler.take_next()
            if key is None and (key := scheduler.take_straggler()) is not None:
                assert key in [other_shard for _, other_shard in busy.values()], "the straggler is with another worker"
                twice[key.index] += 1
            if key is not None:
                busy[worker] = clock.now + (1000 if worker in slow else 10), key
        worker = min(busy, key=lambda worker: busy[worker][0])
        clock.now = min(clock.now + 1, busy[worker][0]) if len(busy) < workers else busy[worker][0]
        if busy[worker][0] > clock.now:
            continue
        key = busy.pop(worker)[1]
        if failing and random_numbers.random() < 0.1:
            scheduler.fail(key, "lost")
        else:
            ended[key.index] += scheduler.finish(key)
    assert ended == Counter(range(shards))
    assert scheduler.done == shards
    if workers == 1:
        assert not twice
    if shards > workers and set(range(workers)) - slow and not failing:
        assert clock.now < 1000, "the fast workers did everything"
