"""Batches through the forward pass: copies there and back beside the computation; out of memory: halve."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceTransfer"]


class DeviceTransfer:
    """Copies to the device and back. On CUDA those there have a stream of their own, beside the computation; what goes
    back is small, and goes in turn with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def to_device(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        if self._device.type != "cuda":
            return pixels.to(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = pixels.to(self._device, non_blocking=True)
        current.wait_stream(self._stream)
        moved.record_stream(current)
        return moved

    def to_host(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """To the host; on CUDA they have arrived once `arrival()` says so."""
        import torch

        half = {torch.bfloat16, torch.float16}  # which Arrow and NumPy know only in part
        full = {name: made.float() if made.dtype in half else made for name, made in tensors.items()}
        if self._device.type != "cuda":
            return {name: made.cpu() for name, made in full.items()}
        landed = {name: torch.empty(made.shape, dtype=made.dtype, pin_memory=True) for name, made in full.items()}
        return {name: landed[name].copy_(made, non_blocking=True) for name, made in full.items()}

    def sync(self) -> Callable[[], None] | None:
        """A wait for all that was sent back so far; None where copies are through when they return."""
        import torch

        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)  # who waits sleeps; else it would hold a core that decoding needs
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize
