"""Predictor that isolates faults: finds the image at which a model raises, hangs, or breaks its device."""

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
from batchjob.user_code import describe_fault

__all__ = ["FaultIsolatingPredictor"]

_log = logging.getLogger(__name__)

# Time for which the report of a hang waits until the images of the hanging call are in the quarantine.
_RECORD_SECONDS = 30.0


class FaultIsolatingPredictor:
    """Predictor as a worker uses it.

    A batch at which the model raises is predicted again, image by image. The images that the model had when it hung,
    or when the device failed, become suspects in the quarantine, for all workers and later runs of the plan: suspects
    are predicted one by one. The second process with the same fault therefore knows the image that causes it; it
    becomes an error row (`stage=predict`), and no process predicts it again.

    Example: images 100 to 107 are a batch, and image 105 breaks the CUDA context. The first process reports the
    suspects 100 to 107 and ends. The second one predicts 100, 101, … alone, fails at 105, records it and ends. The
    third one makes an error row of 105 and predicts the other seven.

    Args:
        predictor: Predictor with the execution config of the plan.
        quarantine: Images of the plan known to kill a process, and suspects.
        device: Name of the device from `identify_device`, for messages and for the count of device faults.
        step: Wraps each call of the model, so that one that hangs is noticed.
    """

    def __init__(
        self, predictor: Predictor, quarantine: Quarantine, device: str, step: StepMonitor = no_monitor
    ) -> None:
        self._predictor, self._quarantine = predictor, quarantine
        self._device, self._step = device, step
        self._lock = threading.Lock()
        # Positions of the batches that the model has, in the order of their calls.
        self._in_flight: deque[range] = deque()
        # Thread -> position and ETag of the image that it has alone in the model.
        self._single_images: dict[int, tuple[int, str | None]] = {}
        self._device_fault: DeviceFault | None = None

    def predict(self, batch: Batch, positions: Sequence[int]) -> Prediction | None:
        """Predict a batch; on a GPU the results may not be complete yet.

        Args:
            batch: Batch as loaded.
            positions: Positions in the plan of all its rows.

        Returns:
            The prediction; None if the batch holds no good image.

        Raises:
            Unavailable: The batch could not be loaded.
            DeviceFault: The device or its context is broken, now or since an earlier batch; this process must end.
            Exception: Any other error of the model.
        """
        if batch.attempt_error is not None:
            raise Unavailable(batch.attempt_error)
        if self._device_fault is not None:
            raise self._device_fault
        if batch.pixels is None:
            return None
        span = range(positions[0], positions[-1] + 1)
        if self._quarantine.has_suspect(span):
            return self._predict_one_by_one(batch, positions)
        with self._lock:
            self._in_flight.append(span)
        try:
            with self._step("a batch in the model", model=True):
                prediction = self._predictor(batch.pixels, batch.shapes)
        except Exception as error:
            if isinstance(error, BatchjobError) or self._is_device_error(error):
                raise self._convert_error(error, span) from error
            self._remove_in_flight(span)
            return self._predict_one_by_one(batch, positions)
        if prediction.pending:
            return prediction.on_ready(partial(self._wait_for_results, span))
        # The results are complete, and the caller may never wait for them.
        self._remove_in_flight(span)
        return prediction

    def as_device_fault(self, error: BatchjobError) -> BatchjobError:
        """Return a DeviceFault for an error from elsewhere (pinning memory, for example) that means a broken device.

        Any other error is returned unchanged.
        """
        return self._record_device_fault(error) if self._is_device_error(error) else error

    def explain_stall(self, step: StalledStep, seconds: float) -> WorkerStalled:
        """Describe a step that has stalled; if the model hangs, record the images that it has as suspects.

        Args:
            step: The step, in another thread.
            seconds: Time that a step may take.
        """
        limits = "runtime.stall_seconds" + (" and errors.outage_seconds" if step.storage else "")
        reason = f"{self._device}: {step.name} has not ended for {step.seconds:.0f} s ({limits})"
        culprit_known, suspects = False, tuple[range, ...]()
        if step.model:
            message = f"alone in the model, it has not ended for {seconds:g} s"
            # In a thread of its own, because the store may hang like the model.
            recording = DaemonThreadPool(1, "record-suspects").submit(
                partial(self._record_suspects, step.thread, "hang", message, reason)
            )
            with suppress(TimeoutError):
                culprit_known, suspects = recording.result(_RECORD_SECONDS)
        return WorkerStalled(f"{reason}; the same command resumes", self._device, suspects, culprit_known, step.storage)

    # -- whole batches -----------------------------------------------------------------------------------------

    def _wait_for_results(self, span: range, wait: Callable[[], None]) -> None:
        """Wait for a batch; a GPU computes in order, so all batches that were sent before are complete then too."""
        try:
            wait()
        except Exception as error:
            raise self._convert_error(error, span) from error
        with self._lock:
            while span in self._in_flight and self._in_flight.popleft() != span:
                continue

    def _remove_in_flight(self, span: range) -> None:
        with self._lock:
            if span in self._in_flight:
                self._in_flight.remove(span)

    def _is_device_error(self, error: BaseException) -> bool:
        return classify_device_error(error, self._predictor.forward.device) is not None

    def _convert_error(self, error: Exception, span: range) -> Exception:
        """Return the error to raise for a batch; images become suspects, all in flight if the device is broken."""
        if self._is_device_error(error):
            return self._record_device_fault(error)
        self._remove_in_flight(span)
        if not isinstance(error, BatchjobError):
            self._try_to_record(lambda: self._quarantine.record_suspects(span, _first_line(error)))
        return error

    def _record_device_fault(self, error: Exception) -> DeviceFault:
        """Record that the device, or this process's context of it, can no longer be used."""
        if self._device_fault is not None:
            return self._device_fault
        kind, reason = classify_device_error(error, self._predictor.forward.device), _first_line(error)
        culprit_known, suspects = False, tuple[range, ...]()
        # Broken hardware is no fault of the images.
        if kind == "context":
            message = f"alone on the device, it broke it: {reason}"
            culprit_known, suspects = self._record_suspects(get_ident(), "device", message, reason)
        message = f"{self._device} failed: {reason}; the same command resumes"
        self._device_fault = DeviceFault(message, self._device, suspects, culprit_known)
        return self._device_fault

    def _record_suspects(
        self, thread: int, error_type: str, message: str, reason: str
    ) -> tuple[bool, tuple[range, ...]]:
        """Record in the quarantine the image that a thread has alone in the model, else all images in flight.

        Args:
            thread: Identifier of the thread that failed or hangs.
            error_type: `type` of the error row of an image that is known to be the cause.
            message: Message of that error row.
            reason: Reason why images in flight become suspects.

        Returns:
            True and the position of the image, or False and the positions of all suspects.
        """
        if (image := self._single_images.get(thread)) is not None:
            position, etag = image
            info = ImageInfo(etag, error=ErrorRecord("predict", error_type, message))
            if self._try_to_record(lambda: self._quarantine.record(position, info)):
                return True, (range(position, position + 1),)
        with self._lock:
            spans = tuple(self._in_flight)
        for span in spans:
            self._try_to_record(partial(self._quarantine.record_suspects, span, reason))
        return False, spans

    # -- image by image ----------------------------------------------------------------------------------------

    def _predict_one_by_one(self, batch: Batch, positions: Sequence[int]) -> Prediction:
        """Predict each image in a call of its own; an error of the model becomes the error of that image.

        Raises:
            AttemptFailed: The model raises at each of several images.
        """
        pixels, good_rows = batch.pixels, [row for row, info in enumerate(batch.image_infos) if info.error is None]
        assert pixels is not None
        try:
            # Otherwise the fault of an earlier batch would be put down to one of these images.
            self._predictor.wait()
        except Exception as error:
            raise self._record_device_fault(error) from error
        outputs: list[PartialOutput] = []
        errors: dict[int, ErrorRecord] = {}
        for index, row in enumerate(good_rows):
            self._single_images[get_ident()] = positions[row], batch.image_infos[row].etag
            try:
                with self._step("an image alone in the model", model=True):
                    prediction = self._predictor.predict_single(pixels, batch.shapes, index)
                outputs += prediction.outputs
                errors |= prediction.errors
            except Exception as error:
                if self._is_device_error(error):
                    raise self._record_device_fault(error) from error
                if isinstance(error, BatchjobError):
                    raise
                errors[index] = ErrorRecord("predict", "error", describe_fault(error))
            finally:
                del self._single_images[get_ident()]
        if len(errors) > 1 and not outputs:
            raise AttemptFailed(f"the model fails at every image: {errors[0].message}")
        return Prediction(tuple(outputs), errors)

    def _try_to_record(self, record: Callable[[], object]) -> bool:
        """Write to the quarantine and return whether it worked; the fault itself matters more than an absent store."""
        try:
            record()
        except BatchjobError as error:
            _log.warning("suspect images could not be recorded: %s", error.message)
            return False
        return True


def _first_line(error: BaseException) -> str:
    """Return the type and the first line of an error; CUDA adds many lines of general advice to the first."""
    text = error.message if isinstance(error, BatchjobError) else str(error)
    return f"{type(error).__name__}: {(text.strip().splitlines() or ['no message'])[0][:300]}"
