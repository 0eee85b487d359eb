"""Findings as lines for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from batchjob.bench.results import BenchResult, GradModeResult, MemoryPeak, RunMetrics, StageMeasurement

__all__ = ["NOT_MEASURED", "format_report"]

NOT_MEASURED = "not measured"


def format_report(found: BenchResult) -> list[str]:
    """The report, section by section."""
    return [
        f"{found.model} on {found.device}, {found.recipe}, batches of {found.batch_size}",
        f"{found.cores} cores, {found.loader_processes} loader process{'' if found.loader_processes == 1 else 'es'}",
        f"{found.images:,} images, {found.distinct:,} of them distinct",
        *_calibration(found),
        *_stages(found.stages),
        "joint ceilings, images/s, the tightest first",
        *(f"  {one.name:<10}{one.images_per_second:>12,.1f}   {one.words}" for one in found.ceilings),
        *([] if found.ceilings else [f"  {NOT_MEASURED}"]),
        "ladder, images/s",
        *(f"  {_number(one.images_per_second, 12, 1)}   {one.name}; {one.note}" for one in found.ladder),
        *_run(found),
        "memory at most, MiB",
        *_memory(found.memory),
        "a forward pass, eager fp32                  ms/image   MiB of tensors a batch",
        *map(_mode, found.modes),
        *(f"wrote {path}" for path in found.profile),
        f"{found.verdict}{' (NOISY: measure again)' if found.calibration.noisy else ''}",
    ]


def _calibration(found: BenchResult) -> Iterator[str]:
    steady = found.calibration
    yield (
        f"calibration {steady.before_ms:.2f} ms before, {steady.after_ms:.2f} ms after ({steady.drift:+.1%})"
        f"{': NOISY, figures may be off by as much' if steady.noisy else ''}"
    )


def _stages(stages: Sequence[StageMeasurement]) -> Iterator[str]:
    yield f"{'each stage alone':<18}{'images/s':>14}{'CPU ms':>14}{'GPU ms':>14}{'bytes/image':>14}"
    for one in stages:
        cells = (
            _number(one.images_per_second, 14, 1),
            _number(one.cpu_ms, 14, 3),
            _number(one.gpu_ms, 14, 4),
            _number(one.bytes, 14, 0),
        )
        yield f"  {one.name:<16}{''.join(cells)}{f'   {one.note}' if one.note else ''}"


def _run(found: BenchResult) -> Iterator[str]:
    run = found.run
    kind = "in steady state" if run.steady else "over the whole run, too short for a steady state"
    yield f"the run: {run.images:,} images, {run.failed:,} error rows, {run.images_per_second:,.1f} images/s {kind}"
    tightest = f" of the tightest joint ceiling ({found.ceilings[0].name})" if found.ceilings else ""
    yield f"  {_share(found.share)}{tightest}"
    yield (
        f"  worker ready after {run.load_s:,.1f} s, first batch after {run.first_batch_s:,.1f} s, "
        f"all committed after {run.total_s:,.1f} s"
    )
    yield (
        f"  starvation {_share(run.starvation)} (the forward loop waited for pixels); batches ready when asked for "
        f"{_share(run.ready)}; cores busy {_number(run.cores_busy, 0, 2)} of {found.cores}"
    )
    yield from _services(run)


def _services(run: RunMetrics) -> Iterator[str]:
    for stage, service in run.services.items():
        yield f"  {stage:<10}{service.images_per_second:>12,.1f} images/s while at it, busy {service.busy:.0%}"


def _memory(peaks: Sequence[MemoryPeak]) -> Iterator[str]:
    if not peaks:
        yield f"  {NOT_MEASURED}: this system has no /proc"
    for one in peaks:
        pss = NOT_MEASURED if one.pss is None else f"{one.pss / 2**20:,.0f}"
        yield f"  {one.processes:<32}{one.count:>3}   RSS {one.rss / 2**20:>8,.0f}   PSS {pss:>8}"


def _mode(one: GradModeResult) -> str:
    held = None if one.bytes is None else one.bytes / 2**20
    return f"  {one.name:<38}{_number(one.ms, 12, 3)}{_number(held, 17, 1)}{f'   {one.note}' if one.note else ''}"


def _number(value: float | None, width: int, digits: int) -> str:
    said = NOT_MEASURED if value is None else f"{value:,.{digits}f}"
    return f"{said:>{width}}" if width else said


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.0%}"
