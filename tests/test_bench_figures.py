"""What a bench makes of its figures: the sentence it ends with, the picture, and when a batch is through."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

from batchjob.bench.bottleneck import compute_ceilings, explain_bottleneck
from batchjob.bench.profiler_trace import ANCHOR, TRACKS, build_track_events
from batchjob.bench.stage_clock import StageClock
from batchjob.errors import BatchjobError
from batchjob.inference.fault_isolation import FaultIsolatingPredictor
from batchjob.inference.forward import ForwardOptions, ForwardPass
from batchjob.inference.predictor import PROFILER_PREFIX, Predictor
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.shard_queue import ShardQueue
from batchjob.output.part_builder import PartBuilder
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import Preprocess
from batchjob.storage.store import open_store
from batchjob.types import Batch, ImageInfo, ImageRef, Prediction, Shard, ShardKey, StageTiming
from batchjob.worker.shard_runner import ShardRunner

# -- the sentence ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """A stage that took so much."""

    name: str
    cpu_ms: float | None = None
    gpu_ms: float | None = None
    bytes: float | None = None
    images_per_second: float | None = None


def spent(**cpu_ms: float) -> list[Spent]:
    known = dict.fromkeys(("fetch", "decode", "transform", "collate", "forward", "write"), 0.01)
    return [Spent(name, ms) for name, ms in (known | cpu_ms).items()]


def said(share: float, stages: Sequence[Spent], starvation: float, busy: float | None, **given: Any) -> str:
    found = compute_ceilings(stages, 2, store_images_per_second=given.pop("store", None))
    rate = share * found[0].images_per_second
    given = {"loader_processes": 2, "on_cpu": True, **given}
    return explain_bottleneck(rate, found, stages, starvation=starvation, cores=2, cores_busy=busy, **given)


@pytest.mark.parametrize(("share", "starvation"), [(0.79, 0.03), (0.60, 0.86)])
def test_where_all_cores_are_busy_the_cpu_is_named(share: float, starvation: float) -> None:
    sentence = said(share, spent(decode=1.4, transform=1.7, forward=2.6), starvation, 1.97)
    assert sentence.startswith("bottleneck: the CPU, of which forward takes 45%: runtime.device=cuda")
    assert "all cores are busy (1.97 of 2)" in sentence
    assert f"the run reaches {share:.0%} of the tightest ceiling (cpu)" in sentence
    assert "runtime.batch_size" not in sentence
    assert "loader" not in sentence


@pytest.mark.parametrize(
    ("most", "words"),
    [
        ("decode", "decode takes 98%: decode.mode=fast (pixels then differ a little), smaller source images or more"),
        ("transform", "transform takes 98%: decode.mode=fast (pixels then differ a little), a smaller preprocess.res"),
        ("write", "write takes 98%: fewer columns in task or more cores"),
        ("fetch", "fetch takes 98%: smaller source images or more cores"),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_what_costs_most_is_what_the_words_are_about(most: str, words: str, share: float) -> None:
    assert words in said(share, spent(**{most: 3.0}), 0.5, 1.9)
    assert "decode.mode" not in said(share, spent(**{most: 3.0}), 0.5, 1.9, exact_decode=False)


def test_cores_that_are_idle_or_not_known_leave_it_to_the_loader() -> None:
    for busy in (1.0, None):
        sentence = said(0.6, spent(decode=3.0), 0.86, busy)
        assert sentence.startswith("bottleneck: loading; the forward loop waited 86% of its time")


def test_beside_a_gpu_the_cpu_is_named_where_it_is_tightest_or_pixels_are_waited_for() -> None:
    decoding = [*spent(decode=3.0)[:4], Spent("forward", 0.1, 0.2), Spent("write", 0.01)]
    assert "the CPU, of which decode takes" in said(0.7, decoding, 0.05, 1.95, on_cpu=False)
    assert "the CPU, of which decode takes" in said(0.7, decoding, 0.5, 1.95, on_cpu=False, store=100.0)
    computing = [*decoding[:4], Spent("forward", 0.1, 20.0), Spent("write", 0.01)]
    assert "the forward loop itself" in said(0.7, computing, 0.05, 1.95, on_cpu=False)


def test_the_copy_back_is_counted_once_for_forward_is_timed_to_its_end() -> None:
    stages = [*spent(decode=1.0)[:4], Spent("forward", 0.97, 0.5), Spent("D2H", 0.3, 0.4), Spent("write", 0.0)]
    rates = {one.name: one.images_per_second for one in compute_ceilings(stages, 2)}
    assert rates == {"gpu": pytest.approx(2000), "cpu": pytest.approx(1000)}


# -- the picture -----------------------------------------------------------------------------------------------


def event(step: str, start: float, thread: int, where: str = "user_annotation", took: float = 10.0) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"{PROFILER_PREFIX}{step}",
        "cat": where,
        "ts": start,
        "dur": took,
        "pid": 1,
        "tid": thread,
    }


def picture(events: Sequence[dict[str, Any]], spans: Sequence[StageTiming]) -> dict[str, list[tuple[float, float]]]:
    """Each track's title, in the order of the tracks, and when what is on it began and how long it took, in µs."""
    anchor = {**event("", 1000.0, 1, took=0.0), "name": ANCHOR}
    made = list(build_track_events([anchor, *events], spans, 5.0))
    titles = {one["tid"]: one["args"]["name"] for one in made if one["name"] == "thread_name"}
    order = {one["tid"]: one["args"]["sort_index"] for one in made if one["name"] == "thread_sort_index"}
    assert set(titles) == set(order)
    return {
        titles[track]: [(one["ts"], one["dur"]) for one in made if one["ph"] == "X" and one["tid"] == track]
        for track in sorted(titles, key=order.__getitem__)
    }


