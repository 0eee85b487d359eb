"""Comparison of batchjob with what people use today (`make bench`), over the same images, in turn: A B C, A B C.

    python -m benchmarks.compare                       # a few hundred images a case, 20 minutes on two cores
    python -m benchmarks.compare --size full           # 12,000 images, hours
    python -m benchmarks.compare --cases imagenet,s3 --images 1500 --rounds 3

Every run is a process of its own. A table for each case goes to stdout, and each run as a line of JSON to
WORK/runs.jsonl.
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
_BATCHJOB = {"batchjob_local", "batchjob_ray", "batchjob_fast"}
_KEEP_CACHES = {"ray_tuned", *_BATCHJOB}
_QUICK_SYSTEMS = ("ray_tuned", "plain_loop", "batchjob_local", "batchjob_fast")
_LATENCY = 0.05


@dataclass(frozen=True)
class ComparisonCase:
    """Images, model and storage that the systems are compared on.

    Attributes:
        images: Set of `image_sets.py`.
        share: Part of the images of a whole comparison, 0 to 1.
        model: Function of `architectures.py`.
        crop: Side of the square that the model sees, see `Workload`.
        systems: Systems that take part.
        latency: Seconds that each request to an S3 server takes longer; None reads from the disk.
        quick_systems: Systems that take part where time is short.
    """

    images: str = "imagenet"
    share: float = 1.0
    model: str = "mobilenet"
    crop: int = 224
    systems: Sequence[str] = SYSTEMS
    latency: float | None = None
    quick_systems: Sequence[str] = _QUICK_SYSTEMS


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
    """Length of a comparison.

    Attributes:
        images: Images of a case with a share of 1.
        rounds: Runs of each system in each case.
        all_systems: Run all systems in all cases; else the quick ones.
    """

    images: int
    rounds: int
    all_systems: bool


SIZES = {"small": ComparisonSize(600, 2, all_systems=False), "full": ComparisonSize(12_000, 3, all_systems=True)}


def main() -> None:
    """Run the cases of the command line; exit code 1 if any run failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no system outlives the comparison
    options = _parse_arguments()
    size = SIZES[options.size]
    size = replace(size, images=options.images or size.images, rounds=options.rounds or size.rounds)
    options.work.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in options.cases:
        case = CASES[name]
        requested = options.systems or (case.systems if size.all_systems else case.quick_systems)
        missing = {system: reason for system in requested if (reason := missing_requirement(system))}
        for system, reason in missing.items():
            _print_status(f"{name}: {system} is left out: {reason}")
        systems = [system for system in case.systems if system in requested and system not in missing]
        if systems:
            failed |= _run_case(name, replace(case, systems=systems), size, options.work)
    sys.exit(failed)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--images", type=int, help="of a whole case, in place of the size's")
    parser.add_argument("--rounds", type=int, help="in place of the size's")
    parser.add_argument("--cases", type=_make_list_parser(CASES), default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--systems", type=_make_list_parser(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench", help="images, weights, caches, outputs")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def _make_list_parser(known: Sequence[str] | dict[str, ComparisonCase]) -> Callable[[str], list[str]]:
    """Make a parser of comma-separated names that refuses unknown ones."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return names

    return parse


def _run_case(name: str, case: ComparisonCase, size: ComparisonSize, work: Path) -> bool:
    """Run and print a case; return True if a run failed."""
    images = max(8, int(size.images * case.share))
    folder = make_images(work, case.images, images)
    weights = make_weights(work, case.model, folder, case.crop)
    warm_page_cache(folder)
    workload = Workload(str(folder), str(work / "output"), images, 32, case.model, str(weights), case.crop, "")
    speed_check = MachineSpeedCheck()
    with ExitStack() as stack:
        if case.latency is not None:
            workload = stack.enter_context(_serve_from_s3(workload, folder, case.latency, work))
        cold = [_run_once(name, s, workload, work, "cold") for s in case.systems if s in _KEEP_CACHES]
        # By their size, these jobs may be too short for tuning. So it is forced once, and the result is remembered.
        for system in filter(_BATCHJOB.__contains__, case.systems):
            with patch.dict(os.environ, {TUNING_VARIABLE: "1"}):
                _run_once(name, system, workload, work, "learning")
        rounds = [
            [_run_once(name, system, workload, work, f"round {number}") for system in case.systems]
            for number in range(1, size.rounds + 1)
        ]
    title = (
        f"\n{name}: {images:,} images of {case.images}, {case.model}, batches of 32, {size.rounds} rounds; "
        f"{speed_check.describe_drift()}"
    )
    reference = _REFERENCE if _REFERENCE in case.systems else case.systems[0]
    sys.stdout.write(format_table(title, rounds, cold, reference) + "\n")
    sys.stdout.flush()
    return any(run.trouble for one_round in rounds for run in one_round)


def _run_once(case: str, system: str, workload: Workload, work: Path, when: str) -> SystemRun:
    """Run a system, report it on stderr, and append its measurements to `runs.jsonl`."""
    workload = replace(workload, output=f"{workload.output}/{case}/{system}/{when.replace(' ', '-')}")
    run = run_system(system, workload, work)
    steady = None if math.isnan(run.steady) else run.steady
    measurements = {
        "case": case,
        "when": when,
        "images": workload.limit,
        **vars(run),
        "steady": steady,
        "labels": len(run.labels),
    }
    with (work / "runs.jsonl").open("a") as file:
        file.write(json.dumps(measurements) + "\n")
    pace = "too short for a pace" if steady is None else f"{steady:,.0f} images/s"
    _print_status(f"{case}, {when}: {system} {run.trouble or f'{run.seconds:.1f} s, {pace}'}")
    return run


@contextmanager
def _serve_from_s3(workload: Workload, folder: Path, seconds: float, work: Path) -> Iterator[Workload]:
    """Copy the images to an S3 server and yield the workload on it; each request takes so many seconds longer."""
    from tests.support.seaweed import run_seaweed, s3_environment

    with tempfile.TemporaryDirectory(dir=work) as data, run_seaweed(Path(data)) as server:
        bucket = server.bucket("bench")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: server.put(f"{bucket}images/{path.name}", path), sorted(folder.iterdir())))
        with delaying_proxy(server.endpoint, seconds) as endpoint, patch.dict(os.environ, s3_environment(endpoint)):
            yield replace(workload, images=f"{bucket}images/", output=f"{bucket}out")


def _print_status(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
