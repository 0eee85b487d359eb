"""A command and all processes it starts: memory is sampled, and all are killed at its end. Linux only (`/proc`)."""

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
_TAIL_BYTES = 4000

_Process = tuple[int, int]  # pid and start time: a pid alone may be used again


@dataclass(frozen=True)
class ProcessResult:
    """End of a command.

    Attributes:
        exit_code: Exit code; negative for the signal that killed it.
        started: Time of its start on the monotonic clock, in seconds.
        seconds: Seconds from start to exit.
        peak_bytes: Largest sum of the proportional memory (PSS) of all its processes, in bytes.
        output_tail: End of its output.
    """

    exit_code: int
    started: float
    seconds: float
    peak_bytes: int
    output_tail: str


def run_process(command: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float) -> ProcessResult:
    """Run a command to its end, or for `timeout` seconds, and kill every process that it leaves behind."""
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        sampler = _MemorySampler(process.pid)
        try:
            exit_code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            exit_code = process.wait()
        finally:
            seconds = time.monotonic() - started
            process.kill()
            sampler.stop()
        output.seek(max(0, output.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return ProcessResult(exit_code, started, seconds, sampler.peak_bytes, output.read().decode(errors="replace"))


class _MemorySampler:
    """Thread that samples the memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._root = pid
        self._seen: set[_Process] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling and kill the processes that are left."""
        self._stopped.set()
        self._thread.join()
        for pid, _ in self._seen & {(pid, started) for pid, _, started in _list_processes()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _run(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            family = self._find_family()
            self.peak_bytes = max(self.peak_bytes, sum(_read_pss(pid) for pid, _ in family))
            self._seen |= family

    def _find_family(self) -> set[_Process]:
        """Find the process, its descendants, and those seen before that have lost their parent."""
        running = _list_processes()
        children: dict[int, list[_Process]] = {}
        for pid, parent, started in running:
            children.setdefault(parent, []).append((pid, started))
        family = {(pid, started) for pid, _, started in running if pid == self._root or (pid, started) in self._seen}
        to_visit = [pid for pid, _ in family]
        while to_visit:
            new = set(children.get(to_visit.pop(), [])) - family
            family |= new
            to_visit += [pid for pid, _ in new]
        return family


def _list_processes() -> list[tuple[int, int, int]]:
    """List pid, parent and start time of all running processes, zombies left out."""
    processes = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            # proc_pid_stat(5): after the command in brackets come state, parent, …; the 20th field is the start time.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                processes.append((int(folder.name), int(fields[1]), int(fields[19])))
    return processes


def _read_pss(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