def span(stage: str, began: float, ended: float) -> StageTiming:
    return StageTiming(stage, 5.0 + began, 5.0 + ended, os.getpid(), 4)


def test_a_stage_of_any_name_has_a_track() -> None:
    found = picture([event("forward", 1200.0, 7)], [span("polish", 1e-3, 2e-3), span("device decode", 0.0, 1e-3)])
    assert list(found) == ["device decode", "forward", "polish"]
    assert found["polish"][0] == pytest.approx((2000.0, 1000.0))
    assert "device decode" in TRACKS


def test_two_batches_at_once_do_not_lie_on_each_other() -> None:
    spans = [span("device decode", *when) for when in ((0.0, 0.002), (0.001, 0.003), (0.002, 0.004))]
    found = picture([], spans)
    assert [len(found[title]) for title in ("device decode", "device decode 2")] == [2, 1]


def test_where_a_gpu_computes_its_own_times_are_shown() -> None:
    host = [event(step, 1100.0 + at, 7) for at, step in enumerate(("H2D", "forward", "D2H"))]
    gpu = [event("forward", 1500.0, 20, "gpu_user_annotation", 300.0), event("H2D", 1400.0, 21, "gpu_user_annotation")]
    found = picture([*host, *gpu], [])
    assert found == {"H2D": [(1400.0, 10.0)], "forward": [(1500.0, 300.0)], "D2H": [(1102.0, 10.0)]}


# -- when a batch is through -----------------------------------------------------------------------------------


class Late(Predictor):
    """Its results are under way until they are waited for, as on a GPU."""

    def __call__(self, pixels: torch.Tensor, shapes: Any = None) -> Prediction:
        return super().__call__(pixels, shapes).on_ready(lambda before: before())


class AsItIs:
    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        return {"shade": output}


class Given:
    """Two batches of the shard, loaded already."""

    def batches(self, feed: ShardQueue) -> Iterator[Batch]:
        shard = feed.next_shard()
        assert shard is not None
        for start in (0, 2):
            pixels = torch.zeros((2, 3, 4, 4), dtype=torch.uint8)
            yield Batch(0, start, (ImageInfo("tag", 4, 4),) * 2, pixels, attempt_number=shard.attempt_number)


class Held(PartBuilder):
    """Leaves results where they are."""

    def __init__(self) -> None:
        self.predicted: list[Prediction] = []

    def add(
        self, shard: Shard, batch: Batch, prediction: Prediction | None, *, forward_seconds: float, is_last: bool
    ) -> None:
        assert prediction is not None
        assert forward_seconds > 0
        self.predicted.append(prediction)

    def fail_attempt(self, shard: Shard, error: BatchjobError) -> None:
        raise error

    def has_failed(self, attempt: int) -> bool:
        return False


def passed(folder: Path, kind: Callable[..., Predictor]) -> tuple[list[StageTiming], Held]:
    forward = ForwardPass(
        nn.Flatten().eval(), Normalizer(Preprocess(scale="none")), torch.device("cpu"), ForwardOptions()
    )
    guard = FaultIsolatingPredictor(kind(forward, AsItIs()), Quarantine(open_store(str(folder)), "plan/"), "cuda:0")
    spans, held = list[StageTiming](), Held()
    refs = tuple(ImageRef(n, f"{n}", f"{n}") for n in range(4))
    passage = ShardRunner(Given(), guard, held, 1, lambda: False, spans.append, nullcontext)
    passage.run(ShardQueue.of([Shard(ShardKey(0, "0" * 16, 4, 0, 0), refs, pa.table({}))]))
    return spans, held


def test_a_batch_on_a_gpu_is_through_when_its_results_have_arrived(tmp_path: Path) -> None:
    spans, held = passed(tmp_path, Late)
    assert {one.stage for one in spans} == {"wait"}, "begun is not done"
    launched = time.perf_counter()
    for predicted in held.predicted:
        predicted.wait()
    first, second = (one for one in spans if one.stage == "forward")
    assert first.started < launched < first.ended <= second.started, "the GPU takes one after the other"
    assert (first.images, second.images) == (2, 2)


def test_a_batch_on_a_cpu_is_through_when_it_is_back(tmp_path: Path) -> None:
    spans, _ = passed(tmp_path, Predictor)
    assert [one.images for one in spans if one.stage == "forward"] == [2, 2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here")
def test_the_clock_looks_at_the_device_that_it_is_for() -> None:
    clock = StageClock(torch.device("cuda:1"))
    with clock.measure(1), torch.cuda.device(1):
        torch.cuda._sleep(200_000_000)
    assert clock.gpu_ms > 10, "milliseconds"
    assert clock.to_measurement("forward", None).gpu_ms == pytest.approx(clock.gpu_ms)
