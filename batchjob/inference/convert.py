"""`batchjob convert`: a job's model as a file of another format, held against the original on the job's own images."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import yaml

from batchjob.errors import CheckFailed, InvalidJob
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.optimize import measure_sparsity, prune_weights, quantize_module
from batchjob.inference.output_comparison import OutputComparison, compare_outputs
from batchjob.job.job import Job
from batchjob.storage.reader import Reader

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["ConversionOptions", "ConversionResult", "convert_model"]

ConversionFormat = Literal["onnx", "exported", "aoti", "torchscript", "int8", "pruned", "tensorrt"]
_CODE = {"exported", "aoti", "torchscript", "int8", "tensorrt"}
_TYPES = {"aoti": "exported", "int8": "exported"}
_TOLERANCES = {"onnx": 1e-3, "exported": 1e-3, "aoti": 1e-3, "torchscript": 1e-3, "tensorrt": 5e-2, "int8": 0.2}
_AGREEMENT = 0.98
_PAIRS = 5
_LARGEST_BATCH = 4096


@dataclass(frozen=True)
class ConversionOptions:
    """What is wanted.

    Attributes:
        to: the format; `int8` is a quantised AOTInductor package, `pruned` a state dict with zeros in it.
        file: where to.
        images: of the job, to calibrate on and to compare.
        tolerance: largest deviation, as a share of the largest output; a fitting one where not given.
        amount: for `pruned`: share of the weights of each layer that become zero.
        structured: for `pruned`: whole channels in place of single weights.
        force: a file that is there may be replaced.
    """

    to: ConversionFormat
    file: Path
    images: int = 32
    tolerance: float | None = None
    amount: float = 0.5
    structured: bool = False
    force: bool = False


@dataclass(frozen=True)
class ConversionResult:
    """What came of it: the file, its digest, how near it is on so many images, and images/s before and after."""

    file: str
    sha256: str
    likeness: OutputComparison
    images: int
    before: float
    after: float
    model: dict[str, Any]
    preprocess: dict[str, Any]
    note: str = ""

    def lines(self) -> list[str]:
        """For a person: the figures, and what to write into a job."""
        found = self.likeness
        job = yaml.safe_dump({"model": self.model, "preprocess": self.preprocess}, sort_keys=False)
        return [
            (
                f"{self.file}: on {self.images} images of the job it agrees on {found.agreement:.1%}, deviates by "
                f"{found.deviation:.1e} of the largest output at most, cosine {found.cosine:.6f}"
            ),
            f"{self.after:,.1f} images/s, the original {self.before:,.1f} (in turn, forward pass alone)",
            *([self.note] if self.note else []),
            "in a job:",
            *job.splitlines(),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For a machine."""
        return asdict(self)


def convert_model(job: Job, options: ConversionOptions, sample_locations: Sequence[str]) -> ConversionResult:
    """Write the model of a job as another format, and check it as a job would load it.

    Args:
        job: the job that names the model.
        options: format, file and limits.
        sample_locations: the first images of the job; at least `options.images` of them where there are so many.

    Raises:
        InvalidJob: the model cannot become that, a package is missing, the file's folder is not there.
        CheckFailed: it deviates by more than the tolerance; no file is left.
        Unavailable: a store cannot be reached.
    """
    if not options.file.parent.is_dir():
        raise InvalidJob(f"-o {options.file}: there is no folder {options.file.parent}; create it")
    if options.file.exists() and not options.force:
        raise InvalidJob(f"-o {options.file}: there is such a file already; take another name, or add --force")
    reader = Reader(job.storage)
    engine = Engine(job, reader, sample_locations)
    engine.build_postprocess()
    if engine.model.input_kind != "batch" or engine.variable_size:
        raise InvalidJob("model: it takes images of different sizes, which cannot be converted; run it as it is")
    pixels = _pixels(engine, sample_locations, options.images)
    forward = engine.build_forward(ExecutionConfig())
    with forward.disable_gradients():
        inputs = forward.prepare_inputs(pixels)
    with _beside(options.file) as path, _quiet():
        note = _written(engine.model.module, options, inputs, path)
        found = _checked(job, engine, options, path, pixels, note)
        path.replace(options.file)
    return found


