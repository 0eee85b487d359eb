"""Metrics of a run, from timings whose figures can be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from batchjob.bench.bench_worker import BenchWorker, RunRecord
from batchjob.bench.results import StageUtilization
from batchjob.bench.run_metrics import compute_run_metrics, compute_steady_rate
from batchjob.inference.cpu_parallelism import CpuParallelism
from batchjob.output.provenance import ShardResult
from batchjob.types import ShardKey, StageTiming
from tests.support.part_footers import make_footer
from tests.support.small_bench import open_small_bench_worker, write_small_job

WORKER_PID, FIRST_LOADER, SECOND_LOADER = 1, 2, 3


@pytest.fixture(scope="module")
def opened_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BenchWorker]:
    folder = write_small_job(tmp_path_factory.mktemp("job")).parent
    with open_small_bench_worker(folder, 12) as worker:
        yield worker


@pytest.fixture
def worker(opened_worker: BenchWorker) -> BenchWorker:
    """A worker that was ready after 5 s and computes one batch at a time."""
    opened_worker.load_seconds, opened_worker.cpu_parallelism = 5.0, CpuParallelism(1, 1)
    return opened_worker


def make_record(
    timings: Sequence[StageTiming], *, images: int, failed: int = 0, ended: float, cpu_seconds: float | None = None
) -> RunRecord:
    """Make the record of a run of one shard that began at 100 s."""
    key = ShardKey(0, "0" * 16, images, 0, 0)
    result = ShardResult(key, make_footer(key, failed=failed), {}, True, None)
    return RunRecord(100.0, ended, cpu_seconds, tuple(timings), (result,))


def time_stage(stage: str, started: float, ended: float, images: int = 10, pid: int = WORKER_PID) -> StageTiming:
    return StageTiming(stage, started, ended, pid, images)


# Three batches of ten images. The forward loop waits 1 s for the first one, 3 s for the second one and 1 ms for the
# third one, and works 1 s on each: [101, 102], [105, 106], [106.001, 107]. The last part is committed at 110 s.
FORWARD = [
    time_stage("forward", 101.0, 102.0),
    time_stage("forward", 105.0, 106.0),
    time_stage("forward", 106.001, 107.0),
]
WAITS = [time_stage("wait", 100.0, 101.0), time_stage("wait", 102.0, 105.0), time_stage("wait", 106.0, 106.001)]
RECORD = make_record([*FORWARD, *WAITS], images=30, failed=2, ended=110.0, cpu_seconds=15.0)


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
    record = make_record(timings, images=100, ended=ends[-1])
    found, is_steady = compute_steady_rate(record, loaded_ahead)
    assert found == pytest.approx(rate)
    assert is_steady is steady


def test_rate_of_a_run_does_not_depend_on_the_order_in_which_timings_arrive() -> None:
    timings = [time_stage("forward", 100.0 + second, 101.0 + second) for second in range(10)]
    record = make_record(timings[::-1], images=100, ended=110.0)
    assert compute_steady_rate(record, 0) == compute_steady_rate(replace(record, timings=tuple(timings)), 0)


def test_rate_of_a_run_without_a_prediction_counts_its_error_rows() -> None:
    record = make_record([time_stage("fetch", 100.0, 101.0)], images=20, failed=20, ended=104.0)
    assert compute_steady_rate(record, 0) == (5.0, False)


def test_batches_that_end_together_give_no_steady_rate() -> None:
    timings = [time_stage("forward", 100.0, 102.0, 20) for _ in range(5)]
    assert compute_steady_rate(make_record(timings, images=100, ended=102.0), 0) == (50.0, False)


# -- metrics of a run


def test_times_count_from_the_start_of_the_worker(worker: BenchWorker) -> None:
    metrics = compute_run_metrics(worker, RECORD)
    # Ready after 5 s, then 2 s until the first batch was predicted and 10 s until the last commit.
    assert (metrics.load_s, metrics.first_batch_s, metrics.total_s) == (5.0, 7.0, 15.0)
    assert (metrics.images, metrics.failed) == (30, 2)


def test_starvation_is_the_share_of_waits_after_the_first_batch(worker: BenchWorker) -> None:
    # Between 102 s and 107 s the loop waited 3.001 s. The wait for the first batch does not count.
    assert compute_run_metrics(worker, RECORD).starvation == pytest.approx(3.001 / 5)


def test_wait_counts_only_while_no_batch_is_at_work(worker: BenchWorker) -> None:
    # Each batch is on its way while the loop waits for the next one, as on a GPU: nothing is idle between 101 s and
    # 103 s, although the loop waits all that time.
    forward = [time_stage("forward", 100.0 + second, 101.0 + second) for second in range(3)]
    waits = [time_stage("wait", 101.0, 102.0), time_stage("wait", 102.0, 103.0)]
    record = make_record([*forward, *waits], images=30, ended=103.0)
    assert compute_run_metrics(worker, record).starvation == 0.0


def test_parallel_batches_are_starved_while_fewer_are_at_work(worker: BenchWorker) -> None:
    worker.cpu_parallelism = CpuParallelism(2, 1)
    # Two batches at once from 101 s on. Between 102 s and 106 s each of two lanes could work 4 s; they work 3 + 2 s.
    forward = [
        time_stage("forward", 101.0, 102.0),
        time_stage("forward", 102.0, 105.0),
        time_stage("forward", 104.0, 106.0),
    ]
    assert compute_run_metrics(worker, make_record(forward, images=30, ended=106.0)).starvation == pytest.approx(3 / 8)


def test_batches_that_were_ready_were_waited_for_no_longer_than_2_ms(worker: BenchWorker) -> None:
    # Of the two waits after the first batch, one took 3 s and one took 1 ms.
    assert compute_run_metrics(worker, RECORD).ready == 0.5


def test_wait_that_ends_without_a_batch_is_not_counted(worker: BenchWorker) -> None:
    last = time_stage("wait", 107.0, 110.0, images=0)
    metrics = compute_run_metrics(worker, make_record([*RECORD.timings, last], images=30, ended=110.0))
    assert metrics.ready == 0.5
    assert metrics.starvation == pytest.approx(3.001 / 5)


def test_run_of_one_batch_has_neither_starvation_nor_ready_batches(worker: BenchWorker) -> None:
    record = make_record([FORWARD[0], WAITS[0]], images=10, ended=103.0)
    metrics = compute_run_metrics(worker, record)
    assert (metrics.starvation, metrics.ready) == (None, None)


@pytest.mark.parametrize(("cpu_seconds", "cores_busy"), [(15.0, 1.5), (None, None)])
def test_busy_cores_are_cpu_seconds_per_second_of_the_run(
    worker: BenchWorker, cpu_seconds: float | None, cores_busy: float | None
) -> None:
    record = make_record(FORWARD, images=30, ended=110.0, cpu_seconds=cpu_seconds)
    assert compute_run_metrics(worker, record).cores_busy == cores_busy


def test_busy_share_of_a_stage_is_that_of_each_of_its_processes(worker: BenchWorker) -> None:
    decode = [
        time_stage("decode", 100.0, 104.0, 20, FIRST_LOADER),
        time_stage("decode", 100.0, 106.0, 30, SECOND_LOADER),
    ]
    record = make_record([*FORWARD, *decode], images=30, ended=110.0)
    # 50 images in 10 s of work; two processes worked 10 s of 2 * 10 s.
    assert compute_run_metrics(worker, record).services["decode"] == StageUtilization(5.0, 0.5)


def test_busy_share_of_the_forward_pass_is_that_of_each_parallel_batch(worker: BenchWorker) -> None:
    worker.cpu_parallelism = CpuParallelism(2, 1)
    forward = [time_stage("forward", 100.0, 108.0), time_stage("forward", 102.0, 110.0)]
    services = compute_run_metrics(worker, make_record(forward, images=20, ended=110.0)).services
    # 20 images in 16 s of work, which all is done by one process; two batches at once worked 16 s of 2 * 10 s.
    assert services == {"forward": StageUtilization(1.25, 0.8)}
