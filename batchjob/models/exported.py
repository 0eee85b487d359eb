"""`type: exported`: a `.pt2` file, a program of `torch.export` or a package that AOTInductor compiled from one."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from batchjob.errors import InvalidJob
from batchjob.models.aot_inductor import open_aoti_package
from batchjob.models.exported_input import ExportedInput
from batchjob.models.file_format import FileFormat
from batchjob.models.loaded_model import LoadedModel, isolated_torch_state
from batchjob.models.output_selection import select_output
from batchjob.models.trusted_file import TrustedFileModel

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from batchjob.storage.reader import Reader

__all__ = ["ExportedModel"]

# Operators that behave differently in training mode, with the index of the argument that switches it on.
_TRAINING_ARGUMENTS = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}


class ExportedModel(TrustedFileModel):
    """Program saved by `torch.export.save`, or package made by `torch._inductor.aoti_compile_and_package`."""

    type: Literal["exported"] = "exported"
    format_name: ClassVar[str] = "a program of torch.export or a package of AOTInductor (.pt2)"
    accepted_formats: ClassVar[tuple[FileFormat, ...]] = ("exported", "aot_inductor")

    def load(self, reader: Reader, folder: Path) -> LoadedModel:  # noqa: ARG002 - all formats share this signature
        """Load the program or the package. It brings neither preprocessing nor labels.

        A program runs on any device, a package on the one it was compiled for. Both run as they were saved: without
        autocast, and not compiled again.

        Raises:
            InvalidJob: The file does not exist, is not trusted, has another digest, was saved by an incompatible torch,
                exported in training mode or compiled for another machine, or its input is not one batch of images.
            Unavailable: The store cannot be reached.
        """
        data, digest, file_format = self.read_trusted(reader)
        devices: tuple[str, ...] | None = None
        with isolated_torch_state():
            if file_format == "aot_inductor":
                module, image_input, devices = open_aoti_package(data, self.where)
            else:
                module, image_input = self._open_program(data)
        return LoadedModel(
            select_output(module, self.output),
            preprocess=None,
            labels=None,
            digest=digest,
            eager=False,
            devices=devices,
            batch_size=image_input.batch_size,
        )

    def _open_program(self, data: bytes) -> tuple[nn.Module, ExportedInput]:
        import torch

        try:
            program = torch.export.load(BytesIO(data))
        except MemoryError:
            raise
        except Exception as error:  # A broken file may raise nearly any exception.
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            saved_on_gpu = "CUDA" in reason and not torch.cuda.is_available()
            advice = (
                "save it on the CPU" if saved_on_gpu else "take the version it was saved with, or export the model anew"
            )
            raise InvalidJob(
                f"{self.where} is a program of torch.export that this torch does not load ({type(error).__name__}: "
                f"{reason}); {advice}"
            ) from error
        image_input, keyword = _find_image_input(program, self.where)
        _check_eval_mode(program, self.where)
        return _make_module(program, image_input, keyword), image_input


def _find_image_input(program: ExportedProgram, where: str) -> tuple[ExportedInput, str | None]:
    """Find the only input of a program, and the keyword to pass it by; None if it is positional."""
    import torch

    names = program.graph_signature.user_inputs
    example = (
        next((node.meta.get("val") for node in program.graph.nodes if node.name == names[0]), None) if names else None
    )
    if len(names) != 1 or not isinstance(example, torch.Tensor):
        raise InvalidJob(
            f"{where} takes {len(names)} inputs ({', '.join(map(str, names))}), not one batch of images; "
            "export a module that takes only that"
        )
    sizes: list[Any] = list(example.shape)  # A free dimension is a SymInt.
    shape = tuple(size if isinstance(size, int) else None for size in sizes)
    # The input structure has two children: a tuple of positional arguments, and a dict whose context is its keys.
    structure = program.call_spec.in_spec
    keywords = [] if structure.child(0).num_children else structure.child(1).context
    return ExportedInput(shape, str(example.dtype), where), str(keywords[0]) if keywords else None


def _check_eval_mode(program: ExportedProgram, where: str) -> None:
    """Refuse a program that was exported in training mode: it keeps that mode, and `eval()` has no effect on it."""
    for node in program.graph.nodes:
        index = _TRAINING_ARGUMENTS.get(str(node.target))
        if index is not None and len(node.args) > index and node.args[index] is True:
            raise InvalidJob(
                f"{where} was exported in training mode ({str(node.target).split('.')[1]} is at work); "
                "call model.eval() and export it again"
            )


def _make_module(program: ExportedProgram, image_input: ExportedInput, keyword: str | None) -> nn.Module:
    import torch
    from torch.export.passes import move_to_device_pass

    class ProgramModule(torch.nn.Module):
        """Module that runs the program. Moving it also moves the devices that are constants in the program's graph."""

        def __init__(self) -> None:
            super().__init__()
            self._program, self._device = program, torch.device("cpu")
            self._move(self._device)

        def _move(self, device: torch.device) -> None:
            self._program, self._device = move_to_device_pass(self._program, str(device)), device
            self.graph = self._program.module().requires_grad_(False)

        # `module.to(device)` calls this with a function that moves one tensor; an empty tensor tells where to.
        def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ProgramModule:  # noqa: ARG002
            device = fn(torch.empty(0, device=self._device)).device
            if device != self._device:
                self._move(device)
            return self

        # The module of a program refuses train() and eval(), so its flags are cleared one by one.
        def train(self, mode: bool = True) -> ProgramModule:  # noqa: ARG002
            for module in self.modules():
                module.training = False
            return self

        def forward(self, pixels: torch.Tensor) -> Any:
            image_input.check(pixels)
            return self.graph(pixels) if keyword is None else self.graph(**{keyword: pixels})

    return ProgramModule().eval()