def _pixels(engine: Engine, locations: Sequence[str], images: int) -> torch.Tensor:
    import torch

    alike = (pixels for pixels in engine.load_images(locations) if pixels.shape == engine.example_image.shape)
    found = [pixels for pixels, _ in zip(alike, range(images), strict=False)]
    if not found:
        raise InvalidJob("input: none of the job's first images can be decoded, and a conversion is checked on them")
    return torch.stack(found)


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A path to write to in the same folder; nothing stays there."""
    folder = Path(tempfile.mkdtemp(dir=file.parent, prefix=f".{file.name}-"))
    try:
        yield folder / "model.pt2"  # AOTInductor wants that ending; the others look at what is in a file
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


@contextmanager
def _quiet() -> Iterator[None]:
    """What exporters print, and warn of one another, is not for the user."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _written(module: nn.Module, wanted: ConversionOptions, inputs: torch.Tensor, path: Path) -> str:
    """Write the file; returns what else is to be said of it."""
    import torch

    write: dict[str, Callable[[nn.Module, torch.Tensor, Path], str]] = {
        "onnx": _onnx,
        "exported": _exported,
        "aoti": _aoti,
        "torchscript": _torchscript,
        "int8": _int8,
        "pruned": lambda module, _, path: _pruned(module, wanted, path),
        "tensorrt": _tensorrt,
    }
    try:
        with torch.inference_mode(False), torch.no_grad():
            return write[wanted.to](module, inputs.clone(), path)
    except InvalidJob:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise InvalidJob(
            f"model: it cannot be converted to {wanted.to} ({type(error).__name__}: {reason}); run it as it is, or "
            "choose another --to"
        ) from error


def _program(module: nn.Module, inputs: torch.Tensor) -> torch.export.ExportedProgram:
    """Of any number of images."""
    import torch

    return torch.export.export(module, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _onnx(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    import torch

    try:
        import onnxscript  # noqa: F401 - what torch needs, said in one sentence where it is absent
    except ImportError as error:
        raise InvalidJob("--to onnx needs onnx and onnxscript; pip install 'batchjob[onnx]'") from error
    torch.onnx.export(
        module,
        (inputs,),
        str(path),
        dynamo=True,
        input_names=["pixels"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        external_data=False,
        verbose=False,
    )
    return ""


def _exported(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    import torch

    torch.export.save(_program(module, inputs), path)
    return ""


def _aoti(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    import torch
    from torch._inductor import aoti_compile_and_package

    program = torch.export.export(
        module, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)},)
    )
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"freezing": True})
    return "compiled for machines like this one"


