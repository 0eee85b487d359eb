"""A billion images in 100,000 shards: what the driver needs for them, by its own rooms over a simulated store and pool.

    python -m benchmarks.scale                         # about two minutes
    python -m benchmarks.scale --planned 1000000000    # all of the plan, and not a part of it

The shards are all handed out, committed, added up and resumed for real; of the plan a part is written, twice as much
once more, and the rest follows from the difference. No network: requests are counted, and said with what they would
take at 50 ms each. Every figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from benchmarks.billion import HEAD, SHARD_ROWS, CountingStore, SimulatedPool, chunks, refs

__all__ = ["main"]

IMAGES = 1_000_000_000
_LATENCY = 0.05
_ENOUGH = 10_000  # as the driver: it takes in no more of the plan while so many shards wait


@dataclass(frozen=True)
class Cost:
    """What something took.

    Attributes:
        seconds: of the driver.
        peak: bytes of memory on top of what it was before.
        requests: to the store, by verb.
        sent: bytes.
    """

    seconds: float
    peak: int
    requests: Counter[str]
    sent: int = 0

    def __str__(self) -> str:
        requests = ", ".join(f"{count:,} {verb}" for verb, count in sorted(self.requests.items()))
        return f"{self.seconds:9,.1f} s  {self.peak / 1e6:7,.0f} MB  {requests or 'none'}"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--planned", type=int, default=20_000_000, help="images that are planned for real")
    asked.add_argument("--workers", type=int, default=1_000)
    given = asked.parse_args()
    _say(f"{IMAGES:,} images, {IMAGES // SHARD_ROWS:,} shards of {SHARD_ROWS:,}, {given.workers:,} workers")
    half, whole = (_apart(_plan, rows) for rows in (given.planned // 2, given.planned))
    _say(f"plan of {given.planned // 2:>13,}   {half}")
    _say(f"plan of {given.planned:>13,}   {whole}")
    if given.planned < IMAGES:
        _say(f"plan of {IMAGES:>13,}   {_extrapolated(half, whole, given.planned)}   (extrapolated)")
    for workers in sorted({given.workers // 10, given.workers}):
        _say(f"hand out to {workers:>6,}      {_apart(_schedule, workers)}")
    _say(f"resume, all committed   {_apart(_resume, given.workers)}")
    puts = IMAGES // SHARD_ROWS / (65_536 // SHARD_ROWS)
    _say(f"the plan's chunks are put one after the other: {puts * 2 * _LATENCY / 60:.0f} min at 50 ms, beside the work")
    _say(f"a prefix would be listed by {IMAGES // 1000:,} requests in a row: {IMAGES / 1000 * _LATENCY / 3600:.0f} h")


def _plan(images: int) -> Cost:
    """Write a plan of so many images, by the rooms that do it."""
    from batchjob.plan.chunks import extend

    store = CountingStore()
    return _cost(store, lambda: Counter(1 for _ in extend(store, HEAD, lambda after: refs(after, images), _nothing)))


def _schedule(workers: int) -> Cost:
    """Hand out all shards to so many workers, hear of their commits, add up and finish."""
    store = CountingStore()
    return _cost(store, lambda: _drive(store, workers))


def _resume(workers: int) -> Cost:
    """The same where all parts are there already, but no `_SUCCESS`."""
    store = CountingStore()
    store.fill(key for chunk in chunks(IMAGES) for key in chunk.shards)
    return _cost(store, lambda: _drive(store, workers))


def _drive(store: CountingStore, workers: int) -> None:
    from batchjob.driver.dispatcher import Dispatch
    from batchjob.driver.finalize import Run, conclude
    from batchjob.driver.plan_prefetcher import Feeder
    from batchjob.driver.progress import Quiet
    from batchjob.driver.run_state import Books
    from batchjob.job.runtime import ErrorBudget
    from batchjob.worker.messages import Setup

    books = Books(store, _nothing)
    resumed = bool(books.parts)
    if resumed:
        books.look_back(HEAD, _nothing)
    dispatch = Dispatch(3, lambda: SimulatedPool(workers, store), Quiet(), books.commit)
    dispatch.start(Setup({}, "."))
    feeder, schedule = Feeder(chunks(IMAGES)), dispatch.schedule
    while not (feeder.finished and schedule.idle):
        while schedule.waiting < _ENOUGH and (chunk := feeder.take(0.01)) is not None:
            schedule.add(books.add(chunk)[1])
        dispatch.hand_out(0)
        dispatch.listen(0.0)
    loaded = tuple(dispatch.workers[:1])
    run = Run(books.expected, books.fresh, (), loaded, 1.0, books.older)
    outcome = conclude(store, HEAD, run, budget=ErrorBudget(), summary=lambda sums: {}, beat=_nothing)
    assert (outcome.status, outcome.predicted) == ("complete", IMAGES), outcome


def _cost(store: CountingStore, work: Callable[[], object]) -> Cost:
    before = _resident()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return Cost(seconds, max(0, _resident() - before), Counter(store.requests), store.sent)


def _resident() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _extrapolated(half: Cost, whole: Cost, images: int) -> Cost:
    """Costs grow with the images beyond a fixed beginning; memory is the larger of the two."""
    more = (IMAGES - images) / (images / 2)
    requests = Counter({verb: round(n + (n - half.requests[verb]) * more) for verb, n in whole.requests.items()})
    seconds = whole.seconds + (whole.seconds - half.seconds) * more
    return Cost(seconds, max(half.peak, whole.peak), requests, round(whole.sent + (whole.sent - half.sent) * more))


def _apart(work: Callable[[int], Cost], argument: int) -> Cost:
    """In a process of its own, whose memory nobody else has raised."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, argument).result()


def _nothing() -> None:
    """No lease to beat, no manifest that may have changed."""


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
