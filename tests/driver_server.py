"""Drivers without the seconds that they take to start: one process has imported everything, and forks for each of them.

What is forked is the command line itself, in a session, folder and environment of its own: to be killed, stopped and
asked to end like any other. Run as a program, this file is that one process.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]

if __name__ != "__main__":
    from batchjob_process import CompletedCommand, find_descendants

__all__ = ["DriverProcess", "DriverServer", "LoaderOrigin"]

LoaderOrigin = Literal["none", "own", "shared"]

_PR_SET_PDEATHSIG = 1
_SHORT_SECONDS = 3.0


class DriverServer:
    """Starts drivers. All that are left end with it.

    Args:
        folder: for what they say.
        full_clocks: leases are as long as ever, also where a test would have them short.
    """

    def __init__(self, folder: Path, full_clocks: bool = False) -> None:
        self._folder, self._full_clocks = folder, full_clocks
        self._born: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ends: dict[int, tuple[int, float]] = {}  # exit code and moment
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def start(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        short_lease: bool = False,
        loaders: LoaderOrigin = "none",
    ) -> DriverProcess:
        """`python -m batchjob …`, now.

        Args:
            arguments: of the command line.
            env: variables beside those of this process.
            short_lease: a killed driver's lease is free after seconds, so that many may be killed.
            loaders: where its loader processes come from: the job has `none`; a fork server of its `own`, as ever; or
                one that all drivers here have `shared`, and that has torch loaded by now.
        """
        log = Path(tempfile.mkdtemp(dir=self._folder))
        request = {
            "arguments": arguments,
            "env": {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            "log": str(log),
            "silence": _SHORT_SECONDS if short_lease and not self._full_clocks else None,
            "loaders": loaders,
        }
        with self._turn:
            assert self._process.stdin is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            pid = self._born.get(timeout=120)
        return DriverProcess(self, pid, log, time.monotonic())

    def wait_for_exit(self, pid: int, timeout: float = 0) -> tuple[int, float] | None:
        """Exit code of a driver, negative the signal that killed it, and when it ended; None while it lives."""
        with self._changed:
            self._changed.wait_for(lambda: pid in self._ends, timeout)
            return self._ends.get(pid)

    def close(self) -> None:
        """End it, and with it all drivers."""
        self._process.kill()
        self._process.communicate()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "code" not in told:
                with self._changed:
                    self._ends.pop(told["pid"], None)  # of an earlier one, for the system gives ids again
                self._born.put(told["pid"])
                continue
            with self._changed:
                self._ends[told["pid"]] = told["code"], time.monotonic()
                self._changed.notify_all()


@dataclass(frozen=True)
class DriverProcess:
    """A driver at work."""

    server: DriverServer
    pid: int
    log: Path
    started: float

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative the signal that killed it; None while it lives."""
        end = self.server.wait_for_exit(self.pid)
        return None if end is None else end[0]

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started

    @property
    def stderr(self) -> str:
        """What it wrote to stderr so far."""
        return (self.log / "err").read_text(errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal; it may have ended."""
        if self.exit_code is None:
            os.kill(self.pid, number)

    def kill(self) -> set[tuple[int, int]]:
        """SIGKILL to the driver alone, seen through; returns what it had started."""
        family = find_descendants(self.pid)
        self.send_signal(signal.SIGKILL)
        assert self.server.wait_for_exit(self.pid, 30) is not None
        return family

    def wait(self, timeout: float = 240) -> CompletedCommand:
        """Wait for its end."""
        end = self.server.wait_for_exit(self.pid, timeout)
        assert end is not None, f"still at work after {timeout} s:\n{self.stderr}"
        code, moment = end
        return CompletedCommand(code, (self.log / "out").read_text(), self.stderr, moment - self.started)

    def wait_until(self, condition: Callable[[], Any], timeout: float = 120) -> Any:
        """Wait until the condition holds, or the driver has ended; what the condition gave at last."""
        deadline = time.monotonic() + timeout
        while not (found := condition()) and self.exit_code is None:
            assert time.monotonic() < deadline, f"did not come about in {timeout} s:\n{self.stderr}"
            self.server.wait_for_exit(self.pid, 0.05)
        return found

    def run_for(self, seconds: float) -> bool:
        """Let it work for so long; whether it still does then."""
        return self.server.wait_for_exit(self.pid, seconds) is None


# -- the process that forks ------------------------------------------------------------------------------------


def _serve() -> None:
    """Read requests until stdin ends, fork for each, and tell who was born and who has ended."""
    _import_everything()
    gc.freeze()  # what the collector does not look at is not copied
    ear, bell = os.pipe()
    os.set_blocking(bell, False)
    signal.set_wakeup_fd(bell)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(ear, selectors.EVENT_READ)
        rest = b""
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if ear in ready:
                os.read(ear, 4096)
                _bury()
            if 0 in ready:
                if not (read := os.read(0, 1 << 16)):
                    return
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    request = json.loads(line)
                    if request["loaders"] == "shared":
                        _start_fork_server()
                    if (pid := os.fork()) == 0:
                        selector.close()
                        for unused in (ear, bell):
                            os.close(unused)
                        _drive(request)
                    _tell(pid=pid)


def _import_everything() -> None:
    import pyarrow.dataset
    import pyarrow.parquet  # noqa: F401
    import torch.utils.data  # noqa: F401
    import torchvision.transforms.functional

    import batchjob.api
    import batchjob.cli.main
    import batchjob.driver.progress
    import batchjob.pool.local_pool
    import batchjob.storage.obstore_backend  # noqa: F401

    assert torchvision.transforms.functional is not None


def _start_fork_server() -> None:
    from batchjob.concurrency import start_forkserver
    from batchjob.inference.autotune import trial_process
    from batchjob.loader.loader import Loader
    from batchjob.preprocessing.transforms import ImageTransform

    start_forkserver(Loader.__module__, ImageTransform.__module__, trial_process.__name__)


def _bury() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _tell(pid=pid, code=os.waitstatus_to_exitcode(status))


def _tell(**facts: int) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")


def _drive(request: dict[str, Any]) -> None:
    """Become the driver."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(ROOT)
    for number, name in enumerate([os.devnull, "out", "err"]):
        at = os.open(Path(request["log"], name), os.O_RDWR | os.O_CREAT)
        os.dup2(at, number)
        os.close(at)
    os.environ.clear()
    os.environ.update(request["env"])
    _set_clocks(request["silence"])

    from multiprocessing import forkserver

    from batchjob.cli import main
    from batchjob.worker import loader_forkserver

    server: Any = forkserver._forkserver
    if request["loaders"] == "shared":
        server.ensure_running = forkserver.ensure_running = lambda: None  # it is no child of ours, but it runs
    else:
        server.__init__()  # the shared one is forgotten
    if request["loaders"] != "own":
        loader_forkserver.__dict__["start_forkserver"] = lambda *modules: None
    sys.argv = ["batchjob", *request["arguments"]]
    code = main.main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking down all that was imported would copy it first, which takes a second


def _set_clocks(silence: float | None) -> None:
    from batchjob.driver.lease import Lease

    acquire: Any = Lease.acquire
    if silence is not None:
        acquire.__func__.__kwdefaults__["expiry_seconds"] = silence


if __name__ == "__main__":
    _serve()
