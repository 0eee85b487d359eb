"""Lease: acquire, expiry, heartbeats, loss and doubtful answers, with clocks that only the tests advance."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from batchjob.driver.lease import EXPIRY_SECONDS, HEARTBEAT_SECONDS, Lease
from batchjob.errors import Temporary, Unavailable
from batchjob.storage.store import Store
from tests.support.memory_store import Fault, Killed, MemoryStore


class FakeClock:
    """Clock that advances only in `sleep`, which then calls `on_sleep`."""

    def __init__(self, on_sleep: Callable[[], object] = lambda: None) -> None:
        self.now, self.on_sleep = 1000.0, on_sleep

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


def acquire(store: Store, clock: FakeClock | None = None, note: Callable[[str], None] = lambda text: None) -> Lease:
    clock = clock or FakeClock()
    return Lease.acquire(store, clock=clock, sleep=clock.sleep, note=note)


def epoch_key(epoch: int) -> str:
    return f"_batchjob/lease/{epoch:010d}.json"


# --- acquire --------------------------------------------------------------------------------------------------------


def test_free_lease_is_taken_at_once(store: Store) -> None:
    clock = FakeClock()
    lease = acquire(store, clock)
    assert (lease.epoch, clock.now) == (1, 1000.0)
    object_key, word = lease.visibility_check
    assert word.encode() in store.read(object_key).data


def test_released_lease_is_taken_at_once(store: Store) -> None:
    clock = FakeClock()
    for epoch in range(1, 5):
        lease = acquire(store, clock)
        assert lease.epoch == epoch
        lease.release()
    assert clock.now == 1000.0
    assert [info.uri for info in store.list("_batchjob/lease/")] == [
        epoch_key(3),
        epoch_key(4),
    ]  # older epochs are deleted


def test_owner_without_heartbeat_is_replaced_after_twenty_seconds(store: Store) -> None:
    acquire(store)
    clock, notes = FakeClock(), list[str]()
    lease = acquire(store, clock, notes.append)
    assert lease.epoch == 2
    assert EXPIRY_SECONDS == 20
    assert 20 <= clock.now - 1000 < 21
    assert len(notes) == 1
    assert "process" in notes[0]


@pytest.mark.parametrize("after", [0.5, 1.0, 10.0, 19.0])
def test_owner_with_heartbeats_keeps_the_lease(store: Store, after: float) -> None:
    owner_clock = FakeClock()
    owner = acquire(store, owner_clock)
    owner_clock.now += HEARTBEAT_SECONDS
    clock = FakeClock(lambda: owner.heartbeat() if clock.now >= 1000 + after else None)
    with pytest.raises(Temporary, match="at work") as raised:
        acquire(store, clock)
    assert raised.value.exit_code == 75
    assert clock.now == 1000 + after
    assert [info.uri for info in store.list("_batchjob/lease/")] == [epoch_key(1)]


def test_release_ends_the_wait_of_a_newcomer(store: Store) -> None:
    owner = acquire(store)
    clock = FakeClock(lambda: owner.release() if clock.now == 1003 else None)
    assert acquire(store, clock).epoch == 2
    assert clock.now == 1003


def test_only_the_clock_of_the_newcomer_counts(memory: MemoryStore) -> None:
    owner_clock, clock = FakeClock(), FakeClock()
    owner_clock.now = 9e9
    acquire(memory, owner_clock)
    clock.now = -5.0
    assert acquire(memory, clock).epoch == 2
    assert 15 <= clock.now < 16


def test_only_successful_reads_count_for_the_expiry(memory: MemoryStore) -> None:
    """Thirty seconds in which the store does not answer are no evidence about the owner."""
    acquire(memory)
    clock = FakeClock()

    def slow_answer() -> None:
        clock.now += 30

    memory.inject("list", "*", slow_answer, skip=1)
    acquire(memory, clock)
    assert clock.now - 1000 >= 49


def test_unavailable_store_hands_over_no_lease(memory: MemoryStore) -> None:
    acquire(memory)
    newcomer = memory.client()
    newcomer.inject("list", "*", Fault.DOWN, skip=5)
    with pytest.raises(Unavailable):
        acquire(newcomer)
    assert memory.stored_keys() == [epoch_key(1)]


def test_faster_third_driver_keeps_the_lease(memory: MemoryStore) -> None:
    acquire(memory)
    clock = FakeClock(
        lambda: memory.put_if_absent(epoch_key(2), memory.read(epoch_key(1)).data) if clock.now == 1005 else None
    )
    with pytest.raises(Temporary):
        acquire(memory.client(), clock)
    assert memory.stored_keys() == [epoch_key(1), epoch_key(2)]


@pytest.mark.parametrize("owned", [False, True], ids=["free", "silent"])
def test_one_of_two_newcomers_wins(memory: MemoryStore, owned: bool) -> None:
    if owned:
        acquire(memory)
    epoch = 1 + owned
    slow, fast, winners = memory.client(), memory.client(), list[Lease]()
    slow.inject("put_if_absent", epoch_key(epoch), lambda: winners.append(acquire(fast)))
    with pytest.raises(Temporary, match="another driver"):
        acquire(slow)
    assert [lease.epoch for lease in winners] == [epoch]
    winners[0].heartbeat()


def test_foreign_files_among_the_epochs_are_ignored(memory: MemoryStore) -> None:
    memory.put_if_absent("_batchjob/lease/.DS_Store", b"\0")
    acquire(memory).release()
    assert acquire(memory).epoch == 2


# --- heartbeat ------------------------------------------------------------------------------------------------------


def read_heartbeats(store: Store) -> int:
    """Read the number of heartbeats of the first epoch."""
    found: int = json.loads(store.read(epoch_key(1)).data)["beats"]
    return found


def test_epoch_is_rewritten_every_two_seconds_at_most(memory: MemoryStore) -> None:
    clock = FakeClock()
    lease = acquire(memory, clock)
    for _ in range(100):  # ticks of a control loop, every 0.2 s
        clock.sleep(0.2)
        lease.heartbeat()
    assert HEARTBEAT_SECONDS == 2
    assert 9 <= read_heartbeats(memory) <= 10
    assert memory.written_keys().count(epoch_key(1)) == 1 + read_heartbeats(memory)
    assert not json.loads(memory.read(epoch_key(1)).data)["released"]


def test_owner_that_sees_a_newer_epoch_stops(store: Store) -> None:
    clock, follower_clock = FakeClock(), FakeClock()
    suspended = acquire(store, clock)
    follower = acquire(store, follower_clock)
    clock.now += 60
    follower_clock.now += 60
    with pytest.raises(Temporary, match="another driver") as raised:
        suspended.heartbeat()
    assert raised.value.exit_code == 75
    suspended.release()  # does not affect the follower
    with pytest.raises(Temporary):
        acquire(store, FakeClock(follower.heartbeat))


def test_owner_whose_epoch_was_deleted_stops(memory: MemoryStore) -> None:
    clock = FakeClock()
    suspended = acquire(memory, clock)
    for _ in range(2):
        acquire(memory).release()
    assert epoch_key(1) not in memory.stored_keys()
    clock.now += 60
    with pytest.raises(Temporary):
        suspended.heartbeat()
    suspended.release()
    assert epoch_key(1) not in memory.stored_keys()


def test_owner_that_finds_no_epoch_stops(memory: MemoryStore) -> None:
    clock = FakeClock()
    lease = acquire(memory, clock)
    memory.delete(epoch_key(1))
    clock.now += 60
    with pytest.raises(Temporary):
        lease.heartbeat()


# --- doubtful answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_doubtful_answer_to_the_first_write_is_checked(memory: MemoryStore, fault: Fault) -> None:
    memory.inject("put_if_absent", epoch_key(1), fault)
    clock = FakeClock()
    lease = acquire(memory, clock)
    assert (lease.epoch, clock.now) == (1, 1000.0)
    clock.now += 5
    lease.heartbeat()
    lease.release()
    assert acquire(memory, clock).epoch == 2


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_doubtful_answer_to_a_heartbeat_is_checked(memory: MemoryStore, fault: Fault) -> None:
    clock = FakeClock()
    lease = acquire(memory, clock)
    memory.inject("replace_if_match", epoch_key(1), fault, skip=1)
    for count in range(1, 5):
        clock.now += 2
        lease.heartbeat()
        assert read_heartbeats(memory) == count


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_doubtful_answer_to_the_release_is_checked(memory: MemoryStore, fault: Fault) -> None:
    lease = acquire(memory)
    memory.inject("replace_if_match", epoch_key(1), fault)
    lease.release()
    clock = FakeClock()
    assert acquire(memory, clock).epoch == 2
    assert clock.now == 1000.0


def test_unavailable_store_is_a_temporary_error(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", epoch_key(1), Fault.DOWN)
    with pytest.raises(Unavailable):
        acquire(memory)
    clock = FakeClock()
    lease = acquire(memory, clock)
    memory.inject("replace_if_match", epoch_key(1), Fault.DOWN, times=2)
    clock.now += 5
    with pytest.raises(Unavailable):
        lease.heartbeat()
    lease.release()  # raises nothing: the run has ended with another error, which must not be hidden


def test_store_that_refuses_every_write_is_a_temporary_error(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", epoch_key(1), Fault.CONFLICT, times=100)
    with pytest.raises(Temporary):
        acquire(memory)
    other = MemoryStore()
    clock = FakeClock()
    lease = acquire(other, clock)
    other.inject("replace_if_match", epoch_key(1), Fault.CONFLICT, times=100)
    clock.now += 5
    with pytest.raises(Temporary):
        lease.heartbeat()
    assert len(other.written_keys()) < 10


@pytest.mark.parametrize("fault", [Fault.KILLED_BEFORE, Fault.KILLED_AFTER])
def test_driver_killed_during_acquire_delays_the_next_one_by_the_expiry(memory: MemoryStore, fault: Fault) -> None:
    acquire(memory).release()
    killed = memory.client()
    killed.inject("put_if_absent", epoch_key(2), fault)
    with pytest.raises(Killed):
        acquire(killed)
    clock = FakeClock()
    assert acquire(memory, clock).epoch == (3 if fault is Fault.KILLED_AFTER else 2)
    assert clock.now - 1000 < 21


def test_suspended_newcomer_does_not_recreate_a_deleted_epoch(memory: MemoryStore) -> None:
    acquire(memory).release()
    late_store = memory.client()

    def let_others_come_and_go() -> None:
        for _ in range(3):
            acquire(memory).release()

    late_store.inject("put_if_absent", epoch_key(2), let_others_come_and_go)
    with pytest.raises(Temporary, match="another driver"):
        acquire(late_store)
    assert memory.stored_keys() == [epoch_key(3), epoch_key(4)]


def test_lease_of_an_unused_output_leaves_no_trace(store: Store) -> None:
    acquire(store).release(is_unused=lambda: True)
    assert list(store.list("")) == []
    assert acquire(store).epoch == 1


def test_newcomer_takes_over_from_an_owner_that_left_no_trace(store: Store) -> None:
    owner = acquire(store)
    clock = FakeClock(lambda: owner.release(is_unused=lambda: True) if clock.now == 1003 else None)
    assert acquire(store, clock).epoch == 2
    assert clock.now < 1004


def test_lost_lease_is_not_deleted(memory: MemoryStore) -> None:
    suspended = acquire(memory)
    follower = acquire(memory)
    suspended.release(is_unused=lambda: True)
    follower.confirm_ownership()


def test_lease_is_lost_even_if_the_newer_one_cannot_be_read(memory: MemoryStore) -> None:
    suspended = acquire(memory)
    acquire(memory.client())
    memory.inject("read", epoch_key(2), Fault.DOWN)
    with pytest.raises(Temporary, match="another driver is at work"):
        suspended.confirm_ownership()
