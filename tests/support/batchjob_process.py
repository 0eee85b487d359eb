"""`python -m batchjob …` in a process of its own, as a scheduler starts it, and reads of the output it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchjob.output import commit
from batchjob.output.provenance import PartFooter
from batchjob.storage.store import Store, open_store

__all__ = [
    "ROOT",
    "SLOW_NET",
    "Command",
    "CompletedCommand",
    "cifar_arguments",
    "count_correct_labels",
    "delete_lease",
    "filter_alive",
    "find_actors",
    "find_descendants",
    "kill",
    "kill_on_exit",
    "list_plan_heads",
    "open_output",
    "read_all_footers",
    "read_command_line",
    "read_rows",
    "run_batchjob",
    "start_batchjob",
    "start_program",
    "wait_until",
    "write_slow_job",
]

ROOT = Path(__file__).parents[2]

# A model that sleeps: BATCHJOB_TEST_NAP seconds a batch.
SLOW_NET = """\
import os
import time

from torch import nn


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(float(os.environ.get("BATCHJOB_TEST_NAP", "0")))
        return x.mean(dim=(2, 3))


def make():
    return Slow()
"""

SLOW_JOB = """\
input: {type: manifest, uri: manifest.csv, uri_column: file}
model: {type: python, target: "slow:make"}
preprocess: {resize: null, crop: [8, 8], mean: null, std: null}
task: {type: embedding}
runtime: {pool: local, device: cpu, batch_size: 4, shard_size: 4, tuning: "off", loader: {processes: 0}}
output: {uri: out}
"""


@dataclass(frozen=True)
class CompletedCommand:
    """A command that has ended.

    Attributes:
        exit_code: Exit code; negative for the signal that killed it.
        stdout: Text on standard output.
        stderr: Text on standard error.
        seconds: Time from start to exit, in seconds.
    """

    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def json_result(self) -> dict[str, Any]:
        """JSON object on the last line of stdout."""
        found: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return found


@dataclass
class Command:
    """A running command."""

    process: subprocess.Popen[str]
    started_at: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def seconds(self) -> float:
        """Time since its start, in seconds."""
        return time.monotonic() - self.started_at

    def wait(self, timeout: float = 240) -> CompletedCommand:
        """Wait until it ends."""
        out, err = self.process.communicate(timeout=timeout)
        return CompletedCommand(self.process.returncode, out, err, self.seconds)


def start_batchjob(*arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Command:
    """Start `python -m batchjob …`."""
    return start_program([sys.executable, "-m", "batchjob", *arguments], cwd, env)


def start_program(command: Sequence[str], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Command:
    """Start a program that can import batchjob."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    return Command(process)


def run_batchjob(
    *arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 240
) -> CompletedCommand:
    """Run `python -m batchjob …` to its end."""
    with kill_on_exit(start_batchjob(*arguments, cwd=cwd, env=env)) as command:
        return command.wait(timeout)


@contextmanager
def kill_on_exit(command: Command) -> Iterator[Command]:
    """Kill the command on exit if it still runs."""
    try:
        yield command
    finally:
        if command.process.poll() is None:
            kill(command)


def kill(command: Command) -> set[tuple[int, int]]:
    """Send SIGKILL to the command alone, as the kernel does when memory is short; return its former children."""
    children = find_descendants(command.pid)
    command.process.send_signal(signal.SIGKILL)
    command.process.communicate()
    return children


def wait_until(condition: Callable[[], Any], *, command: Command | None = None, timeout: float = 120) -> Any:
    """Wait until the condition is true and return its value. Fails if the command ends before, or at the timeout."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if command is not None and command.process.poll() is not None:
            out, err = command.process.communicate()
            raise AssertionError(f"ended with {command.process.returncode} before its time:\n{out}\n{err}")
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.05)
    return found


def cifar_arguments(data: Path, output: str | Path, *more: str) -> list[str]:
    """Return arguments of `run` for the CIFAR job over real images: local pool, ten shards; `more` overrides."""
    return [
        "run",
        str(ROOT / "jobs/cifar10_resnet20/job.yaml"),
        f"input.uri={data}/cifar10/images/",
        f"model.weights={data}/cifar10/resnet20-12fca82f.th",
        f"output.uri={output}",
        "runtime.pool=local",
        "runtime.device=cpu",
        "runtime.shard_size=100",
        "--json",
        *more,
    ]


def write_slow_job(folder: Path, images: int) -> None:
    """Write a job whose model sleeps, over a manifest that names one tiny picture `images` times."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slow.py").write_text(SLOW_NET)
    (folder / "job.yaml").write_text(SLOW_JOB)
    (folder / "manifest.csv").write_text("file\n" + "tiny.png\n" * images)
    Image.new("RGB", (8, 8), (255, 0, 51)).save(folder / "tiny.png")


@lru_cache(maxsize=100)
def open_output(output: str) -> Store:
    """Open the store of an output. Cached: opening one takes a tenth of a second."""
    return open_store(output)


def read_rows(output: str | Path) -> pa.Table:
    """Read all committed rows, in the order of the parts' names."""
    store = open_output(str(output))
    return pa.concat_tables(
        pq.read_table(pa.BufferReader(store.read(key).data)) for key in sorted(commit.list_parts(store))
    )


def read_all_footers(output: str | Path) -> dict[str, PartFooter]:
    """Read the footer of each committed part, by name."""
    store = open_output(str(output))
    return dict(commit.read_footers(store, sorted(commit.list_parts(store))))


def list_plan_heads(output: str | Path) -> list[str]:
    """List the keys of the plan heads in an output."""
    store = open_output(str(output))
    return [stat.uri for stat in store.list("_batchjob/plans/") if stat.uri.endswith("head.json")]


def delete_lease(output: str | Path) -> None:
    """Delete the lease of a killed driver, so that a test need not wait until it expires."""
    store = open_output(str(output))
    for stat in list(store.list("_batchjob/lease/")):
        store.delete(stat.uri)


def count_correct_labels(rows: pa.Table) -> int:
    """Count CIFAR rows whose label is the name of the image's folder; check that each image is there once."""
    found = rows.select(["position", "uri", "label"]).to_pylist()
    assert sorted(row["position"] for row in found) == list(range(1000))
    assert len({row["uri"] for row in found}) == 1000
    return sum(row["label"] == row["uri"].split("/")[-2] for row in found)


# -- processes, by /proc ---------------------------------------------------------------------------------------


def find_descendants(pid: int) -> set[tuple[int, int]]:
    """Return the descendants of a process as (pid, start time): a pid alone can be used again."""
    children: dict[int, list[tuple[int, int]]] = {}
    for child, parent, born in _processes():
        children.setdefault(parent, []).append((child, born))
    found: set[tuple[int, int]] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += [child for child, _ in below]
    return found


def filter_alive(processes: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return the processes that still run; zombies do not."""
    return processes & {(pid, born) for pid, _, born in _processes()}


def find_actors(command: Command) -> set[tuple[int, int]]:
    """Return the Ray workers of a command."""
    return {(pid, born) for pid, born in find_descendants(command.pid) if "ray::RayWorker" in read_command_line(pid)}


def read_command_line(pid: int) -> str:
    """Return the command line or process title; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _processes() -> Iterator[tuple[int, int, int]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            yield int(folder.name), int(fields[1]), int(fields[19])
