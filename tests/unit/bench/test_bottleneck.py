"""Joint ceilings of a bench, what limits the run, and the lines and keys in which that is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from batchjob.bench.bottleneck import compute_ceilings, find_bottleneck
from batchjob.bench.report import format_report, to_json_dict
from batchjob.bench.results import BenchResult, Ceiling, RunMetrics, StageMeasurement

NAMES = ("list", "fetch", "decode", "transform", "collate", "H2D", "forward", "D2H", "write")
RUN = RunMetrics(
    images=12_000, failed=3, images_per_second=1500.25, steady=True, load_s=2.04, first_batch_s=3.5, total_s=11.0,
    starvation=0.126, cores_busy=1.234, busy={"decode": 0.42},
)  # fmt: skip
RESULT = BenchResult(
    model="net@0123", device="cpu", recipe="fp32", decode_mode="exact", batch_size=32, cores=4, loader_processes=3,
    distinct=1_200, stages=(StageMeasurement("decode", 1234.56, 0.81, None, 150_528.0, "one thread"),),
    ceilings=(Ceiling("cpu", 2000.33, "4 cores ÷ 2.00 ms"), Ceiling("store", 30_000.0, "fetching alone")), run=RUN,
    memory={"driver and worker": 300 << 20, "loaders": 200 << 20}, calibration_ms=(10.0, 10.2),
)  # fmt: skip


def make_stages(*, gpu_ms: dict[str, float] | None = None, **cpu_ms: float) -> list[StageMeasurement]:
    """Make all stages; those without a figure take almost nothing of the CPU and nothing of a GPU."""
    return [
        StageMeasurement(name, cpu_ms=cpu_ms.get(name, 0.0001), gpu_ms=(gpu_ms or {}).get(name), bytes=100.0)
        for name in NAMES
    ]


def make_result(
    share: float,
    stages: Sequence[StageMeasurement],
    *,
    starvation: float = 0.0,
    cores_busy: float = 1.5,
    store: float = 1e6,
    decode_busy: float = 0.2,
    **changes: Any,
) -> BenchResult:
    """Make the result of a run on 2 cores that reaches this share of the tightest ceiling."""
    ceilings = compute_ceilings(stages, 2, store)
    rate = share * ceilings[0].images_per_second
    busy = {"decode": decode_busy}
    run = replace(RUN, images_per_second=rate, starvation=starvation, cores_busy=cores_busy, busy=busy)
    return replace(RESULT, cores=2, stages=tuple(stages), ceilings=ceilings, run=run, **changes)


def explain(share: float, stages: Sequence[StageMeasurement], **changes: Any) -> str:
    """Return cause and remedy of such a run, in one sentence."""
    return ": ".join(find_bottleneck(make_result(share, stages, **changes)))


# -- ceilings


def test_cpu_ceiling_is_cores_over_the_sum_of_cpu_seconds() -> None:
    cpu = compute_ceilings([*make_stages(decode=2.5, forward=4.0)], 2, 1e6)[0]
    assert (cpu.name, cpu.note) == ("cpu", "2 cores ÷ 6.50 ms of CPU an image")
    assert cpu.images_per_second == pytest.approx(2 / 0.0065, rel=1e-3)


def test_tightest_ceiling_comes_first() -> None:
    stages = make_stages(decode=2.3, gpu_ms={"H2D": 0.05, "forward": 0.4, "D2H": 0.1})
    ceilings = compute_ceilings(stages, 16, 9000.0)
    assert [ceiling.name for ceiling in ceilings] == ["gpu", "cpu", "store", "link"]
    rates = [ceiling.images_per_second for ceiling in ceilings]
    assert rates == pytest.approx([2500, 16e3 / 2.3, 9000, 20_000], rel=1e-2)


def test_listing_and_the_copy_to_the_host_are_no_work_of_their_own() -> None:
    stages = make_stages(list=50.0, decode=1.0, forward=0.97, D2H=30.0)
    assert compute_ceilings(stages, 2, 1e6)[0].images_per_second == pytest.approx(2e3 / 1.97, rel=1e-2)


# -- the bottleneck


@pytest.mark.parametrize(("share", "starvation"), [(0.79, 0.03), (0.60, 0.86)])
def test_cpu_is_the_bottleneck_if_all_cores_are_busy(share: float, starvation: float) -> None:
    stages = make_stages(decode=1.4, transform=1.7, forward=2.6)
    sentence = explain(share, stages, starvation=starvation, cores_busy=1.97)
    assert sentence.startswith("the CPU, of which forward takes 46%; all cores are busy (1.97 of 2)")
    assert "runtime.device=cuda" in sentence
    assert "loader" not in sentence


@pytest.mark.parametrize(
    ("costliest", "words"),
    [
        ("decode", "decode.mode=fast (pixels then differ a little), smaller source images or more cores"),
        ("transform", "decode.mode=fast (pixels then differ a little), a smaller preprocess.resize"),
        ("write", "fewer columns in task or more cores"),
        ("fetch", "smaller source images or more cores"),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_advice_is_about_the_costliest_stage(costliest: str, words: str, share: float) -> None:
    stages = [replace(stage, cpu_ms=3.0) if stage.name == costliest else stage for stage in make_stages()]
    sentence = explain(share, stages, starvation=0.5, cores_busy=1.9)
    assert f"the CPU, of which {costliest} takes 100%" in sentence
    assert words in sentence
    assert "decode.mode" not in explain(share, stages, starvation=0.5, cores_busy=1.9, decode_mode="fast")


def test_loading_is_the_bottleneck_if_the_loop_starves_and_cores_are_idle() -> None:
    sentence = explain(0.6, make_stages(decode=3.0), starvation=0.86, cores_busy=1.0)
    assert sentence.startswith("loading; the forward loop waited 86% of its time for pixels: more runtime.loader.proc")
    assert "(none are in use)" not in sentence
    sentence = explain(0.6, make_stages(decode=3.0), starvation=0.86, cores_busy=1.0, loader_processes=0)
    assert "runtime.loader.processes (none are in use)" in sentence


def test_cpu_beside_a_gpu_is_the_bottleneck_if_it_is_tightest_or_the_loop_starves() -> None:
    gpu: dict[str, Any] = {"device": "cuda:0 (NVIDIA)", "cores_busy": 1.95}
    decoding = make_stages(decode=3.0, forward=0.1, gpu_ms={"forward": 0.2})
    assert "the CPU, of which decode takes" in explain(0.7, decoding, starvation=0.05, **gpu)
    assert "the CPU, of which decode takes" in explain(0.7, decoding, starvation=0.5, store=100.0, **gpu)
    computing = make_stages(decode=3.0, forward=0.1, gpu_ms={"forward": 20.0})
    assert "the forward loop itself" in explain(0.7, computing, starvation=0.05, **gpu)


def test_cores_taken_by_other_programs_are_named() -> None:
    sentence = explain(0.1, make_stages(decode=2.5, forward=7.5), cores_busy=0.5)
    assert sentence.startswith("cores; the run had 0.5 of 2 on average")


def test_loader_processes_that_wait_for_a_core_are_no_reason_for_more_of_them() -> None:
    stages = make_stages(decode=3.0)
    # Two processes decode all the time, and get less than one core for it.
    sentence = explain(0.3, stages, starvation=0.9, cores_busy=0.8, decode_busy=1.0, loader_processes=2)
    assert sentence.startswith("cores; the run had 0.8 of 2 on average, though it had work for more")
    # One process decodes all the time on a core of its own.
    sentence = explain(0.3, stages, starvation=0.9, cores_busy=1.0, decode_busy=1.0, loader_processes=1)
    assert sentence.startswith("loading; ")


def test_forward_loop_is_named_if_nothing_else_limits_the_run() -> None:
    assert explain(0.5, make_stages(decode=2.5, forward=7.5)).startswith("the forward loop itself")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu_ms": {"forward": 9.0}}, "the GPU: runtime.precision=bf16"),
        ({"gpu_ms": {"H2D": 9.0}}, "the link to the device: runtime.loader.pin_memory=true"),
        ({}, "fetching: more runtime.loader.processes"),
    ],
)
def test_ceiling_that_the_run_nearly_reaches_is_the_bottleneck(changes: dict[str, Any], words: str) -> None:
    assert words in explain(0.95, make_stages(**changes), device="cuda:0", store=150.0)


# -- text and JSON


def test_report_begins_with_five_lines_of_verdict() -> None:
    bottleneck, remedy, run, measured, machine = format_report(RESULT)[:5]
    assert bottleneck == "bottleneck: loading; the forward loop waited 13% of its time for pixels"
    assert remedy == "to move it: more runtime.loader.processes or runtime.loader.prefetch"
    ceiling = "75% of the tightest ceiling (cpu: 2,000.3 images/s, 4 cores ÷ 2.00 ms)"
    assert run == f"the run:    1,500.2 images/s in steady state, {ceiling}"
    conditions = "net@0123 on cpu, fp32, batches of 32, 4 cores, loader processes: 3"
    assert measured == f"measured:   12,000 images, 1,200 of them distinct, 3 error rows; {conditions}"
    assert machine == "machine:    steady; the same work took 10.00 ms before, 10.20 after (+2.0%)"


def test_short_run_is_not_called_steady() -> None:
    line = format_report(replace(RESULT, run=replace(RUN, steady=False)))[2]
    assert "images/s over the whole run, too short for a steady state, 75%" in line


@pytest.mark.parametrize(("after", "words"), [(10.4, "steady"), (10.6, "NOISY, measure again"), (9.4, "NOISY")])
def test_drift_of_more_than_5_percent_is_noisy(after: float, words: str) -> None:
    result = replace(RESULT, calibration_ms=(10.0, after))
    assert words in format_report(result)[4]
    assert to_json_dict(result)["noisy"] == ("NOISY" in words)
    assert to_json_dict(result)["drift"] == pytest.approx(after / 10 - 1)


def test_tables_follow_with_a_column_for_each_figure() -> None:
    lines = format_report(replace(RESULT, profile=("p/table.txt", "p/trace.json")))
    heads = [" ".join(line.split()) for line in lines[5].splitlines()]
    assert "name images per second cpu ms gpu ms bytes busy in the run note" in heads
    assert "decode 1,234.6 0.81 - 150,528.0 0.42 one thread" in heads
    assert heads.index("cpu 2,000.3 4 cores ÷ 2.00 ms") < heads.index("store 30,000.0 fetching alone")
    assert "loaders 200.0" in heads
    assert lines[-2:] == ["wrote p/table.txt", "wrote p/trace.json"]


def test_json_names_the_tightest_ceiling_and_the_share() -> None:
    document = to_json_dict(RESULT)
    assert document.items() >= {"images": 12_000, "distinct": 1_200, "tightest": "cpu", "noisy": False}.items()
    assert document["share"] == pytest.approx(0.75, abs=1e-3)
    assert document["run"]["busy"] == {"decode": 0.42}
    assert document["verdict"].startswith("bottleneck: loading; ")
