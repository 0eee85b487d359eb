"""One run of one system: seconds, pace, memory, and the labels it gave."""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks import process_tree
from benchmarks.workload import Workload

__all__ = ["ROOT", "SYSTEMS", "SystemRun", "missing_requirement", "run_system", "steady_throughput"]

ROOT = Path(__file__).parents[1]
SYSTEMS = (
    "ray_documented",
    "ray_tuned",
    "daft_udf",
    "plain_loop",
    "batchjob_local",
    "batchjob_fast",
    "batchjob_ray",
)
_TIMEOUT = 3600.0


@dataclass(frozen=True)
class SystemRun:
    """What one run came to.

    Attributes:
        system: its name.
        seconds: the whole process, from its start to its exit.
        steady: images/s between 10 % and 90 % of the images; NaN where there were too few marks to tell.
        peak: bytes of memory (PSS) of all its processes together.
        labels: label by name of the image; empty where it failed.
        trouble: why it does not count, else empty.
    """

    system: str
    seconds: float
    steady: float
    peak: int
    labels: Mapping[str, int]
    trouble: str = ""


def missing_requirement(system: str) -> str:
    """Why a system cannot run here, or nothing."""
    if system == "daft_udf" and not (_daft().is_dir() or find_spec("daft")):
        return f"Daft is not installed ({_daft()} is not there: make {_daft().relative_to(ROOT)})"
    return ""


def run_system(system: str, given: Workload, work: Path) -> SystemRun:
    """Run a system once, in a process and with a temporary folder of its own.

    Args:
        system: a script of `systems/`.
        given: what it is to do; its output is made anew.
        work: where caches stay between runs: kernels that were compiled, decisions that were taken.
    """
    marks = work / "marks"
    marks.unlink(missing_ok=True)
    if "://" not in given.output:
        shutil.rmtree(given.output, ignore_errors=True)
    given = replace(given, marks=str(marks))
    scratch = tempfile.mkdtemp(prefix="b-", dir="/tmp")  # Ray's sockets want a short path
    try:
        command = [sys.executable, "-m", f"benchmarks.systems.{system}", *given.command_line]
        ended = process_tree.run_process(command, _environment(system, work, scratch), ROOT, _TIMEOUT)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    steady = steady_throughput(marks, given.limit)
    if ended.exit_code:
        return SystemRun(
            system,
            ended.seconds,
            math.nan,
            ended.peak_bytes,
            {},
            f"exit {ended.exit_code}: {ended.output_tail[-1500:]}",
        )
    labels, rows = _labels(given.output)
    wrong = "" if rows == len(labels) == given.limit else f"{rows} rows of {len(labels)} images, not {given.limit}"
    return SystemRun(system, ended.seconds, steady, ended.peak_bytes, labels, wrong)


def steady_throughput(marks: Path, images: int) -> float:
    """Images/s from the first mark at or after 10 % of the images to the last one at or before 90 %."""
    counted = 0
    inside: list[tuple[float, int]] = []
    lines = sorted((float(when), int(more)) for when, more in map(str.split, marks.read_text().splitlines()))
    for when, more in lines:
        counted += more
        if 0.1 * images <= counted <= 0.9 * images:
            inside.append((when, counted))
    if len(inside) < 4 or inside[-1][0] <= inside[0][0]:
        return math.nan
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def _environment(system: str, work: Path, scratch: str) -> dict[str, str]:
    path = [str(ROOT)] + ([str(_daft())] if system == "daft_udf" and _daft().is_dir() else [])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "RAY_TMPDIR": scratch,
        "RAY_ADDRESS": "",
        "RAY_USAGE_STATS_ENABLED": "0",
        "DO_NOT_TRACK": "true",
        "XDG_CACHE_HOME": str(work / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "cache" / "inductor"),
    }


def _daft() -> Path:
    """Where Daft lies with what it needs: it wants an older pyarrow than everything else here."""
    return Path(os.environ.get("BATCHJOB_BENCH_DAFT") or ROOT / ".venv" / "daft")


def _labels(output: str) -> tuple[dict[str, int], int]:
    """Label by file name, and rows."""
    import fsspec
    import pyarrow.parquet as pq

    filesystem, folder = fsspec.url_to_fs(output, skip_instance_cache=True)
    found: dict[str, int] = {}
    rows = 0
    for path in filesystem.find(folder):
        if path.endswith(".parquet"):
            with filesystem.open(path, "rb") as file:
                table = pq.read_table(file, columns=["uri", "label_id"])
            names = (uri.rpartition("/")[2] for uri in table["uri"].to_pylist())
            found.update(zip(names, table["label_id"].to_pylist(), strict=True))
            rows += table.num_rows
    return found, rows
