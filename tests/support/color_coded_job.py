"""Job over pictures that encode their number in their colour, and the check that each has its right row, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from batchjob.output import commit, success
from batchjob.output.listed_parts import find_part_mismatches
from tests.support.batchjob_process import SLOW_NET, list_plan_heads, open_output, read_all_footers, read_rows
from tests.support.seaweed import Seaweed

__all__ = [
    "JOB",
    "OutputCheck",
    "check_output",
    "format_overrides",
    "format_range",
    "list_committed_parts",
    "run_parallel",
    "upload_job",
    "write_job",
]

T = TypeVar("T")
R = TypeVar("R")

# Local, tiny and in one process; tests override what they need.
JOB = """\
input: {type: manifest, uri: manifest.csv, uri_column: file}
model: {type: python, target: "slow:make"}
preprocess: {resize: null, crop: [8, 8], mean: null, std: null}
task: {type: embedding}
runtime: {pool: local, device: cpu, batch_size: 5, shard_size: 20, tuning: "off", loader: {processes: 0}}
output: {uri: out}
"""


def write_job(folder: Path, images: int) -> str:
    """Write `job.yaml`, its model, a manifest and the pictures; return the path of the job file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "slow.py").write_text(SLOW_NET)
    (folder / "job.yaml").write_text(JOB)
    names = [f"images/{number:06d}.png" for number in range(images)]
    (folder / "manifest.csv").write_text("\n".join(["file", *names, ""]))
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), _colour(number)).save(folder / name)
    return str(folder / "job.yaml")


def upload_job(folder: Path, images: int, server: Seaweed) -> str:
    """Write the job with manifest and pictures on SeaweedFS; only the job file and its model stay local."""
    path, bucket = Path(write_job(folder, images)), server.bucket()
    server.put_tree(folder, bucket)
    path.write_text(JOB.replace("uri: manifest.csv", f"uri: {bucket}manifest.csv"))
    return str(path)


def format_overrides(**settings: object) -> list[str]:
    """Format settings for the command line: `runtime__batch_size=5` becomes `runtime.batch_size=5`."""
    return [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]


@dataclass(frozen=True)
class OutputCheck:
    """Differences between an output and the expected one.

    Attributes:
        missing: Images without a row.
        duplicates: Rows beyond the first of an image.
        wrong: Rows that are not the model's output for their image.
        foreign_files: Parts that differ from the list in `_SUCCESS`.
        plans: Plans that were frozen there.
    """

    missing: int
    duplicates: int
    wrong: int
    foreign_files: int
    plans: int

    @property
    def is_correct(self) -> bool:
        return self == OutputCheck(0, 0, 0, 0, 1)


def check_output(output: str, images: int) -> OutputCheck:
    """Compare every row and file of a finished output with the expected ones."""
    rows: list[dict[str, Any]] = read_rows(output).to_pylist()
    seen = Counter(row["position"] for row in rows)
    store = open_output(output)
    found = success.read_success(store)
    assert found is not None, f"{output} has no _SUCCESS"
    return OutputCheck(
        missing=len(set(range(images)) - seen.keys()),
        duplicates=seen.total() - len(seen),
        wrong=sum(not _is_right(row) for row in rows),
        foreign_files=len(find_part_mismatches(store, found[0], commit.list_parts(store))),
        plans=len(list_plan_heads(output)),
    )


def list_committed_parts(output: str) -> dict[str, tuple[str, str | None]]:
    """List attempt and ETag of each committed part, by name."""
    tags = {stat.uri: stat.etag for stat in open_output(output).list("predictions/")}
    return {key: (made.attempt, tags[key]) for key, made in read_all_footers(output).items() if key in tags}


def run_parallel(work: Callable[[T], R], items: Iterable[T], at_once: int) -> list[R]:
    """Run calls in threads, `at_once` at a time; they mostly wait. An error is raised once all have ended."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(work, items))


def format_range(values: Iterable[float]) -> str:
    """Format the range of some values: `1.5–3.2`."""
    found = sorted(values)
    return f"{found[0]:.1f}–{found[-1]:.1f}" if found else "none"


def _colour(number: int) -> tuple[int, int, int]:
    return number % 256, number // 256, 51


def _is_right(row: dict[str, Any]) -> bool:
    number = row["position"]
    if row["error_stage"] is not None or not row["uri"].endswith(f"images/{number:06d}.png"):
        return False
    pairs = zip(row["embedding"], _colour(number), strict=True)
    return all(abs(value - shade / 255) < 1e-3 for value, shade in pairs)
