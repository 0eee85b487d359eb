"""The thread that lists: what it hands on, in which order, what stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from batchjob.driver.plan_prefetcher import PlanPrefetcher
from batchjob.errors import InvalidJob, Unavailable
from batchjob.plan.chunks import Chunk
from batchjob.types import Cursor

PATIENCE = 60.0  # seconds, for what another thread does at once


def chunk(number: int) -> Chunk:
    return Chunk(number, number * 10, Cursor(number * 10 + 10), is_last=False, shards=())


def chunks(count: int, asked: list[int] | None = None) -> Iterator[Chunk]:
    """So many chunks; `asked` grows as they are asked for."""
    for number in range(count):
        if asked is not None:
            asked.append(number)
        yield chunk(number)


def until(holds: Callable[[], bool]) -> None:
    """Wait for what another thread will make true."""
    pause = threading.Event()
    for _ in range(int(PATIENCE * 200)):
        if holds():
            return
        pause.wait(0.005)
    raise AssertionError("it never came true")


def take(feeder: PlanPrefetcher) -> Chunk | None:
    """The next chunk, or None after the last."""
    found: list[Chunk] = []

    def came() -> bool:
        if (item := feeder.next_chunk()) is not None:
            found.append(item)
        return bool(found) or feeder.finished

    until(came)
    return found[0] if found else None


def ended(feeder: PlanPrefetcher) -> bool:
    return not feeder._thread.is_alive()


# --- Feeder ---------------------------------------------------------------------------------------------------------


def test_chunks_come_in_order_and_then_the_end() -> None:
    feeder = PlanPrefetcher(chunks(20))
    numbers = []
    while (item := take(feeder)) is not None:
        numbers.append(item.number)
    assert numbers == list(range(20))
    assert feeder.finished
    assert feeder.next_chunk() is None  # as often as one asks
    assert feeder.finished
    until(lambda: ended(feeder))


def test_taking_never_waits() -> None:
    go_on = threading.Event()

    def late() -> Iterator[Chunk]:
        go_on.wait(PATIENCE)
        yield chunk(0)

    feeder = PlanPrefetcher(late())
    assert feeder.next_chunk() is None
    assert not feeder.finished  # nothing is there yet, which is not the end
    go_on.set()
    assert take(feeder) == chunk(0)
    assert take(feeder) is None


def test_taking_may_wait_a_while() -> None:
    feeder = PlanPrefetcher(chunks(2))
    assert feeder.next_chunk(PATIENCE) == chunk(0)
    assert feeder.next_chunk(PATIENCE) == chunk(1)
    assert feeder.next_chunk(PATIENCE) is None
    assert feeder.finished
    assert feeder.next_chunk(PATIENCE) is None  # and does not wait for what cannot come


def test_only_a_few_are_read_ahead() -> None:
    asked: list[int] = []
    feeder = PlanPrefetcher(chunks(1000, asked))
    until(lambda: len(asked) >= 5)
    for _ in range(10):
        assert take(feeder) is not None
        assert len(asked) <= 10 + 6
    feeder.close()
    until(lambda: ended(feeder))


@pytest.mark.parametrize("error", [InvalidJob("the manifest changed"), Unavailable("no network"), KeyError("a bug")])
def test_what_stops_the_source_is_raised_by_take(error: Exception) -> None:
    def breaks() -> Iterator[Chunk]:
        yield from chunks(2)
        raise error

    feeder = PlanPrefetcher(breaks())
    assert take(feeder) == chunk(0)
    assert take(feeder) == chunk(1)
    with pytest.raises(type(error)) as caught:
        take(feeder)
    assert caught.value is error
    assert not feeder.finished
    until(lambda: ended(feeder))


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_after_close_nothing_more_is_listed(taken: int) -> None:
    asked: list[int] = []
    feeder = PlanPrefetcher(chunks(1000, asked))
    for _ in range(taken):
        take(feeder)
    feeder.close()
    until(lambda: ended(feeder))
    assert len(asked) <= taken + 6
    assert not feeder.finished


def test_close_does_not_wait_for_a_source_that_hangs() -> None:
    go_on, listing = threading.Event(), threading.Event()
    asked: list[int] = []

    def hangs() -> Iterator[Chunk]:
        listing.set()
        go_on.wait(PATIENCE)
        yield from chunks(1000, asked)

    feeder = PlanPrefetcher(hangs())
    assert listing.wait(PATIENCE)
    feeder.close()
    assert not ended(feeder)
    go_on.set()
    until(lambda: ended(feeder))
    assert asked == [0]


def test_an_error_after_close_is_nobodys() -> None:
    listing, go_on = threading.Event(), threading.Event()

    def breaks() -> Iterator[Chunk]:
        listing.set()
        go_on.wait(PATIENCE)
        yield from chunks(0)
        raise Unavailable("no network")

    feeder = PlanPrefetcher(breaks())
    assert listing.wait(PATIENCE)
    feeder.close()
    go_on.set()
    until(lambda: ended(feeder))
    assert feeder.next_chunk() is None
