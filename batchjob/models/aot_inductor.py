"""Packages that AOTInductor compiled: what machine they are for, and the module that runs one."""

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

_FOLDER = re.compile(r"(?:^|/)data/aotinductor/([^/]+)/")
_FIXED = re.compile(r'input_handles\[0\]: unmatched dim value at (\d+), "\s*<< "expected: (\d+)')
_DIMENSION = re.compile(r"input_handles\[0\]: .{0,40}(?:dim value|stride value).{0,20} at (\d+)")
_INPUTS = re.compile(r"static void check_input_(\d+)\(")
_DTYPE = re.compile(r"input_handles\[0\]: unmatched dtype.{0,120}?\(at::k(\w+)\)", re.DOTALL)
_DTYPES = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Double": "float64", "Byte": "uint8"}
# Inductor's names for instruction sets, and torch.cpu's.
_INSTRUCTIONS = {"AVX2": "avx2", "AVX512": "avx512_f", "AVX512_VNNI": "avx512_vnni", "AMX_TILE": "amx_tile"}


def open_aoti_package(data: bytes, where: str) -> tuple[nn.Module, ExportedInput, tuple[str, ...]]:
    """The module, what it takes and the types of device it runs on. Nothing of a package for another machine is run.

    Raises:
        InvalidJob: compiled for another machine, several models in it, not one batch of images as input, or it does not
            load.
    """
    package = _read(data, where)
    package.check_machine()
    device = package.metadata.get("AOTI_DEVICE_KEY", "cpu")
    return _runnable(data, package, device), package.input(), (device,)


@dataclass(frozen=True)
class _Package:
    """What a package says of itself.

    Attributes:
        model: its name in the package.
        metadata: machine and device it was compiled for.
        source: the generated C++, which holds the checks of its inputs; empty where the package has none.
        where: key and file, for sentences.
    """

    model: str
    metadata: dict[str, str]
    source: str
    where: str

    def input(self) -> ExportedInput:
        """From the checks that were generated; a compiled graph makes none of them by itself, and would read astray."""
        several = len(set(_INPUTS.findall(self.source)))
        if several != 1:
            said = f"takes {several} inputs" if several else "brings no generated source that tells its inputs"
            raise InvalidJob(f"{self.where} {said}; compile a module that takes one batch of images, with this torch")
        fixed = {int(place): int(size) for place, size in _FIXED.findall(self.source)}
        rank = max([int(place) for place in _DIMENSION.findall(self.source)], default=3) + 1
        dtype = _DTYPE.search(self.source)
        name = dtype[1] if dtype else "Float"
        return ExportedInput(tuple(fixed.get(n) for n in range(rank)), f"torch.{_DTYPES.get(name, name)}", self.where)

    def check_machine(self) -> None:
        """Raises InvalidJob where it was compiled for another platform, processor or GPU."""
        import torch

        here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine()}
        if self.metadata.get("AOTI_DEVICE_KEY") == "cuda" and torch.version.hip is None and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            here["AOTI_COMPUTE_CAPABILITY"] = str(major * 10 + minor)
        wrong = [f"{self.metadata[key]}, not {value}" for key, value in here.items() if self._differs(key, value)]
        wrong += [f"{name}, which this processor lacks" for name in self._lacking()]
        if wrong:
            raise InvalidJob(f"{self.where} was compiled for {'; '.join(wrong)}; compile it on a machine like this one")

    def _differs(self, key: str, value: str) -> bool:
        return self.metadata.get(key, value) not in {"", value}

    def _lacking(self) -> list[str]:
        import torch

        if self.metadata.get("AOTI_DEVICE_KEY", "cpu") != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
            return []
        there = torch.cpu.get_capabilities()
        names = self.metadata.get("AOTI_CPU_ISA", "").split()
        return [name for name in names if not there.get(_INSTRUCTIONS.get(name, ""), True)]


def _read(data: bytes, where: str) -> _Package:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            names = archive.namelist()
            described = [json.loads(archive.read(name)) for name in names if name.endswith("wrapper_metadata.json")]
            sources = [archive.read(name).decode() for name in names if name.endswith(".wrapper.cpp")]
    except (zipfile.BadZipFile, ValueError) as error:
        raise InvalidJob(f"{where} is no whole AOTInductor package ({error}); copy it there again") from error
    models = sorted({found[1] for found in map(_FOLDER.search, names) if found})
    if len(models) != 1:
        raise InvalidJob(f"{where} holds {len(models)} models ({', '.join(models)}); package one alone")
    return _Package(models[0], described[0] if described else {}, "".join(sources), where)


def _runnable(data: bytes, package: _Package, device: str) -> nn.Module:
    import torch

    image = package.input()
    # For the CPU it is loaded now, and the bytes are let go; for a GPU once it is known for which.
    run = _loaded(data, package, -1) if device == "cpu" else None
    load = None if device == "cpu" else partial(_loaded, data, package)

    class Package(torch.nn.Module):
        """Runs the package, which is loaded onto the device it is moved to."""

        def __init__(self) -> None:
            super().__init__()
            self._device, self._run = torch.device("cpu"), run

        def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Package:  # noqa: ARG002
            there = fn(torch.empty(0, device=self._device)).device
            if load is not None and there.type == device and there != self._device:
                self._device, self._run = there, load(there.index)
            return self

        def forward(self, pixels: torch.Tensor) -> Any:
            image.check(pixels)
            if self._run is None or pixels.device.type != device:
                raise InvalidJob(f"{package.where} was compiled for {device} and cannot run on {pixels.device}")
            return self._run(pixels.contiguous())

    return Package().eval()


def _loaded(data: bytes, package: _Package, index: int) -> Callable[[torch.Tensor], Any]:
    from torch._inductor.package.package import load_package

    with tempfile.NamedTemporaryFile(suffix=".pt2") as spool:  # AOTInductor reads files only
        spool.write(data)
        spool.flush()
        try:
            return load_package(spool.name, package.model, device_index=index)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            raise InvalidJob(
                f"{package.where} is an AOTInductor package that this torch does not load ({reason}); compile it anew"
            ) from error
