"""A process and all it starts: watched for memory while it runs, and gone when it ends. By `/proc`, so Linux only."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProcessResult", "run_process"]

_SAMPLE_SECONDS = 1.0
_Process = tuple[int, int]  # pid and start time: a pid alone may come again


@dataclass(frozen=True)
class ProcessResult:
    """A command that has ended.

    Attributes:
        code: exit code; negative the signal that killed it.
        began: seconds of the monotonic clock.
        seconds: from start to exit.
        peak: bytes of proportional memory (PSS) of all its processes together, at most.
        tail: the end of what it said.
    """

    exit_code: int
    started: float
    seconds: float
    peak_bytes: int
    output_tail: str


def run_process(command: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float) -> ProcessResult:
    """Run a command to its end; whatever it leaves behind is killed."""
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        watch = _MemorySampler(process.pid)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        finally:
            seconds = time.monotonic() - began
            process.kill()
            watch.end()
        said.seek(max(0, said.seek(0, os.SEEK_END) - 4000))
        return ProcessResult(code, began, seconds, watch.peak, said.read().decode(errors="replace"))


class _MemorySampler:
    """Samples the memory of a process and its descendants from a thread."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._root = pid
        self._seen: set[_Process] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop sampling; kill what is left."""
        self._over.set()
        self._thread.join()
        for pid, _ in self._seen & {(pid, born) for pid, _, born in _processes()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            family = self._family()
            self.peak = max(self.peak, sum(_pss(pid) for pid, _ in family))
            self._seen |= family

    def _family(self) -> set[_Process]:
        """The process, its descendants, and those seen before that lost their parent."""
        running = _processes()
        children: dict[int, list[_Process]] = {}
        for pid, parent, born in running:
            children.setdefault(parent, []).append((pid, born))
        found = {(pid, born) for pid, _, born in running if pid == self._root or (pid, born) in self._seen}
        waiting = [pid for pid, _ in found]
        while waiting:
            below = set(children.get(waiting.pop(), [])) - found
            found |= below
            waiting += [pid for pid, _ in below]
        return found


def _processes() -> list[tuple[int, int, int]]:
    """Pid, parent and start time of all that run (a zombie does not)."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found.append((int(folder.name), int(fields[1]), int(fields[19])))
    return found


def _pss(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
