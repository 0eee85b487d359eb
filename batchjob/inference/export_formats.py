"""Writers of the file formats that a model can be converted to: ONNX, torch.export, AOTInductor, TensorRT, …"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.inference.conversion_options import ConversionFormat
from batchjob.inference.optimize import measure_sparsity, prune_weights, quantize_module
from batchjob.system import install_command

__all__ = ["export_model", "export_pruned", "exporter_output_ignored"]


# Largest batch of an AOTInductor package, which needs an upper bound.
_MAX_BATCH = 4096


def export_model(module: nn.Module, to: ConversionFormat, inputs: torch.Tensor, path: Path) -> str:
    """Write a module as a file of another format; it takes batches of any size, except with TensorRT.

    A file takes images in float32, also where the module's weights have another dtype.

    Args:
        module: Module in eval mode.
        to: Any format but `pruned`, see `export_pruned`.
        inputs: Example inputs `[n, c, h, w]`, in the dtype of the weights, to trace, and for `int8` to calibrate, the
            module on.
        path: File to write.

    Returns:
        A note for the user; empty if there is nothing to say.

    Raises:
        InvalidJob: The module cannot be converted, or a package is missing.
    """
    with _conversion_errors(to):
        if inputs.dtype != torch.float32:
            module = _InputCast(module, inputs.dtype).eval()
        return _WRITERS[to](module, inputs.to(torch.float32, copy=True), path)


class _InputCast(nn.Module):
    """Module that takes images in float32 and gives them to another in the dtype of its weights."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, images: torch.Tensor) -> Any:
        return self.module(images.to(self.dtype))


def export_pruned(module: nn.Module, amount: float, structured: bool, path: Path) -> str:
    """Write the state dict of a module with its smallest weights set to zero; return a note for the user.

    Args:
        module: Module in eval mode.
        amount: Share of each layer's weights that become zero, from 0 to 1.
        structured: Set whole output channels to zero in place of single weights.
        path: File to write, in safetensors format.

    Raises:
        InvalidJob: The module cannot be pruned.
    """
    with _conversion_errors("pruned"):
        pruned = prune_weights(module, amount, structured=structured)
        save_file({name: value.contiguous() for name, value in pruned.state_dict().items()}, path)
    what = "channels" if structured else "single weights"
    return (
        f"{measure_sparsity(pruned):.0%} of the weights are zero ({what}); the shapes are the same, so that dense "
        "kernels compute as long as before: train on to win accuracy back, and compress the file to win space"
    )


@contextmanager
def _conversion_errors(to: str) -> Iterator[None]:
    """Run an exporter without gradients; turn its exceptions into InvalidJob."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except InvalidJob:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise InvalidJob(
            f"model: it cannot be converted to {to} ({type(error).__name__}: {reason}); run it as it is, or "
            "choose another --to"
        ) from error


@contextmanager
def exporter_output_ignored() -> Iterator[None]:
    """Ignore prints, warnings and log lines of exporters: a user can do nothing about them."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _write_onnx(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    try:
        import onnxscript  # noqa: F401 - torch needs it; if it is missing, that is reported in one sentence
    except ImportError as error:
        install = install_command("onnx", "onnx", "onnxscript")
        raise InvalidJob(f"--to onnx needs onnx and onnxscript; {install}") from error
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


def _write_exported(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(module, (inputs,), dynamic_shapes=({0: batch},)), path)
    return ""


def _write_aot_inductor(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    # Importing the compiler takes seconds.
    from torch._inductor import aoti_compile_and_package

    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    program = torch.export.export(module, (inputs,), dynamic_shapes=({0: batch},))
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"freezing": True})
    return "compiled for machines like this one"


def _write_torchscript(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    torch.jit.save(torch.jit.trace(module, inputs), str(path))
    return "torch has deprecated TorchScript; --to exported is what replaces it"


def _write_int8(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    """Write a quantised module as an AOTInductor package: only the compiler has int8 kernels."""
    return _write_aot_inductor(quantize_module(module, "int8-static", inputs), inputs, path)


def _write_tensorrt(module: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    try:
        import torch_tensorrt
    except ImportError as error:
        raise InvalidJob("--to tensorrt needs torch-tensorrt and an NVIDIA GPU; pip install torch-tensorrt") from error
    if not torch.cuda.is_available():
        raise InvalidJob("--to tensorrt needs an NVIDIA GPU, and none is visible here; convert where the job will run")
    compiled = torch_tensorrt.compile(module.cuda(), ir="dynamo", inputs=[inputs.cuda()])
    torch_tensorrt.save(compiled, str(path), inputs=[inputs.cuda()])
    return "built for this kind of GPU and this TensorRT; its precision is that of the graph"


_WRITERS: dict[str, Callable[[nn.Module, torch.Tensor, Path], str]] = {
    "onnx": _write_onnx,
    "exported": _write_exported,
    "aoti": _write_aot_inductor,
    "torchscript": _write_torchscript,
    "int8": _write_int8,
    "tensorrt": _write_tensorrt,
}
