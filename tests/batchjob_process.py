"""`python -m batchjob …` as a scheduler starts it, in a process of its own, and a look at what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
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
    "ray_environment",
    "read_all_footers",
    "read_command_line",
    "read_rows",
    "run_batchjob",
    "start_batchjob",
    "start_program",
    "wait_until",
    "write_slow_job",
]

ROOT = Path(__file__).parents[1]

# A model that takes its time: as many seconds a batch as BATCHJOB_TEST_NAP says.
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
        code: exit code; negative the signal that killed it.
        out, err: what it said.
        seconds: from start to exit, of which `run` knows.
    """

    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def json_result(self) -> dict[str, Any]:
        """The object on the last line of stdout."""
        found: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return found


@dataclass
class Command:
    """A command at work."""

    process: subprocess.Popen[str]
    started_at: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started_at

    def wait(self, timeout: float = 240) -> CompletedCommand:
        """Wait for its end."""
        out, err = self.process.communicate(timeout=timeout)
        return CompletedCommand(self.process.returncode, out, err, self.seconds)


def start_batchjob(*arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Command:
    """Start `python -m batchjob …`."""
    return start_program([sys.executable, "-m", "batchjob", *arguments], cwd, env)


def start_program(command: Sequence[str], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Command:
    """Start any program, which finds batchjob."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=whole,
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
    """The same, to its end."""
    with kill_on_exit(start_batchjob(*arguments, cwd=cwd, env=env)) as command:
        return command.wait(timeout)


@contextmanager
def kill_on_exit(command: Command) -> Iterator[Command]:
    """See to it that the command is gone afterwards, come what may."""
    try:
        yield command
    finally:
        if command.process.poll() is None:
            kill(command)


def kill(command: Command) -> set[tuple[int, int]]:
    """SIGKILL to the command alone, as the kernel does when memory is short; returns what it had started."""
    family = find_descendants(command.pid)
    command.process.send_signal(signal.SIGKILL)
    command.process.communicate()
    return family


def wait_until(condition: Callable[[], Any], *, command: Command | None = None, timeout: float = 120) -> Any:
    """Wait until the condition holds and return its value; fails when the command ends before."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if command is not None and command.process.poll() is not None:
            out, err = command.process.communicate()
            raise AssertionError(f"ended with {command.process.returncode} before its time:\n{out}\n{err}")
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.05)
    return found


@contextmanager
def ray_environment() -> Iterator[dict[str, str]]:
    """Environment in which a driver starts a Ray of its own; its sockets want a folder with a short path."""
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    try:
        yield {"RAY_TMPDIR": folder, "RAY_ADDRESS": ""}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cifar_arguments(data: Path, output: str | Path, *more: str) -> list[str]:
    """`run` with the CIFAR job over the real images on the local pool, in ten shards unless `more` says otherwise."""
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
    """A job beside its model that sleeps, over a manifest that names one tiny picture so many times."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slow.py").write_text(SLOW_NET)
    (folder / "job.yaml").write_text(SLOW_JOB)
    (folder / "manifest.csv").write_text("file\n" + "tiny.png\n" * images)
    Image.new("RGB", (8, 8), (255, 0, 51)).save(folder / "tiny.png")


@lru_cache(maxsize=100)
def open_output(output: str) -> Store:
    """The store of an output; making one takes a tenth of a second."""
    return open_store(output)


def read_rows(output: str | Path) -> pa.Table:
    """All committed rows, in the order of the parts' names."""
    store = open_output(str(output))
    return pa.concat_tables(
        pq.read_table(pa.BufferReader(store.read(key).data)) for key in sorted(commit.list_parts(store))
    )


def read_all_footers(output: str | Path) -> dict[str, PartFooter]:
    """Provenance of each committed part, by name."""
    store = open_output(str(output))
    return dict(commit.read_footers(store, sorted(commit.list_parts(store))))


def list_plan_heads(output: str | Path) -> list[str]:
    """Keys of the plan heads that were frozen there."""
    store = open_output(str(output))
    return [stat.uri for stat in store.list("_batchjob/plans/") if stat.uri.endswith("head.json")]


def delete_lease(output: str | Path) -> None:
    """Remove what a killed driver held, so that a test need not wait until its silence counts."""
    store = open_output(str(output))
    for stat in list(store.list("_batchjob/lease/")):
        store.delete(stat.uri)


def count_correct_labels(rows: pa.Table) -> int:
    """How many CIFAR rows name the class of the folder that the image lies in; each image is there once."""
    found = rows.select(["position", "uri", "label"]).to_pylist()
    assert sorted(row["position"] for row in found) == list(range(1000))
    assert len({row["uri"] for row in found}) == 1000
    return sum(row["label"] == row["uri"].split("/")[-2] for row in found)


# -- processes, by /proc ---------------------------------------------------------------------------------------


def find_descendants(pid: int) -> set[tuple[int, int]]:
    """Processes below this one, as (pid, start time): a pid alone may come again."""
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
    """Those of them that still run (a zombie does not)."""
    return processes & {(pid, born) for pid, _, born in _processes()}


def find_actors(command: Command) -> set[tuple[int, int]]:
    """The command's Ray workers."""
    return {(pid, born) for pid, born in find_descendants(command.pid) if "ray::RayWorker" in read_command_line(pid)}


def read_command_line(pid: int) -> str:
    """Its command line, or what it calls itself; nothing where it has ended."""
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
