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

from benchmarks.simulated_cluster import HEAD, SHARD_ROWS, CountingStore, SimulatedPool, generate_chunks, generate_refs

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
    peak_bytes: int
    requests: Counter[str]
    sent_bytes: int = 0

    def __str__(self) -> str:
        requests = ", ".join(f"{count:,} {verb}" for verb, count in sorted(self.requests.items()))
        return f"{self.seconds:9,.1f} s  {self.peak_bytes / 1e6:7,.0f} MB  {requests or 'none'}"


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
    from batchjob.plan.chunks import extend_plan

    store = CountingStore()
    return _cost(
        store,
        lambda: Counter(1 for _ in extend_plan(store, HEAD, lambda after: generate_refs(after, images), _nothing)),
    )


def _schedule(workers: int) -> Cost:
    """Hand out all shards to so many workers, hear of their commits, add up and finish."""
    store = CountingStore()
    return _cost(store, lambda: _drive(store, workers))


def _resume(workers: int) -> Cost:
    """The same where all parts are there already, but no `_SUCCESS`."""
    store = CountingStore()
    store.add_parts(key for chunk in generate_chunks(IMAGES) for key in chunk.shards)
    return _cost(store, lambda: _drive(store, workers))


def _drive(store: CountingStore, workers: int) -> None:
    from batchjob.driver.dispatcher import Dispatcher
    from batchjob.driver.finalize import RunSummary, finalize_run
    from batchjob.driver.plan_prefetcher import PlanPrefetcher
    from batchjob.driver.progress import NoProgress
    from batchjob.driver.run_state import RunState
    from batchjob.job.runtime import ErrorBudget
    from batchjob.worker.messages import WorkerSetup

    books = RunState(store, _nothing)
    resumed = bool(books.part_count)
    if resumed:
        books.read_existing_parts(HEAD, _nothing)
    dispatch = Dispatcher(3, lambda: SimulatedPool(workers, store), NoProgress(), books.record_commit)
    dispatch.start(WorkerSetup({}, "."))
    feeder, schedule = PlanPrefetcher(generate_chunks(IMAGES)), dispatch.scheduler
    while not (feeder.finished and schedule.idle):
        while schedule.waiting < _ENOUGH and (chunk := feeder.next_chunk(0.01)) is not None:
            schedule.add(books.add_chunk(chunk)[1])
        dispatch.dispatch(0)
        dispatch.collect_events(0.0)
    loaded = tuple(dispatch.workers[:1])
    run = RunSummary(books.expected_rows, books.new_parts, (), loaded, 1.0, books.existing_parts)
    outcome = finalize_run(store, HEAD, run, budget=ErrorBudget(), summarize=lambda sums: {}, heartbeat=_nothing)
    assert (outcome.status, outcome.predicted) == ("complete", IMAGES), outcome


def _cost(store: CountingStore, work: Callable[[], object]) -> Cost:
    before = _resident()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return Cost(seconds, max(0, _resident() - before), Counter(store.requests), store.sent_bytes)


def _resident() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _extrapolated(half: Cost, whole: Cost, images: int) -> Cost:
    """Costs grow with the images beyond a fixed beginning; memory is the larger of the two."""
    more = (IMAGES - images) / (images / 2)
    requests = Counter({verb: round(n + (n - half.requests[verb]) * more) for verb, n in whole.requests.items()})
    seconds = whole.seconds + (whole.seconds - half.seconds) * more
    return Cost(
        seconds,
        max(half.peak_bytes, whole.peak_bytes),
        requests,
        round(whole.sent_bytes + (whole.sent_bytes - half.sent_bytes) * more),
    )


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
