"""Images that break a device, raise or hang: found by the second process that meets them, and nobody else to blame."""

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


class AsItIs:
    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        return {"shade": output}


class Poisoned(nn.Module):
    """Tells the shade of each image; does something else to calls with a poisonous one among them."""

    def __init__(self, harm: Callable[[], object]) -> None:
        super().__init__()
        self.harm, self.calls = harm, list[int]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(images))
        if bool((images == POISON).any()):
            self.harm()
        return images[:, 0, 0, 0]


def raising(error: Exception) -> Callable[[], object]:
    def harm() -> None:
        raise error

    return harm


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Process:
    """A worker's process, as far as it matters here: what it holds is its own, the store is everybody's."""

    def __init__(self, folder: Path, harm: Callable[[], object] = lambda: None) -> None:
        self.module = Poisoned(harm)
        forward = ForwardPass(
            self.module.eval(), Normalizer(Preprocess(scale="none")), torch.device("cpu"), ForwardOptions()
        )
        self.quarantine = Quarantine(open_store(str(folder)), "plan/")
        self.clock = Clock()
        self.stopwatch = Watchdog(self.clock)
        self.guard = FaultIsolatingPredictor(
            Predictor(forward, AsItIs()), self.quarantine, "cuda:0", self.stopwatch.step
        )

    def find_stall(self, seconds: float, storage_seconds: float) -> WorkerStalled | None:
        step = self.stopwatch.stalled_step(seconds, storage_seconds)
        return self.guard.explain_stall(step, seconds) if step else None

    def predict(self, poisonous: Iterable[int] = (), bad: Iterable[int] = (), first: int = FIRST) -> Prediction:
        """A batch whose rows have the shades 0, 1, 2 …, but for poisonous ones; bad ones have no pixels."""
        return self.begin(poisonous, bad, first).wait()

    def begin(self, poisonous: Iterable[int] = (), bad: Iterable[int] = (), first: int = FIRST) -> Prediction:
        """The same, and its results left where they are."""
        self.quarantine.load(range(first, first + ROWS))
        known = self.quarantine.errors_by_row(range(first, first + ROWS))
        faults = {row: ImageInfo(error=ErrorRecord("decode", "truncated", "")) for row in bad} | dict(known)
        shades = [POISON if row in poisonous else row for row in range(ROWS) if row not in faults]
        pixels = torch.tensor(shades, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
        facts = tuple(faults.get(row, ImageInfo(f"tag-{row}", 2, 2)) for row in range(ROWS))
        made = self.guard.predict(Batch(0, 0, facts, pixels), range(first, first + ROWS))
        assert made is not None
        return made


def shades(made: Prediction) -> list[float]:
    found = {
        row: shade for piece in made.outputs for row, shade in zip(piece.rows, piece.tensors["shade"], strict=True)
    }
    return [float(found[row]) for row in sorted(found)]


def test_what_breaks_a_device_is_found_by_the_second_process_and_met_by_no_third(tmp_path: Path) -> None:
    harm = raising(torch.AcceleratorError(ASSERT))
    first = Process(tmp_path, harm)
    with pytest.raises(DeviceFault, match="cuda:0 failed: AcceleratorError: CUDA error: device-side assert") as told:
        first.predict([5], bad=[2])
    assert (told.value.suspect_positions, told.value.culprit_known) == ((range(FIRST, FIRST + ROWS),), False)
    with pytest.raises(DeviceFault):
        first.predict(first=900)
    assert first.module.calls == [7], "on a broken device nothing more is tried"

    second = Process(tmp_path, harm)
    with pytest.raises(DeviceFault) as told:
        second.predict([5], bad=[2])
    assert (told.value.suspect_positions, told.value.culprit_known) == ((range(FIRST + 5, FIRST + 6),), True)
    assert second.module.calls == [1] * 5, "one by one, up to the one that did it"

    third = Process(tmp_path, harm)
    assert shades(third.predict([5], bad=[2])) == [0, 1, 3, 4, 6, 7]
    facts = third.quarantine.find(FIRST + 5)
    assert facts is not None
    assert facts.error is not None
    assert (facts.etag, facts.error.stage, facts.error.type) == ("tag-5", "predict", "device")


def test_several_in_one_batch_cost_a_process_each_and_one(tmp_path: Path) -> None:
    deaths = 0
    while True:
        try:
            made = Process(tmp_path, raising(RuntimeError(ASSERT))).predict([0, 3, 7])
        except DeviceFault:
            deaths += 1
        else:
            break
    assert shades(made) == [1, 2, 4, 5, 6]
    assert deaths == 4


def test_what_does_not_come_back_one_by_one_was_not_the_images(tmp_path: Path) -> None:
    with pytest.raises(DeviceFault):
        Process(tmp_path, raising(RuntimeError(ASSERT))).predict([5])
    assert len(shades(Process(tmp_path).predict([5]))) == ROWS


def test_hardware_that_fails_casts_no_suspicion_on_images(tmp_path: Path) -> None:
    with pytest.raises(DeviceFault) as told:
        Process(tmp_path, raising(RuntimeError(ECC))).predict([5])
    assert (told.value.suspect_positions, told.value.culprit_known) == ((), False)
    process = Process(tmp_path)
    process.predict()
    assert process.module.calls == [ROWS]


class Late(Predictor):
    """The results of these calls do not arrive."""

    failing = True

    def __call__(self, pixels: torch.Tensor, shapes: Any = None) -> Prediction:
        def arrival() -> None:
            if self.failing:
                raise RuntimeError(ASSERT)

        return super().__call__(pixels, shapes).on_ready(lambda before: arrival())


def test_a_fault_that_shows_when_results_arrive_makes_suspects_of_all_that_was_under_way(tmp_path: Path) -> None:
    process = Process(tmp_path)
    predictor = Late(process.guard._predictor.forward, AsItIs())
    process.guard = FaultIsolatingPredictor(predictor, process.quarantine, "cuda:0")
    under_way: list[Prediction] = []
    for first in (0, 8, 16):
        pixels = torch.zeros(ROWS, 3, 2, 2, dtype=torch.uint8)
        made = process.guard.predict(Batch(0, 0, (ImageInfo(),) * ROWS, pixels), range(first, first + ROWS))
        assert made is not None
        under_way.append(made)
    predictor.failing = False
    under_way[0].wait()
    predictor.failing = True
    with pytest.raises(DeviceFault) as told:
        under_way[1].wait()
    assert told.value.suspect_positions == (range(8, 16), range(16, 24))
    other = Quarantine(open_store(str(tmp_path)), "plan/")
    other.load(range(100))
    assert [other.has_suspect(range(first, first + 8)) for first in (0, 8, 16, 24)] == [False, True, True, False]


def test_an_image_that_the_model_raises_at_is_a_fault_of_its_own(tmp_path: Path) -> None:
    harm = raising(ValueError("a shade that I do not know\nsecond line"))
    made = Process(tmp_path, harm).predict([5, 6], bad=[0])
    assert shades(made) == [1, 2, 3, 4, 7]
    assert {row: (fault.stage, fault.type) for row, fault in made.errors.items()} == {
        4: ("predict", "error"),  # of those that have pixels
        5: ("predict", "error"),
    }
    assert made.errors[4].message == "ValueError: a shade that I do not know"


def test_a_model_that_raises_at_every_image_is_no_fault_of_the_images(tmp_path: Path) -> None:
    with pytest.raises(AttemptFailed, match="the model fails at every image: ValueError: always"):
        Process(tmp_path, raising(ValueError("always"))).predict(range(ROWS))


def hanging(process: Process, released: threading.Event, **batch: Any) -> tuple[threading.Thread, threading.Event]:
    """Have it predict in a thread; the event says when the model has it."""
    entered = threading.Event()

    def harm() -> None:
        entered.set()
        released.wait()

    process.module.harm = harm
    thread = threading.Thread(target=lambda: process.predict(**batch))
    thread.start()
    return thread, entered


def test_what_hangs_is_found_as_well(tmp_path: Path) -> None:
    released = threading.Event()
    threads = []
    for found in (False, True):
        process = Process(tmp_path)
        assert process.find_stall(60, 90) is None
        thread, entered = hanging(process, released, poisonous=[5])
        threads.append(thread)
        assert entered.wait(30)
        process.clock.now += 59
        assert process.find_stall(60, 90) is None
        process.clock.now += 2
        stalled = process.find_stall(60, 90)
        assert stalled is not None
        assert stalled.culprit_known == found
        assert "has not ended for 61 s (runtime.stall_seconds)" in stalled.message
    released.set()
    for thread in threads:
        thread.join()
    assert len(shades(Process(tmp_path).predict([5]))) == ROWS - 1


def test_what_was_predicted_is_not_suspected_of_a_later_hang_though_nobody_took_it(tmp_path: Path) -> None:
    released, process = threading.Event(), Process(tmp_path)
    process.begin(first=900)  # its shard has failed, say: the results are passed over
    thread, entered = hanging(process, released, poisonous=[5])
    assert entered.wait(30)
    process.clock.now += 61
    stalled = process.find_stall(60, 90)
    released.set()
    thread.join()
    assert stalled is not None
    assert stalled.suspect_positions == (range(FIRST, FIRST + ROWS),)


def test_what_hangs_elsewhere_is_blamed_on_no_image(tmp_path: Path) -> None:
    released = threading.Event()
    process = Process(tmp_path)
    with process.stopwatch.step("the end of a part"):
        process.clock.now += 5
        thread, entered = hanging(process, released, poisonous=[5])
        assert entered.wait(30)
        process.clock.now += 57
        stalled = process.find_stall(60, 90)
    released.set()
    thread.join()
    assert stalled is not None
    assert (stalled.culprit_known, stalled.suspect_positions) == (False, ())


class AwayQuarantine(Quarantine):
    """Its store is away."""

    def suspect(self, run: range, why: str) -> None:
        raise Unavailable(f"{run} {why}")


def test_what_cannot_be_remembered_does_not_hide_the_fault(tmp_path: Path) -> None:
    process = Process(tmp_path, raising(RuntimeError(ASSERT)))
    process.guard._quarantine = AwayQuarantine()
    with pytest.raises(DeviceFault):
        process.predict([5])


def test_a_batch_of_one_image_is_suspect_too(tmp_path: Path) -> None:
    quarantine = Quarantine(open_store(str(tmp_path)), "plan/")
    quarantine.record_suspects(range(7, 8), "why")
    other = Quarantine(open_store(str(tmp_path)), "plan/")
    other.load(range(10))
    assert other.has_suspect(range(7, 8))
    assert other.errors_by_row(range(10)) == {}
