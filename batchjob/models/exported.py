"""`type: exported`: a program of `torch.export`, or a package that AOTInductor compiled from one, both `.pt2`."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from batchjob.errors import InvalidJob
from batchjob.models.aot_inductor import open_aoti_package
from batchjob.models.architecture import isolated_torch_state
from batchjob.models.exported_input import ExportedInput
from batchjob.models.file_format import FileFormat
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.output_selection import select_output
from batchjob.models.trusted_file import TrustedFileModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from batchjob.storage.reader import Reader

__all__ = ["ExportedModel"]

_TRAINS = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}  # which argument says so


class ExportedModel(TrustedFileModel):
    """A program that `torch.export.save` wrote, or a package of `torch._inductor.aoti_compile_and_package`."""

    type: Literal["exported"] = "exported"
    format_name: ClassVar[str] = "a program of torch.export or a package of AOTInductor (.pt2)"
    accepted_formats: ClassVar[tuple[FileFormat, ...]] = ("exported", "aoti")

    def load(self, reader: Reader, base: Path) -> LoadedModel:  # noqa: ARG002 - one face for all formats
        """Loads the program or the package; no preprocessing and no labels of its own.

        A program moves to any device, a package runs on the one it was compiled for. Both are run as they were saved:
        neither under autocast nor compiled again.

        Raises:
            InvalidJob: not there, not trusted, another digest, of another torch, exported in training mode, compiled
                for another machine, or with inputs that are not one batch of images.
            Unavailable: the store cannot be reached.
        """
        data, digest, kind = self.read_trusted(reader)
        devices: tuple[str, ...] | None = None
        with isolated_torch_state():
            if kind == "aoti":
                module, image, devices = open_aoti_package(data, self.where)
            else:
                module, image = self._opened(data)
        return LoadedModel(
            select_output(module, self.output),
            None,
            None,
            digest,
            eager=False,
            devices=devices,
            batch_size=image.batch_size,
        )

    def _opened(self, data: bytes) -> tuple[nn.Module, ExportedInput]:
        import torch

        try:
            program = torch.export.load(BytesIO(data))
        except MemoryError:
            raise
        except Exception as error:  # broken files end in nearly every exception there is
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            away = "CUDA" in reason and not torch.cuda.is_available()
            advice = "save it on the CPU" if away else "take the version it was saved with, or export the model anew"
            raise InvalidJob(
                f"{self.where} is a program of torch.export that this torch does not load ({type(error).__name__}: "
                f"{reason}); {advice}"
            ) from error
        image, keyword = _input_of(program, self.where)
        _check_mode(program, self.where)
        return _runnable(program, image, keyword), image


def _input_of(program: ExportedProgram, where: str) -> tuple[ExportedInput, str | None]:
    """What it takes, and the keyword it takes it by, if any."""
    import torch

    names = program.graph_signature.user_inputs
    value = (
        next((node.meta.get("val") for node in program.graph.nodes if node.name == names[0]), None) if names else None
    )
    if len(names) != 1 or not isinstance(value, torch.Tensor):
        raise InvalidJob(
            f"{where} takes {len(names)} inputs ({', '.join(map(str, names))}), not one batch of images; "
            "export a module that takes only that"
        )
    sizes: list[Any] = list(value.shape)  # a free one is a SymInt
    image = ExportedInput(tuple(size if isinstance(size, int) else None for size in sizes), str(value.dtype), where)
    given = program.call_spec.in_spec
    keywords = [] if given.child(0).num_children else given.child(1).context
    return image, str(keywords[0]) if keywords else None


def _check_mode(program: ExportedProgram, where: str) -> None:
    """An exported program keeps the mode it was made in."""
    for node in program.graph.nodes:
        place = _TRAINS.get(str(node.target))
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise InvalidJob(
                f"{where} was exported in training mode ({str(node.target).split('.')[1]} is at work); "
                "call model.eval() and export it again"
            )


def _runnable(program: ExportedProgram, image: ExportedInput, keyword: str | None) -> nn.Module:
    import torch
    from torch.export.passes import move_to_device_pass

    class Program(torch.nn.Module):
        """Runs the program. On moving it, the devices that its graph names are moved too."""

        def __init__(self) -> None:
            super().__init__()
            self._program, self._device = program, torch.device("cpu")
            self._move(self._device)

        def _move(self, device: torch.device) -> None:
            self._program, self._device = move_to_device_pass(self._program, str(device)), device
            self.graph = self._program.module().requires_grad_(False)

        def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Program:  # noqa: ARG002
            device = fn(torch.empty(0, device=self._device)).device
            if device != self._device:
                self._move(device)
            return self

        def train(self, mode: bool = True) -> Program:  # noqa: ARG002
            for module in self.modules():
                module.training = False
            return self

        def forward(self, pixels: torch.Tensor) -> Any:
            image.check(pixels)
            return self.graph(pixels) if keyword is None else self.graph(**{keyword: pixels})

    return Program().eval()
