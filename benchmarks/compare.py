"""`make bench`: batchjob and what people use today, over the same images, in turn: A B C, A B C, A B C.

    python -m benchmarks.compare                       # a few hundred images a case, 20 minutes on two cores
    python -m benchmarks.compare --size full           # 12,000 images, hours
    python -m benchmarks.compare --cases imagenet,s3 --images 1500 --rounds 3

Every run is a process of its own. A table a case goes to stdout; each run, as a line of JSON, to WORK/runs.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from benchmarks.batchjob_run import TUNING_VARIABLE
from benchmarks.delaying_proxy import delaying_proxy
from benchmarks.image_sets import make_images, make_weights, warm_page_cache
from benchmarks.machine_speed import MachineSpeedCheck
from benchmarks.result_table import format_table
from benchmarks.system_run import ROOT, SYSTEMS, SystemRun, missing_requirement, run_system
from benchmarks.workload import Workload

__all__ = ["CASES", "ComparisonCase", "main"]

_REFERENCE = "plain_loop"
_OWN = {"batchjob_local", "batchjob_ray", "batchjob_fast"}
_KEEP_CACHES = {"ray_tuned", *_OWN}
_FEW = ("ray_tuned", "plain_loop", "batchjob_local", "batchjob_fast")
_LATENCY = 0.05


@dataclass(frozen=True)
class ComparisonCase:
    """Which images through which model from where.

    Attributes:
        images: a set of `imagesets.py`.
        share: of the images of a whole run.
        model: a function of `architectures.py`.
        crop: see `Assignment`.
        systems: that take part.
        latency: seconds that each request to an S3 server takes longer; None reads from the disk.
        few: those that take part where time is short.
    """

    images: str = "imagenet"
    share: float = 1.0
    model: str = "mobilenet"
    crop: int = 224
    systems: Sequence[str] = SYSTEMS
    latency: float | None = None
    quick_systems: Sequence[str] = _FEW


_S3 = ComparisonCase(
    share=0.5, systems=("plain_loop", "batchjob_local"), quick_systems=("plain_loop", "batchjob_local"), latency=0.0
)
CASES = {
    "imagenet": ComparisonCase(quick_systems=SYSTEMS),
    "small": ComparisonCase(images="small", crop=0),
    "large": ComparisonCase(images="large", share=0.1),
    "decode-bound": ComparisonCase(model="few_layers"),
    "model-bound": ComparisonCase(model="resnet50", share=0.15),
    "s3": _S3,
    "s3-50ms": replace(_S3, latency=_LATENCY),
}


@dataclass(frozen=True)
class ComparisonSize:
    """Images of a whole case, rounds, and whether all systems run all cases."""

    images: int
    rounds: int
    all_systems: bool


SIZES = {"small": ComparisonSize(600, 2, all_systems=False), "full": ComparisonSize(12_000, 3, all_systems=True)}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no system outlives the comparison
    given = _arguments()
    size = SIZES[given.size]
    size = replace(size, images=given.images or size.images, rounds=given.rounds or size.rounds)
    given.work.mkdir(parents=True, exist_ok=True)
    trouble = False
    for name in given.cases:
        case = CASES[name]
        systems = given.systems or (case.systems if size.all_systems else case.quick_systems)
        missing = {system: why for system in systems if (why := missing_requirement(system))}
        for system, why in missing.items():
            _say(f"{name}: {system} is left out: {why}")
        wanted = [system for system in case.systems if system in systems and system not in missing]
        if wanted:
            trouble |= _run_case(name, replace(case, systems=wanted), size, given.work)
    sys.exit(trouble)


def _arguments() -> argparse.Namespace:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--size", choices=SIZES, default="small")
    asked.add_argument("--images", type=int, help="of a whole case, in place of the size's")
    asked.add_argument("--rounds", type=int, help="in place of the size's")
    asked.add_argument("--cases", type=_names(CASES), default=list(CASES), help=f"of {', '.join(CASES)}")
    asked.add_argument("--systems", type=_names(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    asked.add_argument("--work", type=Path, default=ROOT / "out" / "bench", help="images, weights, caches, outputs")
    found = asked.parse_args()
    found.work = found.work.resolve()
    return found


def _names(known: Sequence[str] | dict[str, ComparisonCase]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        asked = text.split(",")
        if odd := [name for name in asked if name not in known]:
            raise argparse.ArgumentTypeError(f"{odd[0]} is none of {', '.join(known)}")
        return asked

    return names


def _run_case(name: str, case: ComparisonCase, size: ComparisonSize, work: Path) -> bool:
    """Run and print a case; whether anything failed."""
    images = max(8, int(size.images * case.share))
    folder = make_images(work, case.images, images)
    weights = make_weights(work, case.model, folder, case.crop)
    warm_page_cache(folder)
    given = Workload(str(folder), str(work / "output"), images, 32, case.model, str(weights), case.crop, "")
    calibration = MachineSpeedCheck()
    with ExitStack() as stack:
        if case.latency is not None:
            given = stack.enter_context(_on_s3(given, folder, case.latency, work))
        cold = [_one(name, s, given, work, "cold") for s in case.systems if s in _KEEP_CACHES]
        for system in filter(_OWN.__contains__, case.systems):  # by size a job may be too short to learn anything
            with patch.dict(os.environ, {TUNING_VARIABLE: "1"}):
                _one(name, system, given, work, "learning")
        rounds = [[_one(name, s, given, work, f"round {n}") for s in case.systems] for n in range(1, size.rounds + 1)]
    title = (
        f"\n{name}: {images:,} images of {case.images}, {case.model}, batches of 32, {size.rounds} rounds; "
        f"{calibration.describe_drift()}"
    )
    reference = _REFERENCE if _REFERENCE in case.systems else case.systems[0]
    sys.stdout.write(format_table(title, rounds, cold, reference) + "\n")
    sys.stdout.flush()
    return any(run.trouble for each in rounds for run in each)


def _one(case: str, system: str, given: Workload, work: Path, when: str) -> SystemRun:
    """One run, told on stderr and written down."""
    given = replace(given, output=f"{given.output}/{case}/{system}/{when.replace(' ', '-')}")
    run = run_system(system, given, work)
    steady = None if math.isnan(run.steady) else run.steady
    facts = {
        "case": case,
        "when": when,
        "images": given.limit,
        **vars(run),
        "steady": steady,
        "labels": len(run.labels),
    }
    with (work / "runs.jsonl").open("a") as file:
        file.write(json.dumps(facts) + "\n")
    _say(f"{case}, {when}: {system} {run.trouble or f'{run.seconds:.1f} s, {_pace(steady)}'}")
    return run


@contextmanager
def _on_s3(given: Workload, folder: Path, seconds: float, work: Path) -> Iterator[Workload]:
    """The assignment on an S3 server of its own, at the end of a way that takes so much longer."""
    sys.path.insert(0, str(ROOT / "tests"))
    from seaweed import run_seaweed, s3_environment

    with tempfile.TemporaryDirectory(dir=work) as data, run_seaweed(Path(data)) as server:
        bucket = server.bucket("bench")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: server.put(f"{bucket}images/{path.name}", path), sorted(folder.iterdir())))
        with delaying_proxy(server.endpoint, seconds) as endpoint, patch.dict(os.environ, s3_environment(endpoint)):
            yield replace(given, images=f"{bucket}images/", output=f"{bucket}out")


def _pace(steady: float | None) -> str:
    return "too short for a pace" if steady is None else f"{steady:,.0f} images/s"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
