"""Comparison of all formats of one model: top-1 agreement, largest deviation and images/s against its state_dict.

    python benchmarks/formats.py FOLDER_OF_IMAGES [--model resnet18] [--rounds 5]

Each format is loaded the way a job loads it, by `model:` settings and the engine; the forward passes are timed in turn.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision

from batchjob.inference.conversion_options import ConversionFormat, ConversionOptions
from batchjob.inference.convert import convert_model
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.output_comparison import compare_outputs
from batchjob.job.job import Job
from batchjob.storage.reader import Reader

BATCH = 32


def main() -> None:
    """Measure all formats and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        print_table(measure_formats(options.images, options.model, options.rounds, Path(folder)))


def measure_formats(images: Path, name: str, rounds: int, folder: Path) -> list[tuple[str, float, float, float, float]]:
    """Return format, agreement, deviation, images/s, and the median ratio of images/s to the state_dict's."""
    job = make_job(images, save_weights(name, folder), folder)
    reader = Reader()
    engines = {"state_dict": make_engine(job, reader)}
    for title, model in convert_formats(job, name, folder, list_images(images)).items():
        engines[title] = make_engine(with_model(job, model), reader)
    pixels = torch.stack(list(engines["state_dict"].load_images(list_images(images))))
    runs = {title: make_runner(engine) for title, engine in engines.items()}
    reference = run_in_batches(runs["state_dict"], pixels)
    comparisons = {title: compare_outputs(reference, run_in_batches(run, pixels)) for title, run in runs.items()}
    throughputs: dict[str, list[float]] = {title: [] for title in runs}
    for _ in range(rounds):
        for title, run in runs.items():
            began = time.perf_counter()
            run(pixels[:BATCH])
            throughputs[title].append(BATCH / (time.perf_counter() - began))
    return [
        (
            title,
            comparisons[title].agreement,
            comparisons[title].deviation,
            median(throughputs[title]),
            median(own / plain for own, plain in zip(throughputs[title], throughputs["state_dict"], strict=True)),
        )
        for title in runs
    ]


def print_table(rows: list[tuple[str, float, float, float, float]]) -> None:
    print(f"{'format':<22}{'agreement':>10}{'deviation':>11}{'images/s':>10}{'ratio':>7}")
    for title, agreement, deviation, pace, ratio in rows:
        print(f"{title:<22}{agreement:>10.1%}{deviation:>11.1e}{pace:>10.1f}{ratio:>7.2f}")


def save_weights(name: str, folder: Path) -> Path:
    """Save seeded weights whose batch norms have seen some data, so that outputs differ from image to image."""
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        for _ in range(4):
            module.train()(torch.rand(8, 3, 224, 224))
    torch.save(module.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def make_job(images: Path, weights: Path, folder: Path) -> Job:
    return Job.model_validate(
        {
            "input": {"type": "prefix", "uri": str(images), "extensions": "all"},
            "model": {"type": "checkpoint", "architecture": "resnet18", "weights": str(weights)},
            "preprocess": {"resize": 256, "crop": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            "task": {"type": "embedding"},
            "runtime": {"device": "cpu", "batch_size": BATCH},
            "output": {"uri": str(folder / "out")},
        }
    )


def with_model(job: Job, model: dict[str, Any]) -> Job:
    return Job.deserialize({**job.serialize(), "model": model}, job.folder, job.folder)


def convert_formats(job: Job, name: str, folder: Path, locations: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Convert the weights to each format; return `model` settings by title."""
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None)
    module.load_state_dict(torch.load(folder / "weights.pth", weights_only=True))
    module.eval()
    torch.save(module, folder / "whole.pt")
    torch.jit.save(torch.jit.script(module), str(folder / "scripted.pt"))
    settings = {
        "pickle": trusted_model("pickle", folder / "whole.pt"),
        "TorchScript scripted": trusted_model("torchscript", folder / "scripted.pt"),
    }
    conversions: dict[str, ConversionFormat] = {
        "TorchScript traced": "torchscript",
        "torch.export .pt2": "exported",
        "AOTInductor": "aoti",
        "ONNX": "onnx",
        "int8 static, compiled": "int8",
    }
    for title, to in conversions.items():
        settings[title] = convert_model(
            job, ConversionOptions(to, folder / f"{to}.bin", tolerance=1.0), locations
        ).model
    return settings


def trusted_model(kind: str, file: Path) -> dict[str, Any]:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"type": kind, "weights": str(file), "trust": True, "sha256": digest}


def list_images(images: Path) -> list[str]:
    return sorted(str(path) for path in images.rglob("*") if path.is_file())


def make_engine(job: Job, reader: Reader) -> Engine:
    engine = Engine(job, reader, ())
    engine.check_task()
    return engine


def make_runner(engine: Engine) -> Callable[[torch.Tensor], torch.Tensor]:
    forward = engine.build_forward(ExecutionConfig())

    def run(pixels: torch.Tensor) -> torch.Tensor:
        with forward.disable_gradients():
            output: torch.Tensor = forward(pixels.clone())
        return output

    return run


def run_in_batches(run: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([run(part) for part in pixels.split(BATCH)])


if __name__ == "__main__":
    main()
