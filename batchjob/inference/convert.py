"""`batchjob convert`: a job's model as a file of another format, compared with the original on the job's images."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch.utils._pytree import tree_map

from batchjob.errors import CheckFailed, InvalidJob
from batchjob.inference.autotune.trials import measure_seconds
from batchjob.inference.conversion_options import ConversionOptions
from batchjob.inference.engine import Engine
from batchjob.inference.export_formats import export_model, export_pruned, exporter_output_ignored
from batchjob.inference.output_comparison import Agreement, OutputComparison, compare_outputs, measure_agreement
from batchjob.job.job import Job
from batchjob.storage.reader import Reader

__all__ = ["ConversionResult", "convert_model"]

# Formats that hold code, so that a job must say `trust: true` and the digest of the file.
_CODE_FORMATS = {"exported", "aoti", "torchscript", "int8", "tensorrt"}
# `model.type` of a job that runs the file, where it is not the name of the format.
_MODEL_TYPES = {"aoti": "exported", "int8": "exported"}
# Largest deviation that is accepted by default; a pruned model is meant to deviate and has no limit.
_TOLERANCES = {"onnx": 1e-3, "exported": 1e-3, "aoti": 1e-3, "torchscript": 1e-3, "tensorrt": 5e-2, "int8": 0.2}
_MIN_AGREEMENT = 0.98
_TIMING_PAIRS = 5


@dataclass(frozen=True)
class ConversionResult:
    """Result of a conversion.

    Attributes:
        file: File that was written.
        sha256: Digest of the file.
        comparison: Distance of its outputs from those of the original.
        agreement: Classes, boxes or integers that are the same; None if the outputs hold none.
        images: Images on which they were compared.
        before: Images per second of the original, forward pass alone.
        after: Images per second of the file, forward pass alone.
        model: `model` section of a job that runs the file.
        preprocess: `preprocess` section of that job.
        note: Remark on the format; empty if there is none.
    """

    file: str
    sha256: str
    comparison: OutputComparison
    agreement: Agreement | None
    images: int
    before: float
    after: float
    model: dict[str, Any]
    preprocess: dict[str, Any]
    note: str = ""

    def lines(self) -> list[str]:
        """Return lines for a person: the comparison, the speeds, and the sections for a job file."""
        comparison = self.comparison
        agreement = f"{self.agreement.describe()}, " if self.agreement is not None else ""
        job = yaml.safe_dump({"model": self.model, "preprocess": self.preprocess}, sort_keys=False)
        return [
            (
                f"{self.file}: on {self.images} images of the job: {agreement}it deviates by "
                f"{comparison.deviation:.1e} of the largest output at most, cosine {comparison.cosine:.6f} at least"
            ),
            f"{self.after:,.1f} images/s, the original {self.before:,.1f} (in turn, forward pass alone)",
            *([self.note] if self.note else []),
            "in a job:",
            *job.splitlines(),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with the comparison under the key `likeness`.

        Its `agreement` is the share that was measured; null if there was nothing to measure.
        """
        fields = asdict(self)
        share = None if self.agreement is None else self.agreement.share
        likeness = fields.pop("comparison") | {"agreement": share}
        return {**fields, "likeness": likeness}


def convert_model(job: Job, options: ConversionOptions, sample_locations: Sequence[str]) -> ConversionResult:
    """Write the model of a job as another format, load it as a job would, and compare it with the original.

    Args:
        job: Job that names the model.
        options: Format, file and limits.
        sample_locations: Images drawn from the input; `options.images_to_draw` of them if there are so many.

    Raises:
        InvalidJob: The model cannot be converted, a package is missing, or the folder of the file does not exist.
        CheckFailed: The outputs deviate by more than the tolerance; no file is left.
        Unavailable: A store cannot be reached.
    """
    options.check_file()
    engine = Engine(job, Reader(job.storage, within=job.input.prefixes), sample_locations)
    engine.check_task()
    if engine.model.input_kind != "batch" or engine.variable_size:
        raise InvalidJob("model: it takes images of different sizes, which cannot be converted; run it as it is")
    if engine.model.transform is not None:
        raise InvalidJob(
            "model: its transform has no name by which the job of the file could find it; assign it to a name in the "
            "module, outside the function"
        )
    pixels, others = _load_batches(engine, sample_locations, options)
    forward = engine.build_forward(engine.loaded_config)
    with forward.disable_gradients():
        inputs = forward.prepare_inputs(others)
    with _temporary_path(options.file) as path, exporter_output_ignored():
        note = _export(engine, options, inputs, path)
        result = _check(job, engine, options, path, pixels, note)
        path.replace(options.file)
    return result


def _load_batches(
    engine: Engine, locations: Sequence[str], options: ConversionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images to compare on, and those to export with, on which `int8` is calibrated.

    These are the same ones unless the model is calibrated: a model is not judged by images that have formed it. Of few
    images half are for each.
    """
    is_calibrated = options.to == "int8"
    same_shape = (pixels for pixels in engine.load_images(locations) if pixels.shape == engine.example_image.shape)
    loaded = list(islice(same_shape, options.images * (2 if is_calibrated else 1)))
    if len(loaded) < (2 if is_calibrated else 1):
        needed = "two images, one to calibrate on," if is_calibrated else "an image"
        raise InvalidJob(f"input: a conversion is checked on images of the job, and it has not {needed} that decodes")
    if not is_calibrated:
        return torch.stack(loaded), torch.stack(loaded)
    middle = len(loaded) - len(loaded) // 2
    return torch.stack(loaded[:middle]), torch.stack(loaded[middle:])


@contextmanager
def _temporary_path(file: Path) -> Iterator[Path]:
    """Provide a path on the same disk as the file, in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(dir=file.parent, prefix=f".{file.name}-"))
    try:
        # AOTInductor requires this suffix; the other formats are recognised by their content.
        yield folder / "model.pt2"
    finally:
        for leftover in folder.iterdir():
            leftover.unlink()
        folder.rmdir()


