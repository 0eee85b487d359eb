"""Device bans: after two faults of its own, and none for a fault that an image caused."""

from __future__ import annotations

from batchjob.pool.device_bans import DeviceBans


def test_second_fault_bans_a_device() -> None:
    bans = DeviceBans()
    assert not bans.record_fault("a", [range(8)])
    assert not bans.record_fault("b")
    assert bans.record_fault("a", [range(80, 88)])
    assert bans.banned == {"a"}


def test_fault_caused_by_an_image_does_not_count() -> None:
    bans = DeviceBans()
    bans.record_fault("a", [range(8), range(8, 16)])
    bans.clear_faults([range(9, 10)])
    assert not bans.record_fault("a", [range(80, 88)])
    bans.clear_faults([range(9, 10)])
    assert bans.record_fault("a"), "the fault with other images still counts"


def test_ban_is_lifted_if_an_image_was_the_cause() -> None:
    bans = DeviceBans()
    bans.record_fault("a", [range(8)])
    bans.record_fault("a", [range(16, 24)])
    assert bans.banned == {"a"}
    bans.clear_faults([range(17, 18)])
    assert not bans.banned
