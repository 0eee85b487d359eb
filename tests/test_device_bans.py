"""Which devices are used no more: two faults of their own, and none for what an image did."""

from __future__ import annotations

from batchjob.pool.device_bans import DeviceBans


def test_a_device_is_banned_with_its_second_fault() -> None:
    strikes = DeviceBans()
    assert not strikes.record_fault("a", [range(8)])
    assert not strikes.record_fault("b")
    assert strikes.record_fault("a", [range(80, 88)])
    assert strikes.banned == {"a"}


def test_a_fault_that_follows_its_images_is_no_strike() -> None:
    strikes = DeviceBans()
    strikes.record_fault("a", [range(8), range(8, 16)])
    strikes.clear_faults([range(9, 10)])
    assert not strikes.record_fault("a", [range(80, 88)])
    strikes.clear_faults([range(9, 10)])
    assert strikes.record_fault("a"), "that other one stands"


def test_a_ban_is_lifted_where_images_were_to_blame() -> None:
    strikes = DeviceBans()
    strikes.record_fault("a", [range(8)])
    strikes.record_fault("a", [range(16, 24)])
    assert strikes.banned == {"a"}
    strikes.clear_faults([range(17, 18)])
    assert not strikes.banned