def _export(engine: Engine, options: ConversionOptions, inputs: torch.Tensor, path: Path) -> str:
    if options.to == "pruned":
        return export_pruned(engine.model.module, options.amount, options.structured, path)
    # A classifier whose features are taken is exported without its last layer, as a graph cannot leave it out later.
    module = engine.task_module if "task.layer" in engine.decisions else engine.model.module
    return export_model(module, options.to, inputs, path)


# -- comparison with the original ------------------------------------------------------------------------------


def _check(
    job: Job, engine: Engine, options: ConversionOptions, path: Path, pixels: torch.Tensor, note: str
) -> ConversionResult:
    """Load the file as a job does, and compare its outputs and its speed with the original. Raises CheckFailed."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = _model_settings(job, options, digest, len(pixels))
    preprocess = engine.preprocess.model_dump(mode="json", exclude_defaults=True)
    preprocess = {"resize": None, "crop": None, "mean": None, "std": None, **preprocess}
    document = {**job.serialize(), "model": {**model, "weights": str(path)}, "preprocess": preprocess}
    run_original = _build_run(engine, pixels)
    try:
        converted = Engine(Job.deserialize(document, job.folder, job.folder), Reader(job.storage), ())
        run_converted = _build_run(converted, pixels)
        expected, actual = run_original(), run_converted()
    except InvalidJob as error:
        reason = str(error).replace(str(path), str(options.file))
        raise InvalidJob(f"--to {options.to}: not written, since a job could not run the file: {reason}") from error
    comparison = compare_outputs(expected, actual, argmax_is_class=engine.argmax_is_class)
    agreement = measure_agreement(expected, actual, argmax_is_class=engine.argmax_is_class)
    _check_tolerance(options, comparison, agreement, len(pixels))
    # Timed in turn, so that a change of the machine's speed affects both.
    timings = [(measure_seconds(run_original), measure_seconds(run_converted)) for _ in range(_TIMING_PAIRS)]
    return ConversionResult(
        file=str(options.file),
        sha256=digest,
        comparison=comparison,
        agreement=agreement,
        images=len(pixels),
        before=len(pixels) / median(seconds for seconds, _ in timings),
        after=len(pixels) / median(seconds for _, seconds in timings),
        model={**model, "weights": str(options.file)},
        preprocess=preprocess,
        note=note,
    )


def _check_tolerance(
    options: ConversionOptions, comparison: OutputComparison, agreement: Agreement | None, images: int
) -> None:
    tolerance = options.tolerance if options.tolerance is not None else _TOLERANCES.get(options.to)
    share = None if agreement is None else agreement.share
    agrees = share is None or share >= _MIN_AGREEMENT
    if tolerance is None or (comparison.deviation <= tolerance and agrees):
        return
    counts = "" if agreement is None else f"; {agreement.describe()}, {_MIN_AGREEMENT:.0%} are needed"
    raise CheckFailed(
        f"{options.file}: not written: on {images} images of the job it deviates by {comparison.deviation:.1e} "
        f"of the largest output, {tolerance:.0e} is allowed{counts}; --tolerance allows a larger deviation"
    )


def _model_settings(job: Job, options: ConversionOptions, digest: str, images: int) -> dict[str, Any]:
    """Return the `model` section of a job that runs the file, without `weights`.

    Example: `{"type": "exported", "trust": True, "sha256": "…"}`. A TensorRT engine is built for one batch size.

    Raises:
        InvalidJob: Pruned weights need the job's own architecture, and it has none.
    """
    if options.to != "pruned":
        trust = {"trust": True, "sha256": digest} if options.to in _CODE_FORMATS else {}
        size = {"batch_size": images} if options.to == "tensorrt" else {}
        return {"type": _MODEL_TYPES.get(options.to, options.to), **trust, **size}
    model = job.serialize()["model"]
    if model["type"] not in {"torchvision", "checkpoint"}:
        raise InvalidJob(
            "--to pruned keeps the architecture: the job's model must be of type torchvision or checkpoint"
        )
    of_the_file = {"weights", "seed", "sha256", "mirror", "checkpoint"}
    return {key: value for key, value in model.items() if key not in of_the_file}


def _build_run(engine: Engine, pixels: torch.Tensor) -> Callable[[], Any]:
    """Return a function that computes the engine's output for these images.

    A model with a fixed batch size runs in several calls, the last one padded with copies of the first image.
    Example: 5 images in a model that takes 4 run as 2 calls of 4, and the output is cut to 5 rows.
    """
    forward, size = engine.build_forward(engine.loaded_config), engine.model.batch_size or len(pixels)
    padded = torch.cat([pixels, pixels[:1].expand(-len(pixels) % size, *pixels.shape[1:])])

    def join(*outputs: torch.Tensor) -> torch.Tensor:
        return torch.cat(outputs)[: len(pixels)]

    def run() -> Any:
        with forward.disable_gradients():
            return tree_map(join, *(forward(chunk) for chunk in padded.to(forward.device).split(size)))

    return run
