"""Signals that ask to stop are heard, whoever has taken them meanwhile."""

from __future__ import annotations

import ctypes
import os
import signal

from batchjob.driver.control_loop import StopSignals


def test_a_handler_that_was_taken_away_below_python_comes_back() -> None:
    with StopSignals() as drain:
        before = signal.getsignal(signal.SIGTERM)
        ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(1))  # SIG_IGN, as a native library would set it
        assert signal.getsignal(signal.SIGTERM) == before, "Python does not know"
        drain.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert drain.requested.is_set()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
