"""JPEG decoding on the GPU's own engines beside decoding on the CPU: pixels, logits, a whole run, and the pace.

    python -m benchmarks.gpu WORK [--images 20000] [--model resnet50]

Needs a CUDA device, the local pool and no Ray; without one it says so and ends with exit code 2. The photographs come
from the test data (BATCHJOB_TEST_DATA), the weights are seeded; WORK keeps both for the next time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import batchjob
from batchjob import Job
from batchjob.bench.bench import BenchOptions, bench
from batchjob.bench.results import BenchResult
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.gpu_decode import create_jpeg_decoder
from batchjob.inference.output_comparison import OutputComparison, compare_outputs
from batchjob.preprocessing.jpeg import read_baseline_jpeg_size
from batchjob.preprocessing.transforms import ImageTransform
from batchjob.storage.reader import Reader
from benchmarks.image_sets import make_images, make_weights, warm_page_cache

_JOB = Path(__file__).with_name("job.yaml")
_CROP = 224
_BATCH = 64
_COMPARED = 300  # images: as many as the set has originals
DECODING = {
    "CPU, exact": ("decode.mode=exact",),
    "CPU, fast": ("decode.mode=fast",),
    "CPU and GPU": ("decode.mode=fast", "decode.device=cuda"),
}


@dataclass(frozen=True)
class DecodeFidelity:
    """How far a way of decoding is from the exact one: in levels of 255, and in what the model makes of it."""

    max_difference: int
    mean_difference: float
    comparison: OutputComparison


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("work", type=Path)
    asked.add_argument("--images", type=int, default=20_000)
    asked.add_argument("--model", default="resnet50")
    given = asked.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device is visible here, so there is nothing to measure", file=sys.stderr)
        return 2
    work = given.work.absolute()
    images = make_images(work, "imagenet", given.images)
    weights = make_weights(work, given.model, images, _CROP)
    warm_page_cache(images)
    jobs = {name: make_job(work, images, weights, given.model, more) for name, more in DECODING.items()}
    print_fidelity(compare_decoding(jobs, sorted(images.iterdir())[:_COMPARED]))
    shutil.rmtree(work / "out", ignore_errors=True)
    outcome = batchjob.run(jobs["CPU and GPU"])
    print(
        f"\nrun on the local pool, decoding on both: {outcome.status}, {outcome.predicted:,} rows, {outcome.failed} bad"
    )
    print_throughput({name: bench(one, BenchOptions(given.images)) for name, one in jobs.items()})
    return 0 if outcome.status == "complete" else 1


def make_job(work: Path, images: Path, weights: Path, model: str, more: Sequence[str]) -> Job:
    params = {"images": str(images), "output": str(work / "out"), "weights": str(weights), "model": model}
    size = [f"preprocess.resize={_CROP * 8 // 7}", f"preprocess.crop={_CROP}"]
    return Job.from_file(_JOB, params, ["runtime.pool=local", "runtime.device=cuda", *size, *more])


def compare_decoding(jobs: dict[str, Job], paths: Sequence[Path]) -> dict[str, DecodeFidelity]:
    """Pixels and fp32 logits of plain photographs, each way of decoding against the exact one."""
    files = [data for data in (path.read_bytes() for path in paths) if read_baseline_jpeg_size(data) is not None]
    reader = Reader()
    engines = {name: Engine(one, reader, ()) for name, one in jobs.items()}
    exact = engines["CPU, exact"]
    pixels = {
        "CPU, exact": decode_on_cpu(exact.image_transform, files),
        "CPU, fast": decode_on_cpu(engines["CPU, fast"].image_transform, files),
        "GPU alone": decode_on_gpu(engines["CPU and GPU"], files),
    }
    logits = {name: predict_logits(exact, one) for name, one in pixels.items()}
    found = {}
    for name, one in pixels.items():
        away = (one.int() - pixels["CPU, exact"].int()).abs()
        likeness = compare_outputs(logits["CPU, exact"], logits[name])
        found[name] = DecodeFidelity(int(away.max()), away.float().mean().item(), likeness)
    return found


def decode_on_cpu(prepare: ImageTransform, files: Sequence[bytes]) -> torch.Tensor:
    return torch.stack([prepare(data).pixels for data in files])


def decode_on_gpu(engine: Engine, files: Sequence[bytes]) -> torch.Tensor:
    decode = create_jpeg_decoder(engine.device)
    made = []
    for start in range(0, len(files), _BATCH):
        some = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files[start : start + _BATCH]]
        decoded = decode(some)
        made.append(engine.image_transform.resize_crop.resize_on_device(decoded).cpu())
    return torch.cat(made)


def predict_logits(engine: Engine, pixels: torch.Tensor) -> torch.Tensor:
    forward = engine.build_forward(ExecutionConfig())
    with forward.disable_gradients():
        return torch.cat([forward(part.to(engine.device)).float().cpu() for part in pixels.split(_BATCH)])


def print_fidelity(found: dict[str, DecodeFidelity]) -> None:
    print(f"{torch.cuda.get_device_name()}, against exact decoding, plain photographs, logits in fp32\n")
    print(f"{'decoded on':<14}{'largest':>9}{'mean':>8}{'top-1':>9}{'deviation':>11}")
    for name, near in found.items():
        alike = near.comparison
        print(
            f"{name:<14}{near.max_difference:>9}{near.mean_difference:>8.2f}{alike.agreement:>9.2%}{alike.deviation:>11.1e}"
        )
    print("\nlargest and mean: levels of 255; deviation: largest, over the largest logit")


def print_throughput(found: dict[str, BenchResult]) -> None:
    print(f"\n{'decoded on':<14}{'images/s':>10}{'waiting':>9}{'cores':>7}{'share':>8}  tightest ceiling")
    for name, one in found.items():
        print(f"{name:<14}{' '.join(format_figures(one))}")
    print("\n" + "\n".join(f"{name}: {one.verdict}{' (NOISY)' * one.calibration.noisy}" for name, one in found.items()))


def format_figures(found: BenchResult) -> Iterator[str]:
    run, none = found.run, "not measured"
    yield f"{run.images_per_second:>10,.0f}"
    yield f"{none if run.starvation is None else format(run.starvation, '.0%'):>8}"
    yield f"{none if run.cores_busy is None else format(run.cores_busy, '.1f'):>6}"
    yield f"{none if found.share is None else format(found.share, '.2f'):>7} "
    yield f"{found.ceilings[0].name} {found.ceilings[0].images_per_second:,.0f}" if found.ceilings else none


if __name__ == "__main__":
    sys.exit(main())
