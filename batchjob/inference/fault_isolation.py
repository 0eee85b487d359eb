"""Batches through the predictor on a device that may fail under them: which images were with it, and which did it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from threading import get_ident

from batchjob.concurrency import DaemonThreadPool
from batchjob.errors import AttemptFailed, BatchjobError, DeviceFault, Unavailable, WorkerStalled
from batchjob.inference.device_errors import classify_device_error
from batchjob.inference.predictor import Predictor
from batchjob.loader.quarantine import Quarantine
from batchjob.types import (
    Batch,
    ErrorRecord,
    ImageInfo,
    PartialOutput,
    Prediction,
    StalledStep,
    StepMonitor,
    no_monitor,
)

__all__ = ["FaultIsolatingPredictor"]

_log = logging.getLogger(__name__)
_TRACE_SECONDS = 30.0  # that the news of a hang waits until its images are remembered


class FaultIsolatingPredictor:
    """The predictor as a worker calls it.

    A batch at which the model raises is predicted again image by image. Images that were with the model when it hung,
    or when the device failed, are suspects from then on, for all workers and later runs of the plan: they are predicted
    one by one, too. So the second process that such a fault meets knows which image it is; that one is an error row
    (`stage=predict`), and nobody meets it again.

    Args:
        predictor: as it was tuned.
        quarantine: of the plan.
        device: by its `identity`, for the sentences and for who counts faults of devices.
        step: Wraps each call of the model, so that one that hangs is noticed.
    """

    def __init__(
        self, predictor: Predictor, quarantine: Quarantine, device: str, step: StepMonitor = no_monitor
    ) -> None:
        self._predictor, self._quarantine = predictor, quarantine
        self._device, self._step = device, step
        self._lock = threading.Lock()
        self._under_way: deque[range] = deque()
        self._alone: dict[int, tuple[int, str | None]] = {}  # in that thread, the image of that position and tag
        self._broken: DeviceFault | None = None

    def predict(self, batch: Batch, positions: Sequence[int]) -> Prediction | None:
        """The batch's results, None where it holds no good image; on a GPU they may still be under way.

        Args:
            batch: as loaded.
            positions: in the plan, of all its rows.

        Raises:
            Unavailable: it could not be loaded.
            DeviceFault: the device or its context is broken, now or since an earlier batch; end this process.
            Exception: whatever the model raises.
        """
        if batch.attempt_error is not None:
            raise Unavailable(batch.attempt_error)
        if self._broken is not None:
            raise self._broken
        if batch.pixels is None:
            return None
        run = range(positions[0], positions[-1] + 1)
        if self._quarantine.has_suspect(run):
            return self._one_by_one(batch, positions)
        with self._lock:
            self._under_way.append(run)
        try:
            with self._step("a batch in the model", model=True):
                predicted = self._predictor(batch.pixels, batch.shapes)
        except Exception as error:
            if isinstance(error, BatchjobError) or classify_device_error(error, self._predictor.forward.device):
                raise self._judged(error, run) from error
            self._ended(run)
            return self._one_by_one(batch, positions)
        if predicted.pending:
            return predicted.on_ready(partial(self._landing, run))
        self._ended(run)  # now, for nobody may want its results any more
        return predicted

    def as_device_fault(self, error: BatchjobError) -> BatchjobError:
        """A fault that showed elsewhere (in page-locking memory, for one): a DeviceFault if that is what it is."""
        return self._lost(error) if classify_device_error(error, self._predictor.forward.device) else error

    def explain_stall(self, step: StalledStep, seconds: float) -> WorkerStalled:
        """Describe a step that has stalled; if the model hangs, record the images that it has as suspects.

        Args:
            step: The step, in another thread.
            seconds: Time that a step may take.
        """
        limits = "runtime.stall_seconds" + (" and errors.outage_seconds" if step.storage else "")
        words = f"{self._device}: {step.name} has not ended for {step.seconds:.0f} s ({limits})"
        found, images = False, tuple[range, ...]()
        if step.model:
            alone = f"alone in the model, it has not ended for {seconds:g} s"
            tracing = DaemonThreadPool(1, "trace").submit(partial(self._traced, step.thread, "hang", alone, words))
            with suppress(TimeoutError):  # the store may be as stuck as the model
                found, images = tracing.result(_TRACE_SECONDS)
        return WorkerStalled(f"{words}; the same command resumes", self._device, images, found, step.storage)

    # -- several at once ---------------------------------------------------------------------------------------

    def _landing(self, run: range, arrival: Callable[[], None]) -> None:
        """Wait for results; on a GPU all goes in turn, so what was sent before them has arrived by then too."""
        try:
            arrival()
        except Exception as error:
            raise self._judged(error, run) from error
        with self._lock:
            while run in self._under_way and self._under_way.popleft() != run:
                continue

    def _ended(self, run: range) -> None:
        with self._lock:
            if run in self._under_way:
                self._under_way.remove(run)

    def _judged(self, error: Exception, run: range) -> Exception:
        """What is raised in its place. Its images are suspects now, and those that are with a broken device too."""
        if classify_device_error(error, self._predictor.forward.device):
            return self._lost(error)
        self._ended(run)
        if not isinstance(error, BatchjobError):
            self._remember(lambda: self._quarantine.record_suspects(run, _brief(error)))
        return error

    def _lost(self, error: Exception) -> DeviceFault:
        """The device, or this process's part of it, is of no more use."""
        if self._broken is not None:
            return self._broken
        kind, words = classify_device_error(error, self._predictor.forward.device), _brief(error)
        found, images = False, tuple[range, ...]()
        if kind == "context":
            found, images = self._traced(get_ident(), "device", f"alone on the device, it broke it: {words}", words)
        said = f"{self._device} failed: {words}; the same command resumes"
        self._broken = DeviceFault(said, self._device, images, found)
        return self._broken

    def _traced(self, thread: int, kind: str, alone: str, why: str) -> tuple[bool, tuple[range, ...]]:
        """The image that this thread has alone in the model, remembered as having done it; else all under way."""
        if (image := self._alone.get(thread)) is not None:
            position, etag = image
            facts = ImageInfo(etag, error=ErrorRecord("predict", kind, alone))
            if self._remember(lambda: self._quarantine.record(position, facts)):
                return True, (range(position, position + 1),)
        with self._lock:
            runs = tuple(self._under_way)
        for run in runs:
            self._remember(partial(self._quarantine.record_suspects, run, why))
        return False, runs

    # -- one by one --------------------------------------------------------------------------------------------

    def _one_by_one(self, batch: Batch, positions: Sequence[int]) -> Prediction:
        """Each image in a call of its own; one that the model raises at is a fault of that image.

        Raises:
            AttemptFailed: it raises at all of several.
        """
        pixels, good = batch.pixels, [row for row, facts in enumerate(batch.image_infos) if facts.error is None]
        assert pixels is not None
        try:
            self._predictor.wait()  # else what an earlier batch has broken would be laid to one of these
        except Exception as error:
            raise self._lost(error) from error
        pieces: list[PartialOutput] = []
        lost: dict[int, ErrorRecord] = {}
        for number, row in enumerate(good):
            self._alone[get_ident()] = positions[row], batch.image_infos[row].etag
            try:
                with self._step("an image alone in the model", model=True):
                    made = self._predictor.predict_single(pixels, batch.shapes, number)
                pieces += made.outputs
                lost |= made.errors
            except Exception as error:
                if classify_device_error(error, self._predictor.forward.device):
                    raise self._lost(error) from error
                if isinstance(error, BatchjobError):
                    raise
                lost[number] = ErrorRecord("predict", "error", _brief(error))
            finally:
                del self._alone[get_ident()]
        if len(lost) > 1 and not pieces:
            raise AttemptFailed(f"the model fails at every image: {lost[0].message}")
        return Prediction(tuple(pieces), lost)

    def _remember(self, put: Callable[[], object]) -> bool:
        """Whether that worked: where the store is away too, what has happened is the more important news."""
        try:
            put()
        except BatchjobError as error:
            _log.warning("not remembered: %s", error.message)
            return False
        return True


def _brief(error: BaseException) -> str:
    """Its first line, which of CUDA's many is the one that says it."""
    text = error.message if isinstance(error, BatchjobError) else str(error)
    return f"{type(error).__name__}: {(text.strip().splitlines() or ['no message'])[0][:300]}"
