"""Stop signals whose handlers a native library has replaced."""

from __future__ import annotations

import ctypes
import os
import signal

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
