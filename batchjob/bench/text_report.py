"""A bench result as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from batchjob.bench.results import BenchResult, GradModeResult, MemoryPeak, RunMetrics, StageMeasurement

__all__ = ["NOT_MEASURED", "format_report"]

NOT_MEASURED = "not measured"
"""Text in place of a missing figure."""


def format_report(result: BenchResult) -> list[str]:
    """Format the report, section by section."""
    return [
        f"{result.model} on {result.device}, {result.recipe}, batches of {result.batch_size}",
        f"{result.cores} cores, {result.loader_processes} loader process{'' if result.loader_processes == 1 else 'es'}",
        f"{result.images:,} images, {result.distinct:,} of them distinct",
        *_format_calibration(result),
        *_format_stages(result.stages),
        "joint ceilings, images/s, the tightest first",
        *(f"  {one.name:<10}{one.images_per_second:>12,.1f}   {one.words}" for one in result.ceilings),
        *([] if result.ceilings else [f"  {NOT_MEASURED}"]),
        "ladder, images/s",
        *(f"  {_format_number(one.images_per_second, 12, 1)}   {one.name}; {one.note}" for one in result.ladder),
        *_format_run(result),
        "memory at most, MiB",
        *_format_memory(result.memory),
        "a forward pass, eager fp32                  ms/image   MiB of tensors a batch",
        *map(_format_grad_mode, result.modes),
        *(f"wrote {path}" for path in result.profile),
        f"{result.verdict}{' (NOISY: measure again)' if result.calibration.noisy else ''}",
    ]


def _format_calibration(result: BenchResult) -> Iterator[str]:
    calibration = result.calibration
    yield (
        f"calibration {calibration.before_ms:.2f} ms before, {calibration.after_ms:.2f} ms after "
        f"({calibration.drift:+.1%}){': NOISY, figures may be off by as much' if calibration.noisy else ''}"
    )


def _format_stages(stages: Sequence[StageMeasurement]) -> Iterator[str]:
    yield f"{'each stage alone':<18}{'images/s':>14}{'CPU ms':>14}{'GPU ms':>14}{'bytes/image':>14}"
    for stage in stages:
        cells = (
            _format_number(stage.images_per_second, 14, 1),
            _format_number(stage.cpu_ms, 14, 3),
            _format_number(stage.gpu_ms, 14, 4),
            _format_number(stage.bytes, 14, 0),
        )
        yield f"  {stage.name:<16}{''.join(cells)}{f'   {stage.note}' if stage.note else ''}"


def _format_run(result: BenchResult) -> Iterator[str]:
    run = result.run
    period = "in steady state" if run.steady else "over the whole run, too short for a steady state"
    yield f"the run: {run.images:,} images, {run.failed:,} error rows, {run.images_per_second:,.1f} images/s {period}"
    tightest = f" of the tightest joint ceiling ({result.ceilings[0].name})" if result.ceilings else ""
    yield f"  {_format_share(result.share)}{tightest}"
    yield (
        f"  worker ready after {run.load_s:,.1f} s, first batch after {run.first_batch_s:,.1f} s, "
        f"all committed after {run.total_s:,.1f} s"
    )
    yield (
        f"  starvation {_format_share(run.starvation)} (the forward loop waited for pixels); batches ready when asked "
        f"for {_format_share(run.ready)}; cores busy {_format_number(run.cores_busy, 0, 2)} of {result.cores}"
    )
    yield from _format_services(run)


def _format_services(run: RunMetrics) -> Iterator[str]:
    for stage, service in run.services.items():
        yield f"  {stage:<10}{service.images_per_second:>12,.1f} images/s while at it, busy {service.busy:.0%}"


def _format_memory(peaks: Sequence[MemoryPeak]) -> Iterator[str]:
    if not peaks:
        yield f"  {NOT_MEASURED}: this system has no /proc"
    for peak in peaks:
        pss = NOT_MEASURED if peak.pss is None else f"{peak.pss / 2**20:,.0f}"
        yield f"  {peak.processes:<32}{peak.count:>3}   RSS {peak.rss / 2**20:>8,.0f}   PSS {pss:>8}"


def _format_grad_mode(mode: GradModeResult) -> str:
    mib = None if mode.bytes is None else mode.bytes / 2**20
    figures = f"{_format_number(mode.ms, 12, 3)}{_format_number(mib, 17, 1)}"
    return f"  {mode.name:<38}{figures}{f'   {mode.note}' if mode.note else ''}"


def _format_number(value: float | None, width: int, digits: int) -> str:
    text = NOT_MEASURED if value is None else f"{value:,.{digits}f}"
    return f"{text:>{width}}" if width else text


def _format_share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.0%}"
