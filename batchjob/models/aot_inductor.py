"""Packages compiled by AOTInductor: check the machine they were compiled for, and make a module that runs one."""

from __future__ import annotations

import json
import platform
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob
from batchjob.models.exported_input import ExportedInput

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["open_aoti_package"]

_MODEL_FOLDER = re.compile(r"(?:^|/)data/aotinductor/([^/]+)/")
# Input checks in the generated C++ source; `input_handles[0]` is the first input.
_INPUT_CHECK = re.compile(r"static void check_input_(\d+)\(")
_FIXED_DIMENSION = re.compile(r'input_handles\[0\]: unmatched dim value at (\d+), "\s*<< "expected: (\d+)')
_ANY_DIMENSION = re.compile(r"input_handles\[0\]: .{0,40}(?:dim value|stride value).{0,20} at (\d+)")
_DTYPE = re.compile(r"input_handles\[0\]: unmatched dtype.{0,120}?\(at::k(\w+)\)", re.DOTALL)
_TORCH_DTYPES = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Double": "float64", "Byte": "uint8"}
# Instruction sets: the name that Inductor uses, and the key of `torch.cpu.get_capabilities()`.
_CPU_CAPABILITIES = {"AVX2": "avx2", "AVX512": "avx512_f", "AVX512_VNNI": "avx512_vnni", "AMX_TILE": "amx_tile"}


def open_aoti_package(data: bytes, where: str) -> tuple[nn.Module, ExportedInput, tuple[str, ...]]:
    """Open a package. If it was compiled for another machine, none of its code is loaded.

    Args:
        data: Content of the `.pt2` file.
        where: Job key and file, the start of error messages.

    Returns:
        A module that runs the package, its input, and the device types it runs on.

    Raises:
        InvalidJob: The package was compiled for another machine, holds several models, does not load, or its input is
            not one batch of images.
    """
    package = _read_package(data, where)
    package.check_machine()
    device_type = package.metadata.get("AOTI_DEVICE_KEY", "cpu")
    image_input = package.parse_input()
    return _make_module(data, package, image_input, device_type), image_input, (device_type,)


@dataclass(frozen=True)
class _AotiPackage:
    """Facts that a package states about itself.

    Attributes:
        model: Name of its only model.
        metadata: Machine and device it was compiled for; keys start with `AOTI_`.
        source: Generated C++ source, which contains the checks of the inputs; empty if the package has none.
        where: Job key and file, the start of error messages.
    """

    model: str
    metadata: dict[str, str]
    source: str
    where: str

    def parse_input(self) -> ExportedInput:
        """Parse the input from the checks in the generated source.

        The compiled graph does not run these checks by default, and would read beyond the end of another input.
        Example: for `[n, 3, 224, 224]` with free `n` the source contains

            input_handles[0]: unmatched dim value at 1, " << "expected: 3
            input_handles[0]: unmatched dim value at 2, " << "expected: 224
            input_handles[0]: unmatched dim value at 3, " << "expected: 224
            input_handles[0]: unmatched stride value at 3, …
        """
        inputs = len(set(_INPUT_CHECK.findall(self.source)))
        if inputs != 1:
            problem = f"takes {inputs} inputs" if inputs else "brings no generated source that tells its inputs"
            raise InvalidJob(
                f"{self.where} {problem}; compile a module that takes one batch of images, with this torch"
            )
        fixed = {int(index): int(size) for index, size in _FIXED_DIMENSION.findall(self.source)}
        rank = max([int(index) for index in _ANY_DIMENSION.findall(self.source)], default=3) + 1
        dtype = _DTYPE.search(self.source)
        name = dtype[1] if dtype else "Float"
        return ExportedInput(
            tuple(fixed.get(index) for index in range(rank)), f"torch.{_TORCH_DTYPES.get(name, name)}", self.where
        )

    def check_machine(self) -> None:
        """Check that the package was compiled for this platform, processor and GPU.

        Raises:
            InvalidJob: It was compiled for another one.
        """
        import torch

        machine = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine()}
        if self.metadata.get("AOTI_DEVICE_KEY") == "cuda" and torch.version.hip is None and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            machine["AOTI_COMPUTE_CAPABILITY"] = str(major * 10 + minor)
        differences = [
            f"{self.metadata[key]}, not {value}"
            for key, value in machine.items()
            if self.metadata.get(key, value) not in {"", value}
        ]
        differences += [f"{name}, which this processor lacks" for name in self._list_missing_instructions()]
        if differences:
            raise InvalidJob(
                f"{self.where} was compiled for {'; '.join(differences)}; compile it on a machine like this one"
            )

    def _list_missing_instructions(self) -> list[str]:
        import torch

        if self.metadata.get("AOTI_DEVICE_KEY", "cpu") != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
            return []
        capabilities = torch.cpu.get_capabilities()
        names = self.metadata.get("AOTI_CPU_ISA", "").split()
        return [name for name in names if not capabilities.get(_CPU_CAPABILITIES.get(name, ""), True)]


def _read_package(data: bytes, where: str) -> _AotiPackage:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            names = archive.namelist()
            metadata = [json.loads(archive.read(name)) for name in names if name.endswith("wrapper_metadata.json")]
            sources = [archive.read(name).decode() for name in names if name.endswith(".wrapper.cpp")]
    except (zipfile.BadZipFile, ValueError) as error:
        raise InvalidJob(f"{where} is no whole AOTInductor package ({error}); copy it there again") from error
    models = sorted({match[1] for match in map(_MODEL_FOLDER.search, names) if match})
    if len(models) != 1:
        raise InvalidJob(f"{where} holds {len(models)} models ({', '.join(models)}); package one alone")
    return _AotiPackage(models[0], metadata[0] if metadata else {}, "".join(sources), where)


def _make_module(data: bytes, package: _AotiPackage, image_input: ExportedInput, device_type: str) -> nn.Module:
    import torch

    # A package for the CPU is loaded now, so that its bytes can be freed. One for a GPU is loaded when the module is
    # moved: only then is the index of the GPU known.
    run_on_cpu = _load_runner(data, package, -1) if device_type == "cpu" else None
    load_on_gpu = None if device_type == "cpu" else partial(_load_runner, data, package)

    class AotiModule(torch.nn.Module):
        """Module that runs the package on the device it was moved to."""

        def __init__(self) -> None:
            super().__init__()
            self._device, self._run = torch.device("cpu"), run_on_cpu

        # `module.to(device)` calls this with a function that moves one tensor; an empty tensor tells where to.
        def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> AotiModule:  # noqa: ARG002
            device = fn(torch.empty(0, device=self._device)).device
            if load_on_gpu is not None and device.type == device_type and device != self._device:
                self._device, self._run = device, load_on_gpu(device.index)
            return self

        def forward(self, pixels: torch.Tensor) -> Any:
            image_input.check(pixels)
            if self._run is None or pixels.device.type != device_type:
                raise InvalidJob(f"{package.where} was compiled for {device_type} and cannot run on {pixels.device}")
            return self._run(pixels.contiguous())

    return AotiModule().eval()


def _load_runner(data: bytes, package: _AotiPackage, device_index: int) -> Callable[[torch.Tensor], Any]:
    from torch._inductor.package.package import load_package

    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:  # AOTInductor reads only from files.
        file.write(data)
        file.flush()
        try:
            return load_package(file.name, package.model, device_index=device_index)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            raise InvalidJob(
                f"{package.where} is an AOTInductor package that this torch does not load ({reason}); compile it anew"
            ) from error
