"""Cost of a billion images in 100,000 shards for the driver: its real code over a simulated store and pool.

    python -m benchmarks.scale                         # about two minutes
    python -m benchmarks.scale --planned 1000000000    # all of the plan, and not a part of it

All shards are really dispatched, committed, added up and resumed. Of the plan only half of a part is written, then the
whole part, and the rest is extrapolated from the difference. There is no network: requests are counted and printed with
the time that they would take at 50 ms each. Every figure comes from a process of its own.
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

from batchjob.driver.dispatcher import Dispatcher
from batchjob.driver.finalize import RunSummary, finalize_run
from batchjob.driver.plan_prefetcher import PlanPrefetcher
from batchjob.driver.progress import NoProgress
from batchjob.driver.run_state import RunState
from batchjob.job.runtime import ErrorBudget
from batchjob.plan.chunks import extend_plan
from batchjob.worker.messages import WorkerSetup
from benchmarks.simulated_cluster import HEAD, SHARD_ROWS, CountingStore, SimulatedPool, generate_chunks, generate_refs

__all__ = ["main"]

IMAGES = 1_000_000_000

_LATENCY = 0.05
_MAX_WAITING_SHARDS = 10_000  # as in the driver, which reads no more of the plan while so many shards wait


@dataclass(frozen=True)
class Cost:
    """Cost of a piece of the driver's work.

    Attributes:
        seconds: Time of the driver, in seconds.
        peak_bytes: Memory beyond that of the process before, in bytes.
        requests: Requests to the store, by verb.
        sent_bytes: Bytes sent to the store.
    """

    seconds: float
    peak_bytes: int
    requests: Counter[str]
    sent_bytes: int = 0

    def __str__(self) -> str:
        requests = ", ".join(f"{count:,} {verb}" for verb, count in sorted(self.requests.items()))
        return f"{self.seconds:9,.1f} s  {self.peak_bytes / 1e6:7,.0f} MB  {requests or 'none'}"


def main() -> None:
    """Measure and print all costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planned", type=int, default=20_000_000, help="images that are planned for real")
    parser.add_argument("--workers", type=int, default=1_000)
    options = parser.parse_args()
    _print(f"{IMAGES:,} images, {IMAGES // SHARD_ROWS:,} shards of {SHARD_ROWS:,}, {options.workers:,} workers")
    half, whole = (_run_in_process(_plan, rows) for rows in (options.planned // 2, options.planned))
    _print(f"plan of {options.planned // 2:>13,}   {half}")
    _print(f"plan of {options.planned:>13,}   {whole}")
    if options.planned < IMAGES:
        _print(f"plan of {IMAGES:>13,}   {_extrapolate(half, whole, options.planned)}   (extrapolated)")
    for workers in sorted({options.workers // 10, options.workers}):
        _print(f"hand out to {workers:>6,}      {_run_in_process(_dispatch, workers)}")
    _print(f"resume, all committed   {_run_in_process(_resume, options.workers)}")
    puts = IMAGES // SHARD_ROWS / (65_536 // SHARD_ROWS)
    minutes, hours = puts * 2 * _LATENCY / 60, IMAGES / 1000 * _LATENCY / 3600
    _print(f"the plan's chunks are put one after the other: {minutes:.0f} min at 50 ms, beside the work")
    _print(f"a prefix would be listed by {IMAGES // 1000:,} requests in a row: {hours:.0f} h")


def _plan(images: int) -> Cost:
    """Write a plan of so many images."""
    store = CountingStore()
    return _measure(
        store,
        lambda: Counter(1 for _ in extend_plan(store, HEAD, lambda after: generate_refs(after, images), _do_nothing)),
    )


def _dispatch(workers: int) -> Cost:
    """Dispatch all shards to so many workers, take in their commits, add up and finish."""
    store = CountingStore()
    return _measure(store, lambda: _drive(store, workers))


def _resume(workers: int) -> Cost:
    """Resume an output that holds all parts but no `_SUCCESS`."""
    store = CountingStore()
    store.add_parts(key for chunk in generate_chunks(IMAGES) for key in chunk.shards)
    return _measure(store, lambda: _drive(store, workers))


def _drive(store: CountingStore, workers: int) -> None:
    """Run the driver's loop until all shards are committed."""
    run_state = RunState(store, _do_nothing)
    if run_state.part_count:
        run_state.read_existing_parts(HEAD, _do_nothing)
    dispatcher = Dispatcher(3, lambda: SimulatedPool(workers, store), NoProgress(), run_state.record_commit)
    dispatcher.start(WorkerSetup({}, "."))
    prefetcher, scheduler = PlanPrefetcher(generate_chunks(IMAGES)), dispatcher.scheduler
    while not (prefetcher.finished and scheduler.idle):
        while scheduler.waiting < _MAX_WAITING_SHARDS and (chunk := prefetcher.next_chunk(0.01)) is not None:
            scheduler.add(run_state.add_chunk(chunk)[1])
        dispatcher.dispatch(0)
        dispatcher.collect_events(0.0)
    run = RunSummary(
        run_state.expected_rows,
        run_state.new_parts,
        (),
        tuple(dispatcher.workers[:1]),
        1.0,
        run_state.existing_parts,
    )
    result = finalize_run(store, HEAD, run, budget=ErrorBudget(), summarize=lambda sums: {}, heartbeat=_do_nothing)
    assert (result.status, result.predicted) == ("complete", IMAGES), result


def _measure(store: CountingStore, work: Callable[[], object]) -> Cost:
    before = _peak_memory()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return Cost(seconds, max(0, _peak_memory() - before), Counter(store.requests), store.sent_bytes)


def _peak_memory() -> int:
    """Return the largest memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _extrapolate(half: Cost, whole: Cost, images: int) -> Cost:
    """Extrapolate linearly from half of `images` and all of them to `IMAGES`; memory is the larger of the two.

    Example: 10 million images cost 4 s and 20 million 7 s, so each further 10 million cost 3 s.
    """
    halves = (IMAGES - images) / (images / 2)
    requests = Counter({verb: round(n + (n - half.requests[verb]) * halves) for verb, n in whole.requests.items()})
    seconds = whole.seconds + (whole.seconds - half.seconds) * halves
    sent_bytes = round(whole.sent_bytes + (whole.sent_bytes - half.sent_bytes) * halves)
    return Cost(seconds, max(half.peak_bytes, whole.peak_bytes), requests, sent_bytes)


def _run_in_process(work: Callable[[int], Cost], argument: int) -> Cost:
    """Run work in a process of its own, whose peak memory nothing else has raised."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, argument).result()


def _do_nothing() -> None:
    """Stand in for the lease's heartbeat and for the check that a manifest is unchanged."""


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
