"""One driver at a time: who waits, who takes over, who stops, on a clock that only the tests move."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from memory_store import Fault, Killed, MemoryStore
from seaweed import Seaweed

from batchjob.driver.lease import EXPIRY_SECONDS, HEARTBEAT_SECONDS, Lease
from batchjob.errors import Temporary, Unavailable
from batchjob.storage.store import Store, open_store


class Clock:
    """Seconds that pass only by `sleep`; `meanwhile` happens in each of them."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now, self.meanwhile = 1000.0, meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


def acquire(store: Store, clock: Clock | None = None, note: Callable[[str], None] = lambda text: None) -> Lease:
    clock = clock or Clock()
    return Lease.acquire(store, clock=clock, sleep=clock.sleep, note=note)


def key(epoch: int) -> str:
    return f"_batchjob/lease/{epoch:010d}.json"


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(params=["memory", "disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty output, of each kind."""
    if request.param == "memory":
        return MemoryStore()
    if request.param == "disk":
        return open_store(str(tmp_path / "out"))
    s3: Seaweed = request.getfixturevalue("s3")
    return open_store(s3.bucket() + "out")


# --- taking it ------------------------------------------------------------------------------------------------------


def test_a_free_lease_is_taken_at_once(store: Store) -> None:
    clock = Clock()
    lease = acquire(store, clock)
    assert (lease.epoch, clock.now) == (1, 1000.0)
    where, word = lease.visibility_check
    assert word.encode() in store.read(where).data


def test_a_released_lease_is_taken_at_once(store: Store) -> None:
    clock = Clock()
    for epoch in range(1, 5):
        lease = acquire(store, clock)
        assert lease.epoch == epoch
        lease.release()
    assert clock.now == 1000.0
    assert [stat.uri for stat in store.list("_batchjob/lease/")] == [key(3), key(4)]  # older ones are swept


def test_a_silent_owner_is_replaced_after_twenty_seconds(store: Store) -> None:
    acquire(store)
    clock, notes = Clock(), list[str]()
    lease = acquire(store, clock, notes.append)
    assert lease.epoch == 2
    assert EXPIRY_SECONDS == 20
    assert 20 <= clock.now - 1000 < 21
    assert len(notes) == 1
    assert "process" in notes[0]


@pytest.mark.parametrize("after", [0.5, 1.0, 10.0, 19.0])
def test_an_owner_that_shows_life_keeps_it(store: Store, after: float) -> None:
    owners = Clock()
    owner = acquire(store, owners)
    owners.now += HEARTBEAT_SECONDS
    clock = Clock(lambda: owner.heartbeat() if clock.now >= 1000 + after else None)
    with pytest.raises(Temporary, match="at work") as caught:
        acquire(store, clock)
    assert caught.value.exit_code == 75
    assert clock.now == 1000 + after
    assert [stat.uri for stat in store.list("_batchjob/lease/")] == [key(1)]


def test_an_owner_that_releases_is_followed_without_waiting_on(store: Store) -> None:
    owner = acquire(store)
    clock = Clock(lambda: owner.release() if clock.now == 1003 else None)
    assert acquire(store, clock).epoch == 2
    assert clock.now == 1003


def test_the_newcomers_clock_counts_not_the_owners(memory: MemoryStore) -> None:
    owners, clock = Clock(), Clock()
    owners.now = 9e9
    acquire(memory, owners)
    clock.now = -5.0
    assert acquire(memory, clock).epoch == 2
    assert 15 <= clock.now < 16


def test_only_successful_reads_count_as_silence(memory: MemoryStore) -> None:
    """Thirty seconds in which the store did not answer say nothing about the owner."""
    acquire(memory)
    clock = Clock()

    def slow() -> None:
        clock.now += 30

    memory.inject("list", "*", slow, skip=1)
    acquire(memory, clock)
    assert clock.now - 1000 >= 49


def test_a_store_that_does_not_answer_hands_over_nothing(memory: MemoryStore) -> None:
    acquire(memory)
    newcomer = memory.client()
    newcomer.inject("list", "*", Fault.DOWN, skip=5)
    with pytest.raises(Unavailable):
        acquire(newcomer)
    assert memory.stored_keys() == [key(1)]


def test_a_third_driver_that_was_faster_is_left_alone(memory: MemoryStore) -> None:
    acquire(memory)
    clock = Clock(lambda: memory.put_if_absent(key(2), memory.read(key(1)).data) if clock.now == 1005 else None)
    with pytest.raises(Temporary):
        acquire(memory.client(), clock)
    assert memory.stored_keys() == [key(1), key(2)]


@pytest.mark.parametrize("owned", [False, True], ids=["free", "silent"])
def test_of_two_newcomers_one_wins(memory: MemoryStore, owned: bool) -> None:
    if owned:
        acquire(memory)
    epoch = 1 + owned
    slow, fast, won = memory.client(), memory.client(), list[Lease]()
    slow.inject("put_if_absent", key(epoch), lambda: won.append(acquire(fast)))
    with pytest.raises(Temporary, match="another driver"):
        acquire(slow)
    assert [lease.epoch for lease in won] == [epoch]
    won[0].heartbeat()


def test_what_a_file_browser_left_among_the_epochs_is_passed_over(memory: MemoryStore) -> None:
    memory.put_if_absent("_batchjob/lease/.DS_Store", b"\0")
    acquire(memory).release()
    assert acquire(memory).epoch == 2


# --- keeping it -----------------------------------------------------------------------------------------------------


def beats(store: Store) -> int:
    """Of the first epoch."""
    found: int = json.loads(store.read(key(1)).data)["beats"]
    return found


def test_the_owner_rewrites_its_epoch_every_two_seconds_at_most(memory: MemoryStore) -> None:
    clock = Clock()
    lease = acquire(memory, clock)
    for _ in range(100):  # turns of a control loop of 0.2 s
        clock.sleep(0.2)
        lease.heartbeat()
    assert HEARTBEAT_SECONDS == 2
    assert 9 <= beats(memory) <= 10
    assert memory.written_keys().count(key(1)) == 1 + beats(memory)
    assert not json.loads(memory.read(key(1)).data)["released"]


def test_an_owner_that_sees_a_higher_epoch_stops(store: Store) -> None:
    clock, followers = Clock(), Clock()
    hung = acquire(store, clock)
    follower = acquire(store, followers)
    clock.now += 60
    followers.now += 60
    with pytest.raises(Temporary, match="another driver") as caught:
        hung.heartbeat()
    assert caught.value.exit_code == 75
    hung.release()  # changes nothing for the follower
    with pytest.raises(Temporary):
        acquire(store, Clock(follower.heartbeat))


def test_an_owner_whose_epoch_was_swept_stops(memory: MemoryStore) -> None:
    clock = Clock()
    hung = acquire(memory, clock)
    for _ in range(2):
        acquire(memory).release()
    assert key(1) not in memory.stored_keys()
    clock.now += 60
    with pytest.raises(Temporary):
        hung.heartbeat()
    hung.release()
    assert key(1) not in memory.stored_keys()


def test_an_owner_that_finds_no_lease_at_all_stops(memory: MemoryStore) -> None:
    clock = Clock()
    lease = acquire(memory, clock)
    memory.delete(key(1))
    clock.now += 60
    with pytest.raises(Temporary):
        lease.heartbeat()


# --- doubtful answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_no_answer_to_the_first_write_is_believed(memory: MemoryStore, fault: Fault) -> None:
    memory.inject("put_if_absent", key(1), fault)
    clock = Clock()
    lease = acquire(memory, clock)
    assert (lease.epoch, clock.now) == (1, 1000.0)
    clock.now += 5
    lease.heartbeat()
    lease.release()
    assert acquire(memory, clock).epoch == 2


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_no_answer_to_a_beat_is_believed(memory: MemoryStore, fault: Fault) -> None:
    clock = Clock()
    lease = acquire(memory, clock)
    memory.inject("replace_if_match", key(1), fault, skip=1)
    for count in range(1, 5):
        clock.now += 2
        lease.heartbeat()
        assert beats(memory) == count


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_no_answer_to_the_release_is_believed(memory: MemoryStore, fault: Fault) -> None:
    lease = acquire(memory)
    memory.inject("replace_if_match", key(1), fault)
    lease.release()
    clock = Clock()
    assert acquire(memory, clock).epoch == 2
    assert clock.now == 1000.0


def test_a_store_that_is_down_is_temporary(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", key(1), Fault.DOWN)
    with pytest.raises(Unavailable):
        acquire(memory)
    clock = Clock()
    lease = acquire(memory, clock)
    memory.inject("replace_if_match", key(1), Fault.DOWN, times=2)
    clock.now += 5
    with pytest.raises(Unavailable):
        lease.heartbeat()
    lease.release()  # says nothing: the run has ended for another reason, which must be heard


def test_a_store_that_refuses_every_write_is_temporary(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", key(1), Fault.CONFLICT, times=100)
    with pytest.raises(Temporary):
        acquire(memory)
    other = MemoryStore()
    clock = Clock()
    lease = acquire(other, clock)
    other.inject("replace_if_match", key(1), Fault.CONFLICT, times=100)
    clock.now += 5
    with pytest.raises(Temporary):
        lease.heartbeat()
    assert len(other.written_keys()) < 10


@pytest.mark.parametrize("fault", [Fault.KILLED_BEFORE, Fault.KILLED_AFTER])
def test_a_driver_killed_while_it_took_over_holds_up_nobody_for_long(memory: MemoryStore, fault: Fault) -> None:
    acquire(memory).release()
    dying = memory.client()
    dying.inject("put_if_absent", key(2), fault)
    with pytest.raises(Killed):
        acquire(dying)
    clock = Clock()
    assert acquire(memory, clock).epoch == (3 if fault is Fault.KILLED_AFTER else 2)
    assert clock.now - 1000 < 21


def test_who_looked_long_ago_does_not_take_an_epoch_that_was_swept(memory: MemoryStore) -> None:
    acquire(memory).release()
    late = memory.client()

    def others_come_and_go() -> None:
        for _ in range(3):
            acquire(memory).release()

    late.inject("put_if_absent", key(2), others_come_and_go)
    with pytest.raises(Temporary, match="another driver"):
        acquire(late)
    assert memory.stored_keys() == [key(3), key(4)]
