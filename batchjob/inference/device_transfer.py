"""Copies between host and device; on CUDA they run beside the computation."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["DeviceTransfer"]


class DeviceTransfer:
    """Copies to a device and back.

    On CUDA, copies to the device have a stream of their own, so that they run while the previous batch is computed.
    Results are small; their copies to the host run in the stream of the computation, in order.

    Example:
        transfer = DeviceTransfer(torch.device("cuda"))
        inputs = transfer.to_device(pinned)       # returns at once; the computation waits for it on the device
        outputs = transfer.to_host(model(inputs)) # returns at once; the memory is not filled yet
        wait = transfer.sync()                    # marks this point in the stream
        wait()                                    # blocks until all copies before the mark are complete

    Args:
        device: Device at the other end of the copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def to_device(self, pixels: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the device; on CUDA the current stream waits for the copy, the host does not."""
        if self._device.type != "cuda":
            return pixels.to(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copied = pixels.to(self._device, non_blocking=True)
        current.wait_stream(self._stream)
        copied.record_stream(current)
        return copied

    def to_host(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy tensors to the host, half precision as float32; on CUDA they are filled once `sync()` has returned.

        Arrow and NumPy support bfloat16 and float16 only in part.
        """
        half = {torch.bfloat16, torch.float16}
        full = {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in tensors.items()}
        if self._device.type != "cuda":
            return {name: tensor.cpu() for name, tensor in full.items()}
        pinned = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in full.items()}
        return {name: pinned[name].copy_(tensor, non_blocking=True) for name, tensor in full.items()}

    def sync(self) -> Callable[[], None] | None:
        """Return a function that waits for all copies to the host so far; None if they are complete already."""
        if self._device.type != "cuda":
            return None
        # A blocking event lets the waiting thread sleep; a spinning one would hold a core that decoding needs.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize
