"""Text of a bench result: each section, and the figures that were not measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchjob.bench.bottleneck import Ceiling
from batchjob.bench.results import (
    BenchResult,
    Calibration,
    GradModeResult,
    MemoryPeak,
    RunMetrics,
    StageMeasurement,
    StageUtilization,
    ThroughputStep,
)
from batchjob.bench.text_report import NOT_MEASURED, format_report

RUN = RunMetrics(
    images=12_000,
    failed=3,
    images_per_second=1500.25,
    steady=True,
    load_s=2.04,
    first_batch_s=3.5,
    total_s=11.0,
    starvation=0.126,
    ready=0.5,
    cores_busy=1.234,
    services={"decode": StageUtilization(2500.0, 0.42)},
)
RESULT = BenchResult(
    model="net@0123456789ab",
    device="cpu",
    recipe="eager fp32",
    batch_size=32,
    cores=4,
    loader_processes=3,
    images=12_000,
    distinct=1_200,
    stages=(StageMeasurement("decode", 1234.56, cpu_ms=0.81, gpu_ms=None, bytes=150_528.0, note="exact"),),
    ceilings=(Ceiling("cpu", 2000.0, "4 cores"), Ceiling("disk", 30_000.0, "300 MB/s")),
    ladder=(ThroughputStep("full, from storage", 1500.25, "and fetching"),),
    run=RUN,
    share=0.75,
    modes=(GradModeResult("no_grad", 1.5, 3 << 20), GradModeResult("inference_mode", None, None, "as it was saved")),
    memory=(MemoryPeak("loaders", 3, 300 << 20, 200 << 20),),
    calibration=Calibration(10.0, 10.2),
    verdict="bottleneck: the CPU",
)


def format_changed(**changes: Any) -> list[str]:
    return format_report(replace(RESULT, **changes))


def format_changed_run(**changes: Any) -> list[str]:
    return format_changed(run=replace(RUN, **changes))


def find_line(lines: list[str], words: str) -> str:
    (line,) = [line for line in lines if words in line]
    return line


def test_report_begins_with_model_machine_and_images_and_ends_with_the_verdict() -> None:
    lines = format_report(RESULT)
    assert lines[:4] == [
        "net@0123456789ab on cpu, eager fp32, batches of 32",
        "4 cores, 3 loader processes",
        "12,000 images, 1,200 of them distinct",
        "calibration 10.00 ms before, 10.20 ms after (+2.0%)",
    ]
    assert lines[-1] == "bottleneck: the CPU"


def test_one_loader_process_is_singular() -> None:
    assert format_changed(loader_processes=1)[1] == "4 cores, 1 loader process"


def test_noisy_machine_is_named_at_the_start_and_at_the_end() -> None:
    lines = format_changed(calibration=Calibration(10.0, 9.0))
    assert "(-10.0%): NOISY, figures may be off by as much" in find_line(lines, "calibration")
    assert lines[-1] == "bottleneck: the CPU (NOISY: measure again)"


def test_figures_of_a_stage_stand_below_their_headings() -> None:
    lines = format_report(RESULT)
    heading = lines.index(find_line(lines, "each stage alone"))
    columns = ("images/s", "CPU ms", "GPU ms", "bytes/image")
    ends = [lines[heading].index(column) + len(column) for column in columns]
    stage = lines[heading + 1]
    cells = [stage[end - 14 : end].strip() for end in ends]
    assert cells == ["1,234.6", "0.810", NOT_MEASURED, "150,528"]
    assert stage.startswith("  decode ")
    assert stage.endswith("   exact")


def test_ceilings_keep_their_order() -> None:
    lines = format_report(RESULT)
    first = lines.index("joint ceilings, images/s, the tightest first") + 1
    assert [line.split() for line in lines[first : first + 2]] == [
        ["cpu", "2,000.0", "4", "cores"],
        ["disk", "30,000.0", "300", "MB/s"],
    ]


def test_run_without_ceilings_has_no_share_of_one() -> None:
    lines = format_changed(ceilings=(), share=None)
    assert lines[lines.index("joint ceilings, images/s, the tightest first") + 1] == f"  {NOT_MEASURED}"
    assert lines[lines.index(find_line(lines, "the run:")) + 1] == f"  {NOT_MEASURED}"


def test_run_is_reported_with_its_share_of_the_tightest_ceiling() -> None:
    lines = format_report(RESULT)
    first = lines.index(find_line(lines, "the run:"))
    assert lines[first : first + 5] == [
        "the run: 12,000 images, 3 error rows, 1,500.2 images/s in steady state",
        "  75% of the tightest joint ceiling (cpu)",
        "  worker ready after 2.0 s, first batch after 3.5 s, all committed after 11.0 s",
        "  starvation 13% (the forward loop waited for pixels); batches ready when asked for 50%; cores busy 1.23 of 4",
        "  decode         2,500.0 images/s while at it, busy 42%",
    ]


def test_short_run_is_not_called_steady() -> None:
    assert find_line(format_changed_run(steady=False), "the run:").endswith(
        "images/s over the whole run, too short for a steady state"
    )


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("starvation", f"starvation {NOT_MEASURED} (the forward"),
        ("ready", f"ready when asked for {NOT_MEASURED}; cores"),
        ("cores_busy", f"cores busy {NOT_MEASURED} of 4"),
    ],
)
def test_missing_figure_of_the_run_is_not_measured(missing: str, words: str) -> None:
    assert words in find_line(format_changed_run(**{missing: None}), "starvation")


@pytest.mark.parametrize(("rate", "cells"), [(1500.25, "1,500.2   full, from"), (None, f"{NOT_MEASURED}   full, from")])
def test_throughput_step_is_reported_with_its_rate_and_its_note(rate: float | None, cells: str) -> None:
    line = find_line(format_changed(ladder=(ThroughputStep("full, from storage", rate, "and fetching"),)), "full,")
    assert line.strip() == f"{cells} storage; and fetching"


@pytest.mark.parametrize(("pss", "text"), [(200 << 20, "200"), (None, NOT_MEASURED)])
def test_memory_is_in_mib(pss: int | None, text: str) -> None:
    line = find_line(format_changed(memory=(MemoryPeak("loaders", 3, 300 << 20, pss),)), "RSS")
    assert line.split() == ["loaders", "3", "RSS", "300", "PSS", *text.split()]


def test_system_without_memory_figures_is_named_as_the_reason() -> None:
    lines = format_changed(memory=())
    assert lines[lines.index("memory at most, MiB") + 1] == f"  {NOT_MEASURED}: this system has no /proc"


def test_grad_mode_is_in_milliseconds_and_mib() -> None:
    assert find_line(format_report(RESULT), "no_grad").split() == ["no_grad", "1.500", "3.0"]


def test_grad_mode_without_figures_gives_the_reason() -> None:
    line = find_line(format_report(RESULT), "inference_mode")
    assert line.count(NOT_MEASURED) == 2
    assert line.endswith("   as it was saved")


def test_files_of_the_profile_are_listed_before_the_verdict() -> None:
    assert format_changed(profile=("p/table.txt", "p/trace.json"))[-3:-1] == ["wrote p/table.txt", "wrote p/trace.json"]
