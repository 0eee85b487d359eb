"""Comparison of JPEG decoding on the GPU's own engines and on the CPU: pixels, logits, a whole run, throughput.

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
_COMPARED_IMAGES = 300  # the number of originals in the set

DECODING = {
    "CPU, exact": ("decode.mode=exact",),
    "CPU, fast": ("decode.mode=fast",),
    "CPU and GPU": ("decode.mode=fast", "decode.device=cuda"),
}


@dataclass(frozen=True)
class DecodeFidelity:
    """Distance of one way of decoding from the exact one.

    Attributes:
        max_difference: Largest difference of a pixel value, in levels of 255.
        mean_difference: Mean difference of the pixel values, in levels of 255.
        comparison: Comparison of the model's outputs.
    """

    max_difference: int
    mean_difference: float
    comparison: OutputComparison


def main() -> int:
    """Compare and print; exit code 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--model", default="resnet50")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device is visible here, so there is nothing to measure", file=sys.stderr)
        return 2
    work = options.work.absolute()
    images = make_images(work, "imagenet", options.images)
    weights = make_weights(work, options.model, images, _CROP)
    warm_page_cache(images)
    jobs = {
        name: make_job(work, images, weights, options.model, decode_settings)
        for name, decode_settings in DECODING.items()
    }
    print_fidelity(compare_decoding(jobs, sorted(images.iterdir())[:_COMPARED_IMAGES]))
    shutil.rmtree(work / "out", ignore_errors=True)
    result = batchjob.run(jobs["CPU and GPU"])
    print(f"\nrun on the local pool, decoding on both: {result.status}, {result.predicted:,} rows, {result.failed} bad")
    print_throughput({name: bench(one, BenchOptions(options.images)) for name, one in jobs.items()})
    return 0 if result.status == "complete" else 1


def make_job(work: Path, images: Path, weights: Path, model: str, decode_settings: Sequence[str]) -> Job:
    params = {"images": str(images), "output": str(work / "out"), "weights": str(weights), "model": model}
    size = [f"preprocess.resize={_CROP * 8 // 7}", f"preprocess.crop={_CROP}"]
    return Job.from_file(_JOB, params, ["runtime.pool=local", "runtime.device=cuda", *size, *decode_settings])


def compare_decoding(jobs: dict[str, Job], paths: Sequence[Path]) -> dict[str, DecodeFidelity]:
    """Compare pixels and fp32 logits of plain photographs, for each way of decoding with the exact one."""
    files = [data for data in (path.read_bytes() for path in paths) if read_baseline_jpeg_size(data) is not None]
    reader = Reader()
    engines = {name: Engine(one, reader, ()) for name, one in jobs.items()}
    exact = engines["CPU, exact"]
    pixels = {
        "CPU, exact": decode_on_cpu(exact.image_transform, files),
        "CPU, fast": decode_on_cpu(engines["CPU, fast"].image_transform, files),
        "GPU alone": decode_on_gpu(engines["CPU and GPU"], files),
    }
    logits = {name: predict_logits(exact, decoded) for name, decoded in pixels.items()}
    fidelities = {}
    for name, decoded in pixels.items():
        difference = (decoded.int() - pixels["CPU, exact"].int()).abs()
        comparison = compare_outputs(logits["CPU, exact"], logits[name])
        fidelities[name] = DecodeFidelity(int(difference.max()), difference.float().mean().item(), comparison)
    return fidelities


def decode_on_cpu(transform: ImageTransform, files: Sequence[bytes]) -> torch.Tensor:
    return torch.stack([transform(data).pixels for data in files])


def decode_on_gpu(engine: Engine, files: Sequence[bytes]) -> torch.Tensor:
    decode = create_jpeg_decoder(engine.device)
    batches = []
    for start in range(0, len(files), _BATCH):
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files[start : start + _BATCH]]
        decoded = decode(encoded)
        batches.append(engine.image_transform.resize_crop.resize_on_device(decoded).cpu())
    return torch.cat(batches)


def predict_logits(engine: Engine, pixels: torch.Tensor) -> torch.Tensor:
    forward = engine.build_forward(ExecutionConfig())
    with forward.disable_gradients():
        return torch.cat([forward(part.to(engine.device)).float().cpu() for part in pixels.split(_BATCH)])


def print_fidelity(fidelities: dict[str, DecodeFidelity]) -> None:
    print(f"{torch.cuda.get_device_name()}, against exact decoding, plain photographs, logits in fp32\n")
    print(f"{'decoded on':<14}{'largest':>9}{'mean':>8}{'top-1':>9}{'deviation':>11}")
    for name, fidelity in fidelities.items():
        comparison = fidelity.comparison
        print(
            f"{name:<14}{fidelity.max_difference:>9}{fidelity.mean_difference:>8.2f}"
            f"{comparison.agreement:>9.2%}{comparison.deviation:>11.1e}"
        )
    print("\nlargest and mean: levels of 255; deviation: largest, over the largest logit")


def print_throughput(results: dict[str, BenchResult]) -> None:
    print(f"\n{'decoded on':<14}{'images/s':>10}{'waiting':>9}{'cores':>7}{'share':>8}  tightest ceiling")
    for name, result in results.items():
        print(f"{name:<14}{' '.join(format_figures(result))}")
    print()
    for name, result in results.items():
        print(f"{name}: {result.verdict}{' (NOISY)' * result.calibration.noisy}")


def format_figures(result: BenchResult) -> Iterator[str]:
    run, none = result.run, "not measured"
    yield f"{run.images_per_second:>10,.0f}"
    yield f"{none if run.starvation is None else format(run.starvation, '.0%'):>8}"
    yield f"{none if run.cores_busy is None else format(run.cores_busy, '.1f'):>6}"
    yield f"{none if result.share is None else format(result.share, '.2f'):>7} "
    yield f"{result.ceilings[0].name} {result.ceilings[0].images_per_second:,.0f}" if result.ceilings else none


if __name__ == "__main__":
    sys.exit(main())
