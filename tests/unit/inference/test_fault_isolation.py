"""Images that break a device, raise or hang: found by the second process that predicts them, and no image else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.errors import AttemptFailed, DeviceFault, Unavailable, WorkerStalled
from batchjob.inference.fault_isolation import FaultIsolatingPredictor
from batchjob.inference.forward import ForwardOptions, ForwardPass
from batchjob.inference.predictor import Predictor
from batchjob.loader.quarantine import Quarantine
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import Preprocess
from batchjob.storage.store import open_store
from batchjob.types import Batch, ErrorRecord, ImageInfo, Prediction
from batchjob.worker.watchdog import Watchdog

ASSERT = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"
ECC = "CUDA error: uncorrectable ECC error encountered"
POISON, ROWS, FIRST = 250, 8, 100


class IdentityPostprocess:
    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        return {"shade": output}


class PoisonableNet(nn.Module):
    """Network that returns the shade of each image, and does harm in a call with a poisonous one."""

    def __init__(self, harm: Callable[[], object]) -> None:
        super().__init__()
        self.harm, self.calls = harm, list[int]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(images))
        if bool((images == POISON).any()):
            self.harm()
        return images[:, 0, 0, 0]


def make_raiser(error: Exception) -> Callable[[], object]:
    def harm() -> None:
        raise error

    return harm


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class WorkerProcess:
    """Process of a worker: its state is its own, the store is shared."""

    def __init__(self, folder: Path, harm: Callable[[], object] = lambda: None) -> None:
        self.module = PoisonableNet(harm)
        forward = ForwardPass(
            self.module.eval(), Normalizer(Preprocess(scale="none")), torch.device("cpu"), ForwardOptions()
        )
        self.quarantine = Quarantine(open_store(str(folder)), "plan/")
        self.clock = Clock()
        self.stopwatch = Watchdog(self.clock)
        self.predictor = FaultIsolatingPredictor(
            Predictor(forward, IdentityPostprocess()), self.quarantine, "cuda:0", self.stopwatch.step
        )

    def find_stall(self, seconds: float, storage_seconds: float) -> WorkerStalled | None:
        step = self.stopwatch.stalled_step(seconds, storage_seconds)
        return self.predictor.explain_stall(step, seconds) if step else None

    def predict(self, poisonous: Iterable[int] = (), bad: Iterable[int] = (), first: int = FIRST) -> Prediction:
        """Predict a batch with the shades 0, 1, 2 …, except poisonous rows; bad rows have no pixels."""
        return self.begin(poisonous, bad, first).wait()

    def begin(self, poisonous: Iterable[int] = (), bad: Iterable[int] = (), first: int = FIRST) -> Prediction:
        """Predict the same batch without waiting for its results."""
        self.quarantine.load(range(first, first + ROWS))
        known = self.quarantine.errors_by_row(range(first, first + ROWS))
        faults = {row: ImageInfo(error=ErrorRecord("decode", "truncated", "")) for row in bad} | dict(known)
        list_shades = [POISON if row in poisonous else row for row in range(ROWS) if row not in faults]
        pixels = torch.tensor(list_shades, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
        facts = tuple(faults.get(row, ImageInfo(f"tag-{row}", 2, 2)) for row in range(ROWS))
        prediction = self.predictor.predict(Batch(0, 0, facts, pixels), range(first, first + ROWS))
        assert prediction is not None
        return prediction


def list_shades(prediction: Prediction) -> list[float]:
    by_row = {
        row: shade
        for piece in prediction.outputs
        for row, shade in zip(piece.rows, piece.tensors["shade"], strict=True)
    }
    return [float(by_row[row]) for row in sorted(by_row)]


def test_image_that_breaks_the_device_is_found_by_the_second_process(tmp_path: Path) -> None:
    harm = make_raiser(torch.AcceleratorError(ASSERT))
    first = WorkerProcess(tmp_path, harm)
    with pytest.raises(DeviceFault, match="cuda:0 failed: AcceleratorError: CUDA error: device-side assert") as raised:
        first.predict([5], bad=[2])
    assert (raised.value.suspect_positions, raised.value.culprit_known) == ((range(FIRST, FIRST + ROWS),), False)
    with pytest.raises(DeviceFault):
        first.predict(first=900)
    assert first.module.calls == [7], "nothing more runs on a broken device"

    second = WorkerProcess(tmp_path, harm)
    with pytest.raises(DeviceFault) as raised:
        second.predict([5], bad=[2])
    assert (raised.value.suspect_positions, raised.value.culprit_known) == ((range(FIRST + 5, FIRST + 6),), True)
    assert second.module.calls == [1] * 5, "one by one, up to the image that causes the fault"

    third = WorkerProcess(tmp_path, harm)
    assert list_shades(third.predict([5], bad=[2])) == [0, 1, 3, 4, 6, 7]
    facts = third.quarantine.find(FIRST + 5)
    assert facts is not None
    assert facts.error is not None
    assert (facts.etag, facts.error.stage, facts.error.type) == ("tag-5", "predict", "device")


def test_each_poison_image_of_a_batch_costs_one_process(tmp_path: Path) -> None:
    deaths = 0
    while True:
        try:
            prediction = WorkerProcess(tmp_path, make_raiser(RuntimeError(ASSERT))).predict([0, 3, 7])
        except DeviceFault:
            deaths += 1
        else:
            break
    assert list_shades(prediction) == [1, 2, 4, 5, 6]
    assert deaths == 4


def test_fault_that_does_not_repeat_is_no_image_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceFault):
        WorkerProcess(tmp_path, make_raiser(RuntimeError(ASSERT))).predict([5])
    assert len(list_shades(WorkerProcess(tmp_path).predict([5]))) == ROWS


def test_hardware_fault_records_no_suspects(tmp_path: Path) -> None:
    with pytest.raises(DeviceFault) as raised:
        WorkerProcess(tmp_path, make_raiser(RuntimeError(ECC))).predict([5])
    assert (raised.value.suspect_positions, raised.value.culprit_known) == ((), False)
    process = WorkerProcess(tmp_path)
    process.predict()
    assert process.module.calls == [ROWS]


class FailingOnWait(Predictor):
    """Predictor whose results fail when they are waited for."""

    failing = True

    def __call__(self, pixels: torch.Tensor, shapes: Any = None) -> Prediction:
        def wait() -> None:
            if self.failing:
                raise RuntimeError(ASSERT)

        return super().__call__(pixels, shapes).on_ready(lambda before: wait())


def test_fault_at_wait_makes_all_batches_in_flight_suspects(tmp_path: Path) -> None:
    process = WorkerProcess(tmp_path)
    predictor = FailingOnWait(process.predictor._predictor.forward, IdentityPostprocess())
    process.predictor = FaultIsolatingPredictor(predictor, process.quarantine, "cuda:0")
    under_way: list[Prediction] = []
    for first in (0, 8, 16):
        pixels = torch.zeros(ROWS, 3, 2, 2, dtype=torch.uint8)
        prediction = process.predictor.predict(Batch(0, 0, (ImageInfo(),) * ROWS, pixels), range(first, first + ROWS))
        assert prediction is not None
        under_way.append(prediction)
    predictor.failing = False
    under_way[0].wait()
    predictor.failing = True
    with pytest.raises(DeviceFault) as raised:
        under_way[1].wait()
    assert raised.value.suspect_positions == (range(8, 16), range(16, 24))
    other = Quarantine(open_store(str(tmp_path)), "plan/")
    other.load(range(100))
    assert [other.has_suspect(range(first, first + 8)) for first in (0, 8, 16, 24)] == [False, True, True, False]


def test_model_error_is_isolated_to_its_image(tmp_path: Path) -> None:
    harm = make_raiser(ValueError("a shade that I do not know\nsecond line"))
    prediction = WorkerProcess(tmp_path, harm).predict([5, 6], bad=[0])
    assert list_shades(prediction) == [1, 2, 3, 4, 7]
    assert {row: (fault.stage, fault.type) for row, fault in prediction.errors.items()} == {
        4: ("predict", "error"),  # of those that have pixels
        5: ("predict", "error"),
    }
    assert prediction.errors[4].message == "ValueError: a shade that I do not know second line"


def test_model_error_at_every_image_fails_the_attempt(tmp_path: Path) -> None:
    with pytest.raises(AttemptFailed, match="the model fails at every image: ValueError: always"):
        WorkerProcess(tmp_path, make_raiser(ValueError("always"))).predict(range(ROWS))


def start_hanging_prediction(
    process: WorkerProcess, released: threading.Event, **batch: Any
) -> tuple[threading.Thread, threading.Event]:
    """Predict in a thread; the event is set once the model has the batch."""
    entered = threading.Event()

    def harm() -> None:
        entered.set()
        released.wait()

    process.module.harm = harm
    thread = threading.Thread(target=lambda: process.predict(**batch))
    thread.start()
    return thread, entered


def test_hanging_image_is_found_by_the_second_process(tmp_path: Path) -> None:
    released = threading.Event()
    threads = []
    for is_second in (False, True):
        process = WorkerProcess(tmp_path)
        assert process.find_stall(60, 90) is None
        thread, entered = start_hanging_prediction(process, released, poisonous=[5])
        threads.append(thread)
        assert entered.wait(30)
        process.clock.now += 59
        assert process.find_stall(60, 90) is None
        process.clock.now += 2
        stalled = process.find_stall(60, 90)
        assert stalled is not None
        assert stalled.culprit_known == is_second
        assert "has not ended for 61 s (runtime.stall_seconds)" in stalled.message
    released.set()
    for thread in threads:
        thread.join()
    assert len(list_shades(WorkerProcess(tmp_path).predict([5]))) == ROWS - 1


def test_completed_batch_is_no_suspect_of_a_later_hang(tmp_path: Path) -> None:
    released, process = threading.Event(), WorkerProcess(tmp_path)
    process.begin(first=900)  # its shard has failed, say: the results are passed over
    thread, entered = start_hanging_prediction(process, released, poisonous=[5])
    assert entered.wait(30)
    process.clock.now += 61
    stalled = process.find_stall(60, 90)
    released.set()
    thread.join()
    assert stalled is not None
    assert stalled.suspect_positions == (range(FIRST, FIRST + ROWS),)


def test_hang_outside_the_model_records_no_suspects(tmp_path: Path) -> None:
    released = threading.Event()
    process = WorkerProcess(tmp_path)
    with process.stopwatch.step("the end of a part"):
        process.clock.now += 5
        thread, entered = start_hanging_prediction(process, released, poisonous=[5])
        assert entered.wait(30)
        process.clock.now += 57
        stalled = process.find_stall(60, 90)
    released.set()
    thread.join()
    assert stalled is not None
    assert (stalled.culprit_known, stalled.suspect_positions) == (False, ())


class UnavailableQuarantine(Quarantine):
    """Quarantine whose store is not available."""

    def record_suspects(self, positions: range, reason: str) -> None:
        raise Unavailable(f"{positions} {reason}")


def test_unavailable_quarantine_does_not_hide_the_fault(tmp_path: Path) -> None:
    process = WorkerProcess(tmp_path, make_raiser(RuntimeError(ASSERT)))
    process.predictor._quarantine = UnavailableQuarantine()
    with pytest.raises(DeviceFault):
        process.predict([5])


def test_batch_of_one_image_can_be_suspect(tmp_path: Path) -> None:
    quarantine = Quarantine(open_store(str(tmp_path)), "plan/")
    quarantine.record_suspects(range(7, 8), "why")
    other = Quarantine(open_store(str(tmp_path)), "plan/")
    other.load(range(10))
    assert other.has_suspect(range(7, 8))
    assert other.errors_by_row(range(10)) == {}
