"""All measurements of a bench in order: a run, each stage alone, ceilings, throughput steps and grad modes."""

from __future__ import annotations

from pathlib import Path

from batchjob.bench.bench_worker import BenchWorker
from batchjob.bench.bottleneck import compute_ceilings, explain_bottleneck
from batchjob.bench.grad_modes import measure_grad_modes
from batchjob.bench.input_sample import InputSample
from batchjob.bench.io_rates import measure_disk_rate, measure_fetch_rate
from batchjob.bench.machine_stats import MemorySampler, calibrate
from batchjob.bench.profiler_trace import write_profile
from batchjob.bench.results import BenchResult, Calibration, MemoryPeak, RunMetrics
from batchjob.bench.run_metrics import compute_run_metrics
from batchjob.bench.stages import measure_stages
from batchjob.bench.throughput import measure_throughput_steps
from batchjob.errors import InvalidJob
from batchjob.text import format_count

__all__ = ["measure"]


def measure(
    worker: BenchWorker, profile_folder: Path | None, sample: InputSample, calibration_ms: float
) -> BenchResult:
    """Measure a worker that is ready.

    Args:
        worker: The worker.
        profile_folder: Folder for torch's table and a Chrome trace; None writes neither.
        sample: First images of the job.
        calibration_ms: Milliseconds of `calibrate` before the worker was loaded.

    Raises:
        InvalidJob: If every image of the run became an error row.
    """
    run, memory = _measure_run(worker)
    batches = worker.load_batches(worker.sample_shard)
    stages = (sample.stage, *measure_stages(worker, batches))
    ceilings = compute_ceilings(
        stages,
        worker.cores,
        store_images_per_second=measure_fetch_rate(worker),
        disk_bytes_per_second=measure_disk_rate(worker),
    )
    steps = measure_throughput_steps(worker, batches, run)
    grad_modes = measure_grad_modes(worker, batches)
    profile = () if profile_folder is None else write_profile(worker, profile_folder)
    loader_processes = worker.loader.config.processes
    return BenchResult(
        model=worker.info.model,
        device=worker.info.device,
        recipe=worker.predictor.forward.config.description,
        batch_size=worker.batch_size,
        cores=worker.cores,
        loader_processes=loader_processes,
        images=run.images,
        distinct=min(run.images, sample.rows),
        stages=stages,
        ceilings=ceilings,
        ladder=steps,
        run=run,
        share=run.images_per_second / ceilings[0].images_per_second if ceilings else None,
        modes=grad_modes,
        memory=memory,
        calibration=Calibration(calibration_ms, calibrate()),
        verdict=explain_bottleneck(
            run.images_per_second,
            ceilings,
            stages,
            starvation=run.starvation,
            loader_processes=loader_processes,
            on_cpu=worker.engine.device.type == "cpu",
            cores=worker.cores,
            cores_busy=run.cores_busy,
            exact_decode=worker.job.decode.mode == "exact",
        ),
        profile=profile,
    )


def _measure_run(worker: BenchWorker) -> tuple[RunMetrics, tuple[MemoryPeak, ...]]:
    """Run all shards. Raises InvalidJob if every image became an error row."""

    def find_loader_pids() -> set[int]:
        return {timing.pid for timing in list(worker.timings) if timing.stage == "decode"}

    with MemorySampler(find_loader_pids) as sampler:
        run = worker.run(worker.shards)
    if run.failed == run.images:
        raise InvalidJob(
            f"{worker.job.input.uri}: {format_count(run.failed, 'image')} tried, each an error row: nothing can be "
            "measured; `batchjob run` and `batchjob errors` say why"
        )
    return compute_run_metrics(worker, run), sampler.peaks()
