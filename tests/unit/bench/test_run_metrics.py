"""Metrics of a run, from timings whose figures can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from batchjob.bench.results import RunMetrics
from batchjob.bench.run_metrics import compute_run_metrics
from batchjob.types import StageTiming

WORKER_PID, FIRST_LOADER, SECOND_LOADER = 1, 2, 3


def time_stage(stage: str, started: float, ended: float, images: int = 10, pid: int = WORKER_PID) -> StageTiming:
    return StageTiming(stage, started, ended, pid, images)


def compute(
    timings: Sequence[StageTiming],
    *,
    images: int,
    ended: float,
    failed: int = 0,
    cpu_seconds: float = 0.0,
    ahead: int = 0,
    parallel_batches: int = 1,
) -> RunMetrics:
    """Compute the metrics of a run that began at 100 s, of a worker that was ready after 5 s."""
    timings = [*timings, time_stage("wait", 100.0, 100.0, 0), time_stage("commit", ended, ended, images)]
    return compute_run_metrics(timings, failed, cpu_seconds, 5.0, ahead, parallel_batches)


# Three batches of ten images. The forward loop waits 1 s for the first one, 3 s for the second one and 1 ms for the
# third one, and works 1 s on each: [101, 102], [105, 106], [106.001, 107]. The last part is committed at 110 s.
FORWARD = [
    time_stage("forward", 101.0, 102.0),
    time_stage("forward", 105.0, 106.0),
    time_stage("forward", 106.001, 107.0),
]
WAITS = [time_stage("wait", 100.0, 101.0), time_stage("wait", 102.0, 105.0), time_stage("wait", 106.0, 106.001)]


# -- steady rate


@pytest.mark.parametrize(
    ("batch", "seconds", "loaded_ahead", "rate", "steady"),
    [
        # Batches end at 101, 102, … 110 s. From 10 images at 101 s to 90 at 109 s: 80 / 8.
        (10, [1.0] * 10, 0, 10.0, True),
        # The first 40 images were loaded in advance. From 40 at 102 s to 90 at 107 s: 50 / 5; the quick ones are out.
        (10, [0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 40, 10.0, True),
        # The last 10 % are out too: from 10 at 101 s to 90 at 109 s, although the last batch takes 60 s.
        (10, [1.0] * 9 + [60.0], 0, 10.0, True),
        # The first 10 % are out: from 10 images at 161 s to 90 at 169 s, although the second batch takes 60 s.
        (5, [1.0, 60.0] + [0.5] * 18, 0, 10.0, True),
        # Only one batch ends after the 90 images loaded in advance and by 90 %: over all of it, 100 images in 10 s.
        (10, [1.0] * 10, 90, 10.0, False),
        # Two batches of 50: only one of them ends between 10 % and 90 %. 100 images in 4 s.
        (50, [1.0, 3.0], 0, 25.0, False),
    ],
    ids=["10 to 90 %", "loaded in advance", "slow end", "slow start", "all in advance", "two batches"],
)
def test_rate_is_steady_between_10_and_90_percent(
    batch: int, seconds: list[float], loaded_ahead: int, rate: float, steady: bool
) -> None:
    ends = [100.0 + sum(seconds[: count + 1]) for count in range(len(seconds))]
    timings = [time_stage("forward", end - 0.1, end, batch) for end in ends]
    # Timings may arrive in any order.
    run = compute(timings[::-1], images=100, ended=ends[-1], ahead=loaded_ahead)
    assert run.images_per_second == pytest.approx(rate)
    assert run.steady is steady


def test_batches_that_end_together_give_no_steady_rate() -> None:
    timings = [time_stage("forward", 100.0, 102.0, 20) for _ in range(5)]
    run = compute(timings, images=100, ended=104.0)
    assert (run.images_per_second, run.steady) == (25.0, False)


# -- metrics of a run


def test_times_count_from_the_start_of_the_worker() -> None:
    run = compute([*FORWARD, *WAITS], images=30, failed=2, ended=110.0)
    # Ready after 5 s, then 2 s until the first batch was predicted and 10 s until the last commit.
    assert (run.load_s, run.first_batch_s, run.total_s) == (5.0, 7.0, 15.0)
    assert (run.images, run.failed) == (30, 2)


def test_starvation_is_the_share_of_waits_after_the_first_batch() -> None:
    # Between 102 s and 107 s the loop waited 3.001 s. The wait for the first batch does not count.
    assert compute([*FORWARD, *WAITS], images=30, ended=110.0).starvation == pytest.approx(3.001 / 5)


def test_wait_counts_only_while_no_batch_is_at_work() -> None:
    # Each batch is on its way while the loop waits for the next one, as on a GPU: nothing is idle between 101 s and
    # 103 s, although the loop waits all that time.
    forward = [time_stage("forward", 100.0 + second, 101.0 + second) for second in range(3)]
    waits = [time_stage("wait", 101.0, 102.0), time_stage("wait", 102.0, 103.0)]
    assert compute([*forward, *waits], images=30, ended=103.0).starvation == 0.0


def test_parallel_batches_are_starved_while_fewer_are_at_work() -> None:
    # Two batches at once from 101 s on. Between 102 s and 106 s each of two lanes could work 4 s; they work 3 + 2 s.
    forward = [
        time_stage("forward", 101.0, 102.0),
        time_stage("forward", 102.0, 105.0),
        time_stage("forward", 104.0, 106.0),
    ]
    run = compute(forward, images=30, ended=106.0, parallel_batches=2)
    assert run.starvation == pytest.approx(3 / 8)


def test_wait_that_ends_without_a_batch_is_not_counted() -> None:
    last = time_stage("wait", 107.0, 110.0, images=0)
    assert compute([*FORWARD, *WAITS, last], images=30, ended=110.0).starvation == pytest.approx(3.001 / 5)


def test_run_of_one_batch_has_no_starvation() -> None:
    assert compute([FORWARD[0], WAITS[0]], images=10, ended=103.0).starvation is None


def test_busy_cores_are_cpu_seconds_per_second_of_the_run() -> None:
    # From the first batch at 102 s to the last commit at 110 s.
    assert compute(FORWARD, images=30, ended=110.0, cpu_seconds=12.0).cores_busy == 1.5


def test_busy_share_of_a_stage_is_that_of_each_of_its_processes() -> None:
    decode = [
        time_stage("decode", 102.0, 104.0, 20, FIRST_LOADER),
        time_stage("decode", 102.0, 106.0, 30, SECOND_LOADER),
        time_stage("decode", 104.0, 110.0, 30, FIRST_LOADER),
    ]
    # From 102 s to 110 s, two processes worked 12 s of 2 * 8 s.
    assert compute([*FORWARD, *decode], images=30, ended=110.0).busy["decode"] == 0.75


def test_busy_share_of_the_forward_pass_is_that_of_each_parallel_batch() -> None:
    forward = [time_stage("forward", 100.0, 108.0), time_stage("forward", 102.0, 110.0)]
    # Two batches at once worked 16 s of 2 * 10 s, all in one process.
    assert compute(forward, images=20, ended=110.0, parallel_batches=2).busy["forward"] == 0.8
