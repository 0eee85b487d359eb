"""Plan prefetcher: order of chunks, waiting, errors and close."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from batchjob.driver.plan_prefetcher import PlanPrefetcher
from batchjob.errors import InvalidJob, Unavailable
from batchjob.plan.chunks import Chunk
from batchjob.types import Cursor

TIMEOUT_SECONDS = 60.0  # for what another thread does at once


def make_chunk(number: int) -> Chunk:
    return Chunk(number, number * 10, Cursor(number * 10 + 10), is_last=False, shards=())


def iter_chunks(count: int, requested: list[int] | None = None) -> Iterator[Chunk]:
    """Yield chunks; `requested` gets the number of each chunk that is asked for."""
    for number in range(count):
        if requested is not None:
            requested.append(number)
        yield make_chunk(number)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until another thread makes the condition true."""
    pause = threading.Event()
    for _ in range(int(TIMEOUT_SECONDS * 200)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it never came true")


def take_chunk(prefetcher: PlanPrefetcher) -> Chunk | None:
    """Wait for the next chunk; None after the last."""
    chunks: list[Chunk] = []

    def has_answer() -> bool:
        if (item := prefetcher.next_chunk()) is not None:
            chunks.append(item)
        return bool(chunks) or prefetcher.finished

    wait_until(has_answer)
    return chunks[0] if chunks else None


def has_ended(prefetcher: PlanPrefetcher) -> bool:
    return not prefetcher._thread.is_alive()


def test_chunks_come_in_order() -> None:
    prefetcher = PlanPrefetcher(iter_chunks(20))
    numbers = []
    while (item := take_chunk(prefetcher)) is not None:
        numbers.append(item.number)
    assert numbers == list(range(20))
    assert prefetcher.finished
    assert prefetcher.next_chunk() is None  # however often it is called
    assert prefetcher.finished
    wait_until(lambda: has_ended(prefetcher))


def test_next_chunk_does_not_wait_by_default() -> None:
    resume = threading.Event()

    def slow_chunks() -> Iterator[Chunk]:
        resume.wait(TIMEOUT_SECONDS)
        yield make_chunk(0)

    prefetcher = PlanPrefetcher(slow_chunks())
    assert prefetcher.next_chunk() is None
    assert not prefetcher.finished  # nothing is ready yet, which is not the end
    resume.set()
    assert take_chunk(prefetcher) == make_chunk(0)
    assert take_chunk(prefetcher) is None


def test_next_chunk_waits_for_its_timeout() -> None:
    prefetcher = PlanPrefetcher(iter_chunks(2))
    assert prefetcher.next_chunk(TIMEOUT_SECONDS) == make_chunk(0)
    assert prefetcher.next_chunk(TIMEOUT_SECONDS) == make_chunk(1)
    assert prefetcher.next_chunk(TIMEOUT_SECONDS) is None
    assert prefetcher.finished
    assert prefetcher.next_chunk(TIMEOUT_SECONDS) is None  # without waiting, since nothing can come


def test_only_a_few_chunks_are_prefetched() -> None:
    requested: list[int] = []
    prefetcher = PlanPrefetcher(iter_chunks(1000, requested))
    wait_until(lambda: len(requested) >= 5)
    for _ in range(10):
        assert take_chunk(prefetcher) is not None
        assert len(requested) <= 10 + 6
    prefetcher.close()
    wait_until(lambda: has_ended(prefetcher))


@pytest.mark.parametrize("error", [InvalidJob("the manifest changed"), Unavailable("no network"), KeyError("a bug")])
def test_error_of_the_iterator_is_raised_by_next_chunk(error: Exception) -> None:
    def broken_chunks() -> Iterator[Chunk]:
        yield from iter_chunks(2)
        raise error

    prefetcher = PlanPrefetcher(broken_chunks())
    assert take_chunk(prefetcher) == make_chunk(0)
    assert take_chunk(prefetcher) == make_chunk(1)
    with pytest.raises(type(error)) as caught:
        take_chunk(prefetcher)
    assert caught.value is error
    assert not prefetcher.finished
    wait_until(lambda: has_ended(prefetcher))


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_iteration_stops_after_close(taken: int) -> None:
    requested: list[int] = []
    prefetcher = PlanPrefetcher(iter_chunks(1000, requested))
    for _ in range(taken):
        take_chunk(prefetcher)
    prefetcher.close()
    wait_until(lambda: has_ended(prefetcher))
    assert len(requested) <= taken + 6
    assert not prefetcher.finished


def test_close_does_not_wait_for_a_hanging_iterator() -> None:
    resume, listing = threading.Event(), threading.Event()
    requested: list[int] = []

    def hanging_chunks() -> Iterator[Chunk]:
        listing.set()
        resume.wait(TIMEOUT_SECONDS)
        yield from iter_chunks(1000, requested)

    prefetcher = PlanPrefetcher(hanging_chunks())
    assert listing.wait(TIMEOUT_SECONDS)
    prefetcher.close()
    assert not has_ended(prefetcher)
    resume.set()
    wait_until(lambda: has_ended(prefetcher))
    assert requested == [0]


def test_error_after_close_is_ignored() -> None:
    listing, resume = threading.Event(), threading.Event()

    def broken_chunks() -> Iterator[Chunk]:
        listing.set()
        resume.wait(TIMEOUT_SECONDS)
        yield from iter_chunks(0)
        raise Unavailable("no network")

    prefetcher = PlanPrefetcher(broken_chunks())
    assert listing.wait(TIMEOUT_SECONDS)
    prefetcher.close()
    resume.set()
    wait_until(lambda: has_ended(prefetcher))
    assert prefetcher.next_chunk() is None
