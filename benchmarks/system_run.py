"""One run of one system: seconds, throughput, memory, and the labels that it gave."""

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
_MIN_POINTS = 4  # lines of the progress file without which a throughput means nothing


@dataclass(frozen=True)
class SystemRun:
    """Measurements of one run.

    Attributes:
        system: Name of the system.
        seconds: Seconds of the whole process, from its start to its exit.
        steady: Images/s between 10 % and 90 % of the images; NaN where the progress file has too few lines.
        peak: Largest memory (PSS) of all its processes together, in bytes.
        labels: Label by name of the image; empty if the run failed.
        trouble: Reason why the run does not count; empty if it does.
    """

    system: str
    seconds: float
    steady: float
    peak: int
    labels: Mapping[str, int]
    trouble: str = ""


def missing_requirement(system: str) -> str:
    """Explain why a system cannot run here; empty if it can."""
    if system == "daft_udf" and not (_daft_folder().is_dir() or find_spec("daft")):
        return f"Daft is not installed ({_daft_folder()} is not there: make {_daft_folder().relative_to(ROOT)})"
    return ""


def run_system(system: str, workload: Workload, work: Path) -> SystemRun:
    """Run a system once, in a process and with a temporary folder of its own.

    Args:
        system: Script of `systems/`.
        workload: Work to do; its output folder is emptied first.
        work: Folder of caches that stay between runs: compiled kernels, results of tuning.
    """
    progress_file = work / "marks"
    progress_file.unlink(missing_ok=True)
    if "://" not in workload.output:
        shutil.rmtree(workload.output, ignore_errors=True)
    workload = replace(workload, marks=str(progress_file))
    scratch = tempfile.mkdtemp(prefix="b-", dir="/tmp")  # Ray's sockets need a short path
    try:
        command = [sys.executable, "-m", f"benchmarks.systems.{system}", *workload.command_line]
        result = process_tree.run_process(command, _make_environment(system, work, scratch), ROOT, _TIMEOUT)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    steady = steady_throughput(progress_file, workload.limit)
    if result.exit_code:
        trouble = f"exit {result.exit_code}: {result.output_tail[-1500:]}"
        return SystemRun(system, result.seconds, math.nan, result.peak_bytes, {}, trouble)
    labels, rows = _read_labels(workload.output)
    images = workload.limit
    trouble = "" if rows == len(labels) == images else f"{rows} rows of {len(labels)} images, not {images}"
    return SystemRun(system, result.seconds, steady, result.peak_bytes, labels, trouble)


def steady_throughput(progress_file: Path, images: int) -> float:
    """Compute images/s between 10 % and 90 % of the images; NaN where there are too few points.

    Example: 100 images whose progress file has a line of 10 images every 0.5 s count from image 10 to image 90: 80
    images in 4 s, 20 images/s.
    """
    done = 0
    points: list[tuple[float, int]] = []
    lines = [line.split() for line in progress_file.read_text().splitlines()]
    for seconds, more in sorted((float(seconds), int(more)) for seconds, more in lines):
        done += more
        if 0.1 * images <= done <= 0.9 * images:
            points.append((seconds, done))
    if len(points) < _MIN_POINTS or points[-1][0] <= points[0][0]:
        return math.nan
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])


def _make_environment(system: str, work: Path, scratch: str) -> dict[str, str]:
    path = [str(ROOT)] + ([str(_daft_folder())] if system == "daft_udf" and _daft_folder().is_dir() else [])
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


def _daft_folder() -> Path:
    """Return the folder of Daft and its dependencies: it needs an older pyarrow than everything else here."""
    return Path(os.environ.get("BATCHJOB_BENCH_DAFT") or ROOT / ".venv" / "daft")


def _read_labels(output: str) -> tuple[dict[str, int], int]:
    """Read the label of each file name, and the number of rows."""
    import fsspec
    import pyarrow.parquet as pq

    filesystem, folder = fsspec.url_to_fs(output, skip_instance_cache=True)
    labels: dict[str, int] = {}
    rows = 0
    for path in filesystem.find(folder):
        if path.endswith(".parquet"):
            with filesystem.open(path, "rb") as file:
                table = pq.read_table(file, columns=["uri", "label_id"])
            names = (uri.rpartition("/")[2] for uri in table["uri"].to_pylist())
            labels.update(zip(names, table["label_id"].to_pylist(), strict=True))
            rows += table.num_rows
    return labels, rows
