"""Stop signals whose handlers a native library has replaced."""

from __future__ import annotations

import ctypes
import os
import signal

import pytest

from batchjob.driver.control_loop import StopSignals


def test_handler_replaced_below_python_is_installed_again() -> None:
    with StopSignals() as signals:
        before = signal.getsignal(signal.SIGTERM)
        ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(1))  # SIG_IGN, as a native library would set it
        assert signal.getsignal(signal.SIGTERM) == before, "Python does not notice"
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested.is_set()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_stop_signal_asks_the_run_to_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.requested.is_set()
        os.kill(os.getpid(), number)
        assert signals.requested.is_set()
    assert signal.getsignal(number) == before


def test_sighup_stays_ignored_where_the_program_was_started_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with StopSignals() as signals:
            signals.install()
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.requested.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
