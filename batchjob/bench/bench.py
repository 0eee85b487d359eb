"""The order of a bench: list, a run, each stage alone, the ladder, the modes; and what follows from them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from batchjob import system
from batchjob.bench.bench_worker import Listed, Rig, look, rigged
from batchjob.bench.bottleneck import ceilings, verdict
from batchjob.bench.grad_modes import modes
from batchjob.bench.machine_stats import MemoryWatch, calibrate
from batchjob.bench.profiler_trace import profile
from batchjob.bench.results import Calibration, Findings, Peak, Running
from batchjob.bench.stages import alone, disk_bytes_per_second, fetched_by_all
from batchjob.bench.throughput import ladder, running
from batchjob.errors import AttemptFailed, InvalidJob, Temporary
from batchjob.job.job import Job
from batchjob.text import counted

__all__ = ["Wanted", "bench"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        images: of a run; where the job has fewer they come again.
        profile: folder for torch's table and a Chrome trace; None for neither.
    """

    images: int = 1000
    profile: Path | None = None


def bench(job: Job, wanted: Wanted) -> Findings:
    """Measure a job's path from storage to Parquet, through the parts that a run uses. Its output is not touched.

    Raises:
        InvalidJob: the job cannot run, or has fewer than two batches of images.
        Temporary: the disk for temporary files is full.
        BatchjobError: the run itself fails.
    """
    with _disk_may_be_full():
        before = calibrate()
        listed = look(job, wanted.images)
        with rigged(job, wanted.images, _cores(job), listed) as rig:
            return _found(rig, wanted, listed, before)


def _found(rig: Rig, wanted: Wanted, listed: Listed, before: float) -> Findings:
    run, memory = _run(rig)
    batches = rig.batches(rig.sample)
    stages = (listed.stage, *alone(rig, batches))
    found = ceilings(stages, rig.cores, store=fetched_by_all(rig), disk=disk_bytes_per_second(rig))
    rungs, side_by_side = ladder(rig, batches, run), modes(rig, batches)
    files = () if wanted.profile is None else profile(rig, wanted.profile)
    processes, engine = rig.parts.loader.plan.processes, rig.parts.engine
    return Findings(
        model=rig.loaded.model,
        device=rig.loaded.device,
        recipe=rig.parts.predictor.forward.recipe.words,
        batch_size=rig.batch_size,
        cores=rig.cores,
        loader_processes=processes,
        images=run.images,
        distinct=min(run.images, listed.rows),
        stages=stages,
        ceilings=found,
        ladder=rungs,
        run=run,
        share=run.images_per_second / found[0].images_per_second if found else None,
        modes=side_by_side,
        memory=memory,
        calibration=Calibration(before, calibrate()),
        verdict=verdict(
            run.images_per_second,
            found,
            stages,
            starvation=run.starvation,
            processes=processes,
            on_cpu=engine.device.type == "cpu",
            cores=rig.cores,
            busy=run.cores_busy,
            exact=rig.job.decode.mode == "exact",
        ),
        profile=files,
    )


def _run(rig: Rig) -> tuple[Running, tuple[Peak, ...]]:
    """The run itself. Raises InvalidJob where not one image came through it."""
    with MemoryWatch(lambda: {span.process for span in list(rig.spans) if span.stage == "decode"}) as watch:
        ran = rig.run(rig.shards)
    if ran.failed == ran.images:
        raise InvalidJob(
            f"{rig.job.input.uri}: {counted(ran.failed, 'image')} tried, each an error row: nothing can be measured; "
            "`batchjob run` and `batchjob errors` say why"
        )
    return running(rig, ran), watch.peaks()


def _cores(job: Job) -> int:
    asked = job.runtime.cpus_per_worker
    return system.cores() if asked == "auto" else max(1, int(asked))


@contextmanager
def _disk_may_be_full() -> Iterator[None]:
    """Raises Temporary in place of whatever a full disk makes of a write."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full() from error
    except AttemptFailed as error:
        if "disk is full" not in error.message and not any(os.strerror(code) in error.message for code in _FULL):
            raise
        raise _full() from error


def _full() -> Temporary:
    return Temporary(
        f"{gettempdir()}: the disk is full, so nothing could be measured; make room or set TMPDIR, then run again"
    )
