"""What the end-to-end tests share: a job of real images, run as a user would, and a look at what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchjob.output import commit
from batchjob.output.provenance import PartFooter
from batchjob.storage.store import Store, open_store

__all__ = ["Ended", "cifar", "footers", "labels_right", "rows", "run", "start"]

ROOT = Path(__file__).parent.parent
JOB = ROOT / "jobs" / "cifar10_resnet20" / "job.yaml"


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    code: int
    said: str
    answer: dict[str, Any]


def cifar(data: Path, output: str, *more: str, images: str | None = None) -> list[str]:
    """Arguments of the CIFAR job in four shards, on the local pool unless `more` says otherwise."""
    return [
        str(JOB),
        f"input.uri={images or data / 'cifar10' / 'images'}/",
        f"model.weights={data / 'cifar10' / 'resnet20-12fca82f.th'}",
        f"output.uri={output}",
        "runtime.shard_size=250",
        "runtime.pool=local",
        *more,
    ]


def start(arguments: Sequence[str], command: str = "run", **environment: str) -> subprocess.Popen[str]:
    """`batchjob run …` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "batchjob", command, *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def run(arguments: Sequence[str], command: str = "run", timeout: float = 200, **environment: str) -> Ended:
    """The same, to its end."""
    return wait(start(arguments, command, **environment), timeout)


def wait(process: subprocess.Popen[str], timeout: float = 200) -> Ended:
    """The end of a started run."""
    out, said = process.communicate(timeout=timeout)
    lines = out.strip().splitlines()
    return Ended(process.returncode, said, json.loads(lines[-1]) if lines else {})


def footers(output: str) -> dict[str, PartFooter]:
    """Provenance of every committed part, by key."""
    store: Store = open_store(output)
    return dict(commit.read_footers(store, sorted(commit.list_parts(store))))


def rows(output: str) -> list[dict[str, Any]]:
    """All rows, in order of their parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = open_store(output)
    parts = [pq.read_table(pa.BufferReader(store.read(key).data)) for key in sorted(commit.list_parts(store))]
    return [row for part in parts for row in part.to_pylist()]


def labels_right(found: list[dict[str, Any]]) -> int:
    """Rows whose label is the folder their image lies in; asserts that each image has exactly one row."""
    assert sorted(row["position"] for row in found) == list(range(1000))
    assert len({row["uri"] for row in found}) == 1000
    return sum(row["label"] == row["uri"].split("/")[-2] for row in found)
