"""Devices banned for the rest of a run, after two faults not caused by an image. Pure state, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from batchjob.types import overlaps

__all__ = ["DeviceBans"]

_MAX_FAULTS = 2


class DeviceBans:
    """Faults of devices, and the bans that follow.

    A fault that follows its images into a second process was caused by one of them. It is not the device's, and the
    first fault with these images is taken back.
    """

    def __init__(self) -> None:
        self._faults: dict[str, list[tuple[range, ...]]] = {}  # by device, the images of each fault

    @property
    def banned(self) -> set[str]:
        """Devices that must not be used."""
        return {device for device, faults in self._faults.items() if len(faults) >= _MAX_FAULTS}

    def record_fault(self, device: str, positions: Iterable[range] = ()) -> bool:
        """Record a fault of a device.

        Args:
            device: The device.
            positions: Positions in the plan of the images that were on the device.

        Returns:
            True if the device is banned now.
        """
        self._faults.setdefault(device, []).append(tuple(positions))
        return device in self.banned

    def clear_faults(self, positions: Iterable[range]) -> None:
        """Take back the faults of all devices that had one of these images, because the image was the cause."""
        culprits = tuple(positions)
        for device, faults in self._faults.items():
            self._faults[device] = [
                fault for fault in faults if not any(overlaps(*pair) for pair in product(fault, culprits))
            ]
