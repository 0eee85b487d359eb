"""`type: torchscript`: a traced or scripted module. torch has deprecated these; `type: exported` is what follows."""

from __future__ import annotations

import logging
import warnings
from io import BytesIO
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from batchjob.errors import InvalidJob
from batchjob.models.architecture import isolated_torch_state
from batchjob.models.file_format import FileFormat
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.output_selection import select_output
from batchjob.models.trusted_file import TrustedFileModel

if TYPE_CHECKING:
    from pathlib import Path

    from batchjob.storage.reader import Reader

__all__ = ["TorchScriptModel"]

_log = logging.getLogger(__name__)
_TRAINS = {"aten::dropout": 2, "aten::batch_norm": 5}  # which argument says so


class TorchScriptModel(TrustedFileModel):
    """A module that `torch.jit.trace` or `torch.jit.script` made and `torch.jit.save` wrote."""

    type: Literal["torchscript"] = "torchscript"
    format_name: ClassVar[str] = "a TorchScript archive"
    accepted_formats: ClassVar[tuple[FileFormat, ...]] = ("torchscript",)

    def load(self, reader: Reader, base: Path) -> LoadedModel:  # noqa: ARG002 - one face for all formats
        """Loads the archive; no preprocessing and no labels of its own.

        It moves to any device, but is run as it was saved: neither under autocast nor compiled.

        Raises:
            InvalidJob: not there, not trusted, another digest, no such archive, or traced in training mode.
            Unavailable: the store cannot be reached.
        """
        data, digest, _ = self.read_trusted(reader)
        _log.warning("%s is TorchScript, which torch has deprecated; torch.export replaces it", self.weights)
        with isolated_torch_state():
            module = self._loaded(data).eval()
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        self._check_mode(module)
        return LoadedModel(select_output(module, self.output), None, None, digest, eager=False)

    def _loaded(self, data: bytes) -> Any:
        import torch

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"`torch\.jit\.load` is", FutureWarning)
                return torch.jit.load(BytesIO(data), map_location="cpu")
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            raise InvalidJob(
                f"{self.where} is a TorchScript archive that this torch does not load ({reason}); "
                "copy it there again, or export the model anew"
            ) from error

    def _check_mode(self, module: Any) -> None:
        """A trace keeps the mode it was made in, whatever is said to it now."""
        graph = module.inlined_graph
        for name, place in _TRAINS.items():
            for node in graph.findAllNodes(name, recurse=True):
                if list(node.inputs())[place].toIValue() is True:
                    raise InvalidJob(
                        f"{self.where} was traced in training mode ({name.removeprefix('aten::')} is at work); "
                        "call model.eval() and trace it again"
                    )