def _torchscript(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    import torch

    torch.jit.save(torch.jit.trace(module, inputs), str(path))
    return "torch has deprecated TorchScript; --to exported is what replaces it"


def _int8(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    """Compiled, for int8 kernels come with the compiler alone."""
    return _aoti(quantize_module(module, "int8-static", inputs), inputs, path)


def _pruned(module: nn.Module, wanted: ConversionOptions, path: Path) -> str:
    from safetensors.torch import save_file

    made = prune_weights(module, wanted.amount, structured=wanted.structured)
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, path)
    what = "channels" if wanted.structured else "single weights"
    return (
        f"{measure_sparsity(made):.0%} of the weights are zero ({what}); the shapes are the same, "
        "so that dense kernels compute "
        "as long as before: train on to win accuracy back, and compress the file to win space"
    )


def _tensorrt(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    import torch

    try:
        import torch_tensorrt
    except ImportError as error:
        raise InvalidJob("--to tensorrt needs torch-tensorrt and an NVIDIA GPU; pip install torch-tensorrt") from error
    if not torch.cuda.is_available():
        raise InvalidJob("--to tensorrt needs an NVIDIA GPU, and none is visible here; convert where the job will run")
    compiled = torch_tensorrt.compile(module.cuda(), ir="dynamo", inputs=[inputs.cuda()])
    torch_tensorrt.save(compiled, str(path), inputs=[inputs.cuda()])
    return "built for this kind of GPU and this TensorRT; its precision is that of the graph"


def _checked(
    job: Job, engine: Engine, wanted: ConversionOptions, path: Path, pixels: torch.Tensor, note: str
) -> ConversionResult:
    """The file as a job loads it, against the original. Raises CheckFailed."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = _settings(job, wanted, digest, len(pixels))
    if settings is None:
        raise InvalidJob(
            "--to pruned keeps the architecture: the job's model must be of type torchvision or checkpoint"
        )
    preprocess = engine.preprocess.model_dump(mode="json", exclude_defaults=True)
    preprocess = {"resize": None, "crop": None, "mean": None, "std": None, **preprocess}
    doc = {**job.serialize(), "model": {**settings, "weights": str(path)}, "preprocess": preprocess}
    other = Engine(Job.deserialize(doc, job.folder, job.folder), Reader(job.storage), ())
    before, after = (_runner(each, pixels) for each in (engine, other))
    likeness = compare_outputs(before(), after(), argmax_is_class=engine.argmax_is_class)
    tolerance = wanted.tolerance if wanted.tolerance is not None else _TOLERANCES.get(wanted.to)
    if tolerance is not None and not (likeness.deviation <= tolerance and likeness.agreement >= _AGREEMENT):
        raise CheckFailed(
            f"{wanted.file}: not written: on {len(pixels)} images of the job it deviates by {likeness.deviation:.1e} "
            f"of the largest output, {tolerance:.0e} is allowed, and agrees on {likeness.agreement:.1%}; "
            "--tolerance allows more"
        )
    paces = [(_clocked(before), _clocked(after)) for _ in range(_PAIRS)]
    return ConversionResult(
        file=str(wanted.file),
        sha256=digest,
        likeness=likeness,
        images=len(pixels),
        before=len(pixels) / median(pace for pace, _ in paces),
        after=len(pixels) / median(pace for _, pace in paces),
        model={**settings, "weights": str(wanted.file)},
        preprocess=preprocess,
        note=note,
    )


def _settings(job: Job, wanted: ConversionOptions, digest: str, images: int) -> dict[str, Any] | None:
    """The `model` of a job that runs the file, `weights` left out. TensorRT was built for so many images a batch."""
    if wanted.to != "pruned":
        trust = {"trust": True, "sha256": digest} if wanted.to in _CODE else {}
        size = {"batch_size": images} if wanted.to == "tensorrt" else {}
        return {"type": _TYPES.get(wanted.to, wanted.to), **trust, **size}
    own = job.serialize()["model"]
    if own["type"] not in {"torchvision", "checkpoint"}:
        return None
    return {key: value for key, value in own.items() if key not in {"weights", "seed", "sha256", "mirror"}}


def _runner(engine: Engine, pixels: torch.Tensor) -> Callable[[], Any]:
    """The engine's output for these images, in batches of the only size it takes, the last one padded."""
    import torch
    from torch.utils._pytree import tree_map

    forward, size = engine.build_forward(ExecutionConfig()), engine.model.batch_size or len(pixels)
    padded = torch.cat([pixels, pixels[:1].expand(-len(pixels) % size, *pixels.shape[1:])])

    def joined(*parts: torch.Tensor) -> torch.Tensor:
        return torch.cat(parts)[: len(pixels)]

    def run() -> Any:
        with forward.disable_gradients():
            return tree_map(joined, *(forward(part) for part in padded.to(forward.device).split(size)))

    return run


def _clocked(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
