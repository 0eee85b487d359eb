"""Server that starts drivers at once: one process has imported everything, and forks for each driver.

A fork becomes the command line itself, in a session, folder and environment of its own, and can be killed, stopped and
signalled like any other. Run as a program, this file is the server's process.
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

ROOT = Path(__file__).parents[2]

if __name__ != "__main__":
    from tests.support.batchjob_process import CompletedCommand, find_descendants

__all__ = ["DriverProcess", "DriverServer", "LoaderOrigin"]

LoaderOrigin = Literal["none", "own", "shared"]

_PR_SET_PDEATHSIG = 1
_SHORT_SECONDS = 3.0


class DriverServer:
    """Starts drivers. Those still running end with it.

    Args:
        folder: Folder for their output.
        full_clocks: Leases last as long as in production, even if a test asks for short ones.
    """

    def __init__(self, folder: Path, full_clocks: bool = False) -> None:
        self._folder, self._full_clocks = folder, full_clocks
        self._started: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._exits: dict[int, tuple[int, float]] = {}  # by process id, exit code and monotonic time
        self._changed = threading.Condition()
        self._start_lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.driver_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
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
        """Start `python -m batchjob …`.

        Args:
            arguments: Arguments of the command line.
            env: Environment variables in addition to those of this process.
            short_lease: The lease of a killed driver expires after 3 seconds, so that a test can kill many.
            loaders: Origin of its loader processes: `none`, the job has none; `own`, a fork server of its own, as in
                production; `shared`, one fork server for all drivers here, which has imported torch.
        """
        log = Path(tempfile.mkdtemp(dir=self._folder))
        request = {
            "arguments": arguments,
            "env": {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            "log": str(log),
            "expiry_seconds": _SHORT_SECONDS if short_lease and not self._full_clocks else None,
            "loaders": loaders,
        }
        with self._start_lock:
            assert self._process.stdin is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            pid = self._started.get(timeout=120)
        return DriverProcess(self, pid, log, time.monotonic())

    def wait_for_exit(self, pid: int, timeout: float = 0) -> tuple[int, float] | None:
        """Return exit code (negative: the signal that killed it) and time of a driver's end; None if it still runs."""
        with self._changed:
            self._changed.wait_for(lambda: pid in self._exits, timeout)
            return self._exits.get(pid)

    def close(self) -> None:
        """End the server and all its drivers."""
        self._process.kill()
        self._process.communicate()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "code" not in message:
                with self._changed:
                    # The system may use the process id of an earlier driver again.
                    self._exits.pop(message["pid"], None)
                self._started.put(message["pid"])
                continue
            with self._changed:
                self._exits[message["pid"]] = message["code"], time.monotonic()
                self._changed.notify_all()


@dataclass(frozen=True)
class DriverProcess:
    """A driver that was started.

    Attributes:
        server: Server that has started it.
        pid: Process id.
        log: Folder of its output.
        started: Monotonic time of its start, in seconds.
    """

    server: DriverServer
    pid: int
    log: Path
    started: float

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative if a signal killed it; None if it still runs."""
        exit_ = self.server.wait_for_exit(self.pid)
        return None if exit_ is None else exit_[0]

    @property
    def seconds(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.started

    @property
    def stderr(self) -> str:
        """Its stderr so far."""
        return (self.log / "err").read_text(errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.exit_code is None:
            os.kill(self.pid, number)

    def kill(self) -> set[tuple[int, int]]:
        """Kill the driver alone and wait for its end; return the processes that it had started."""
        children = find_descendants(self.pid)
        self.send_signal(signal.SIGKILL)
        assert self.server.wait_for_exit(self.pid, 30) is not None
        return children

    def wait(self, timeout: float = 240) -> CompletedCommand:
        """Wait for its end; return what it did."""
        exit_ = self.server.wait_for_exit(self.pid, timeout)
        assert exit_ is not None, f"still running after {timeout} s:\n{self.stderr}"
        code, ended = exit_
        return CompletedCommand(code, (self.log / "out").read_text(), self.stderr, ended - self.started)

    def wait_until(self, condition: Callable[[], Any], timeout: float = 120) -> Any:
        """Wait until the condition holds or the driver has ended; return the last result of the condition."""
        deadline = time.monotonic() + timeout
        while not (result := condition()) and self.exit_code is None:
            assert time.monotonic() < deadline, f"the condition did not hold within {timeout} s:\n{self.stderr}"
            self.server.wait_for_exit(self.pid, 0.05)
        return result

    def run_for(self, seconds: float) -> bool:
        """Wait for so many seconds; return True if the driver still runs then."""
        return self.server.wait_for_exit(self.pid, seconds) is None


# -- the process that forks ------------------------------------------------------------------------------------


def _serve() -> None:
    """Read requests until stdin ends; fork for each; report starts and exits on stdout."""
    _import_everything()
    # Objects that the collector does not visit stay shared between the forks.
    gc.freeze()
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(wakeup_read, selectors.EVENT_READ)
        rest = b""
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if wakeup_read in ready:
                os.read(wakeup_read, 4096)
                _reap_children()
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
                        for unused in (wakeup_read, wakeup_write):
                            os.close(unused)
                        _become_driver(request)
                    _report(pid=pid)


def _import_everything() -> None:
    import pyarrow.dataset
    import pyarrow.parquet  # noqa: F401
    import torch.utils.data  # noqa: F401
    import torchvision.transforms.functional

    import batchjob.api
    import batchjob.cli.main
    import batchjob.driver.progress
    import batchjob.pool.local_pool
    import batchjob.storage.obstore_backend
    import batchjob.worker.worker  # noqa: F401

    assert torchvision.transforms.functional is not None


def _start_fork_server() -> None:
    from batchjob.concurrency import start_forkserver
    from batchjob.inference.autotune import trial_process
    from batchjob.loader.loader import Loader
    from batchjob.preprocessing.transforms import ImageTransform

    start_forkserver(Loader.__module__, ImageTransform.__module__, trial_process.__name__)


def _reap_children() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _report(pid=pid, code=os.waitstatus_to_exitcode(status))


def _report(**message: int) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _become_driver(request: dict[str, Any]) -> None:
    """Run the command line in this fork and exit."""
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
    _shorten_lease(request["expiry_seconds"])

    from multiprocessing import forkserver

    from batchjob.cli import main
    from batchjob.worker import loader_forkserver

    server: Any = forkserver._forkserver
    if request["loaders"] == "shared":
        server.ensure_running = forkserver.ensure_running = lambda: None  # it already runs, but is not our child
    else:
        server.__init__()  # forgets the shared fork server
    if request["loaders"] != "own":
        loader_forkserver.__dict__["start_forkserver"] = lambda *modules: None
    sys.argv = ["batchjob", *request["arguments"]]
    code = main.main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Tearing down all the imported modules would copy their memory first, which takes a second.
    os._exit(code)


def _shorten_lease(seconds: float | None) -> None:
    from batchjob.driver.lease import Lease

    acquire: Any = Lease.acquire
    if seconds is not None:
        acquire.__func__.__kwdefaults__["expiry_seconds"] = seconds


if __name__ == "__main__":
    _serve()
