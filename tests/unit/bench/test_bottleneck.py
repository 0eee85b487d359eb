"""Joint ceilings of a bench, and the sentence about what limits the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from batchjob.bench.bottleneck import Ceiling, compute_ceilings, explain_bottleneck
from batchjob.bench.results import StageMeasurement

NAMES = ("fetch", "decode", "transform", "collate", "forward", "write")


def make_stage(
    name: str, cpu_ms: float | None, gpu_ms: float | None = None, size: float | None = None
) -> StageMeasurement:
    return StageMeasurement(name, cpu_ms=cpu_ms, gpu_ms=gpu_ms, bytes=size)


def make_stages(**cpu_ms: float | None) -> list[StageMeasurement]:
    """Make all stages of a CPU; those without a figure take almost nothing."""
    known: dict[str, float | None] = dict.fromkeys(NAMES, 0.01)
    return [make_stage(name, ms) for name, ms in (known | cpu_ms).items()]


def make_free_stages(**cpu_ms: float | None) -> list[StageMeasurement]:
    """Make all stages of a CPU, which put out 1000 bytes; those without a figure take nothing."""
    known: dict[str, float | None] = dict.fromkeys(NAMES, 0.0)
    return [make_stage(name, ms, size=1000.0) for name, ms in (known | cpu_ms).items()]


# -- ceilings


def test_cpu_ceiling_is_cores_over_the_sum_of_cpu_seconds() -> None:
    (cpu,) = compute_ceilings(make_free_stages(decode=2.5, forward=4.0), 2)
    assert (cpu.name, cpu.words) == ("cpu", "2 cores ÷ 6.50 ms of CPU an image")
    assert cpu.images_per_second == pytest.approx(2 / 0.0065)


def test_ceiling_without_all_its_figures_is_left_out() -> None:
    assert compute_ceilings(make_free_stages(decode=None, forward=4.0), 2) == ()
    ceilings = compute_ceilings(make_free_stages(decode=None), 2, store_images_per_second=10.0)
    assert [ceiling.name for ceiling in ceilings] == ["store"]
    assert compute_ceilings(make_free_stages(), 2, store_images_per_second=None, disk_bytes_per_second=None) == ()
    sentence = explain_bottleneck(10.0, (), make_free_stages(), starvation=None, loader_processes=0, on_cpu=True)
    assert "not measured" in sentence


def test_tightest_ceiling_comes_first() -> None:
    stages = [*make_free_stages(decode=2.0), make_stage("H2D", 0.1, 0.05), make_stage("D2H", 0.1, 0.1)]
    stages[4] = make_stage("forward", 0.2, 0.4)
    ceilings = compute_ceilings(stages, 16, store_images_per_second=9000.0, disk_bytes_per_second=5e6)
    assert {ceiling.name: ceiling.images_per_second for ceiling in ceilings} == {
        "gpu": pytest.approx(2500),
        "disk": pytest.approx(5000),
        "cpu": pytest.approx(16e3 / 2.3),
        "store": 9000.0,
        "link": pytest.approx(20_000),
    }
    assert [ceiling.name for ceiling in ceilings] == ["gpu", "disk", "cpu", "store", "link"]


def test_copy_to_the_host_counts_once_as_part_of_forward() -> None:
    stages = [*make_stages(decode=1.0)[:4], make_stage("forward", 0.97, 0.5), make_stage("D2H", 0.3, 0.4)]
    stages.append(make_stage("write", 0.0))
    rates = {ceiling.name: ceiling.images_per_second for ceiling in compute_ceilings(stages, 2)}
    assert rates == {"gpu": pytest.approx(2000), "cpu": pytest.approx(1000)}


# -- the sentence


def explain(
    share: float, stages: Sequence[StageMeasurement], starvation: float, cores_busy: float | None, **options: Any
) -> str:
    """Explain a run on 2 cores that reaches this share of the tightest ceiling."""
    ceilings = compute_ceilings(stages, 2, store_images_per_second=options.pop("store", None))
    rate = share * ceilings[0].images_per_second
    options = {"loader_processes": 2, "on_cpu": True, **options}
    return explain_bottleneck(rate, ceilings, stages, starvation=starvation, cores=2, cores_busy=cores_busy, **options)


@pytest.mark.parametrize(("share", "starvation"), [(0.79, 0.03), (0.60, 0.86)])
def test_cpu_is_the_bottleneck_if_all_cores_are_busy(share: float, starvation: float) -> None:
    sentence = explain(share, make_stages(decode=1.4, transform=1.7, forward=2.6), starvation, 1.97)
    assert sentence.startswith("bottleneck: the CPU, of which forward takes 45%: runtime.device=cuda")
    assert "all cores are busy (1.97 of 2)" in sentence
    assert f"the run reaches {share:.0%} of the tightest ceiling (cpu)" in sentence
    assert "runtime.batch_size" not in sentence
    assert "loader" not in sentence


@pytest.mark.parametrize(
    ("costliest", "words"),
    [
        ("decode", "decode takes 98%: decode.mode=fast (pixels then differ a little), smaller source images or more"),
        ("transform", "transform takes 98%: decode.mode=fast (pixels then differ a little), a smaller preprocess.res"),
        ("write", "write takes 98%: fewer columns in task or more cores"),
        ("fetch", "fetch takes 98%: smaller source images or more cores"),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_advice_is_about_the_costliest_stage(costliest: str, words: str, share: float) -> None:
    assert words in explain(share, make_stages(**{costliest: 3.0}), 0.5, 1.9)
    assert "decode.mode" not in explain(share, make_stages(**{costliest: 3.0}), 0.5, 1.9, exact_decode=False)


def test_loading_is_the_bottleneck_if_cores_are_idle_or_unknown() -> None:
    for cores_busy in (1.0, None):
        sentence = explain(0.6, make_stages(decode=3.0), 0.86, cores_busy)
        assert sentence.startswith("bottleneck: loading; the forward loop waited 86% of its time")


def test_cpu_beside_a_gpu_is_the_bottleneck_if_it_is_tightest_or_the_loop_starves() -> None:
    decoding = [*make_stages(decode=3.0)[:4], make_stage("forward", 0.1, 0.2), make_stage("write", 0.01)]
    assert "the CPU, of which decode takes" in explain(0.7, decoding, 0.05, 1.95, on_cpu=False)
    assert "the CPU, of which decode takes" in explain(0.7, decoding, 0.5, 1.95, on_cpu=False, store=100.0)
    computing = [*decoding[:4], make_stage("forward", 0.1, 20.0), make_stage("write", 0.01)]
    assert "the forward loop itself" in explain(0.7, computing, 0.05, 1.95, on_cpu=False)


@pytest.mark.parametrize(
    ("rate", "starvation", "on_cpu", "words"),
    [
        (95.0, 0.5, True, "the CPU, of which decode takes 75%"),
        (50.0, 0.4, True, "loading; the forward loop waited 40% of its time"),
        (50.0, 0.01, True, "the forward loop itself"),
    ],
)
def test_sentence_names_the_cause_a_setting_and_the_share(
    rate: float, starvation: float, on_cpu: bool, words: str
) -> None:
    stages = make_free_stages(decode=7.5, forward=2.5)
    ceilings = compute_ceilings(stages, 1)
    sentence = explain_bottleneck(rate, ceilings, stages, starvation=starvation, loader_processes=1, on_cpu=on_cpu)
    assert words in sentence
    assert "runtime." in sentence or "preprocess." in sentence
    assert f"{rate:.0f}% of the tightest ceiling (cpu)" in sentence


def test_cores_taken_by_other_programs_are_named() -> None:
    stages = make_free_stages(decode=2.5, forward=7.5)
    sentence = explain_bottleneck(
        20.0,
        compute_ceilings(stages, 2),
        stages,
        starvation=0.0,
        loader_processes=2,
        on_cpu=True,
        cores=2,
        cores_busy=0.5,
    )
    assert "bottleneck: cores; the run had 0.5 of 2 on average" in sentence


@pytest.mark.parametrize("name", ["gpu", "link", "store", "disk"])
def test_sentence_for_each_ceiling_names_a_setting(name: str) -> None:
    sentence = explain_bottleneck(
        100.0, [Ceiling(name, 100.0, "")], make_free_stages(), starvation=0.0, loader_processes=2, on_cpu=False
    )
    assert any(setting in sentence for setting in ("runtime.", "TMPDIR"))
