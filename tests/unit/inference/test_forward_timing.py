"""Timing of the stage `forward`: a batch ends when its results are on the host, on a CPU as on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from batchjob.errors import BatchjobError
from batchjob.inference.fault_isolation import FaultIsolatingPredictor
from batchjob.inference.forward import ForwardOptions, ForwardPass
from batchjob.inference.predictor import Predictor
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.shard_queue import ShardQueue
from batchjob.output.part_builder import PartBuilder
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import Preprocess
from batchjob.storage.store import open_store
from batchjob.types import Batch, ImageInfo, ImageRef, Prediction, Shard, ShardKey, StageTiming
from batchjob.worker.shard_runner import ShardRunner


class AsynchronousPredictor(Predictor):
    """Predictor whose results are pending until they are waited for, as on a GPU."""

    def __call__(self, pixels: torch.Tensor, shapes: Any = None) -> Prediction:
        return super().__call__(pixels, shapes).on_ready(lambda wait: wait())


class IdentityPostprocess:
    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        return {"shade": output}


class TwoLoadedBatches:
    """Loader with two batches of the shard that are loaded already."""

    def batches(self, queue: ShardQueue) -> Iterator[Batch]:
        shard = queue.next_shard()
        assert shard is not None
        for start in (0, 2):
            pixels = torch.zeros((2, 3, 4, 4), dtype=torch.uint8)
            yield Batch(0, start, (ImageInfo("tag", 4, 4),) * 2, pixels, attempt_number=shard.attempt_number)


class PredictionCollector(PartBuilder):
    """Part builder that keeps the predictions and does not wait for them."""

    def __init__(self) -> None:
        self.predictions: list[Prediction] = []

    def add(
        self, shard: Shard, batch: Batch, prediction: Prediction | None, *, forward_seconds: float, is_last: bool
    ) -> None:
        assert prediction is not None
        assert forward_seconds > 0
        self.predictions.append(prediction)

    def fail_attempt(self, shard: Shard, error: BatchjobError) -> None:
        raise error

    def has_failed(self, attempt: int) -> bool:
        return False


def run_shard(folder: Path, predictor_class: Callable[..., Predictor]) -> tuple[list[StageTiming], PredictionCollector]:
    """Run a shard of four images; return the timings, which grow as results are waited for, and the predictions."""
    forward = ForwardPass(
        nn.Flatten().eval(), Normalizer(Preprocess(scale="none")), torch.device("cpu"), ForwardOptions()
    )
    quarantine = Quarantine(open_store(str(folder)), "plan/")
    predictor = FaultIsolatingPredictor(predictor_class(forward, IdentityPostprocess()), quarantine, "cuda:0")
    timings, collector = list[StageTiming](), PredictionCollector()
    refs = tuple(ImageRef(n, f"{n}", f"{n}") for n in range(4))
    runner = ShardRunner(TwoLoadedBatches(), predictor, collector, 1, lambda: False, timings.append, nullcontext)
    runner.run(ShardQueue.of([Shard(ShardKey(0, "0" * 16, 4, 0, 0), refs, pa.table({}))]))
    return timings, collector


def test_forward_on_a_gpu_ends_when_its_results_arrive(tmp_path: Path) -> None:
    timings, collector = run_shard(tmp_path, AsynchronousPredictor)
    assert {timing.stage for timing in timings} == {"wait"}, "a launched batch is not done"
    launched = time.perf_counter()
    for prediction in collector.predictions:
        prediction.wait()
    first, second = (timing for timing in timings if timing.stage == "forward")
    assert first.started < launched < first.ended <= second.started, "a GPU computes one batch after the other"
    assert (first.images, second.images) == (2, 2)


def test_forward_on_a_cpu_ends_when_the_call_returns(tmp_path: Path) -> None:
    timings, _ = run_shard(tmp_path, Predictor)
    assert [timing.images for timing in timings if timing.stage == "forward"] == [2, 2]
