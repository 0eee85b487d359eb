"""Which devices are used no more in this run: those that failed twice, but for what images did to them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from batchjob.types import overlaps

__all__ = ["DeviceBans"]

_MOST = 2


@dataclass
class DeviceBans:
    """Faults of devices.

    A fault that follows images into a second process was theirs: it is no strike, and the first one is taken back.
    """

    _faults: dict[str, list[tuple[range, ...]]] = field(default_factory=dict)

    @property
    def banned(self) -> set[str]:
        """Devices that are not to be used."""
        return {device for device, faults in self._faults.items() if len(faults) >= _MOST}

    def record_fault(self, device: str, images: Iterable[range] = ()) -> bool:
        """A fault of that device, while these images were with it. True when it is banned now."""
        self._faults.setdefault(device, []).append(tuple(images))
        return device in self.banned

    def clear_faults(self, images: Iterable[range]) -> None:
        """One of these images did it, and has done it before: faults of any device with them were not the device's."""
        known = tuple(images)
        for device, faults in self._faults.items():
            self._faults[device] = [fault for fault in faults if not _any_meet(fault, known)]


def _any_meet(some: Iterable[range], others: Iterable[range]) -> bool:
    return any(overlaps(one, other) for one in some for other in others)
