"""`type: torchscript`: a traced or scripted module. torch has deprecated TorchScript; `type: exported` replaces it."""

from __future__ import annotations

import logging
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from batchjob.errors import InvalidJob
from batchjob.models.file_format import FileFormat
from batchjob.models.loaded_model import LoadedModel, isolated_torch_state
from batchjob.models.output_selection import select_output
from batchjob.models.trusted_file import TrustedFileModel

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["TorchScriptModel"]

_log = logging.getLogger(__name__)
# Operators that behave differently in training mode, with the index of the input that switches it on.
_TRAINING_INPUTS = {"aten::dropout": 2, "aten::batch_norm": 5}


class TorchScriptModel(TrustedFileModel):
    """Module made by `torch.jit.trace` or `torch.jit.script` and saved by `torch.jit.save`."""

    type: Literal["torchscript"] = "torchscript"
    format_name: ClassVar[str] = "a TorchScript archive"
    accepted_formats: ClassVar[tuple[FileFormat, ...]] = ("torchscript",)

    def load(self, reader: Reader, folder: Path) -> LoadedModel:  # noqa: ARG002 - all formats share this signature
        """Load the archive. It brings neither preprocessing nor labels.

        It runs on any device, but as it was saved: without autocast and not compiled.

        Raises:
            InvalidJob: The file does not exist, is not trusted, has another digest, is not such an archive, or was
                traced in training mode.
            Unavailable: The store cannot be reached.
        """
        data, digest, _ = self.read_trusted(reader)
        _log.warning("%s is TorchScript, which torch has deprecated; torch.export replaces it", self.weights)
        with isolated_torch_state():
            module = self._load_archive(data).eval()
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        self._check_eval_mode(module)
        return LoadedModel(select_output(module, self.output), preprocess=None, labels=None, digest=digest, eager=False)

    def _load_archive(self, data: bytes) -> Any:
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

    def _check_eval_mode(self, module: Any) -> None:
        """Refuse a module that was traced in training mode: it keeps that mode, and `eval()` has no effect on it."""
        graph = module.inlined_graph
        for operator, index in _TRAINING_INPUTS.items():
            for node in graph.findAllNodes(operator, recurse=True):
                if list(node.inputs())[index].toIValue() is True:
                    raise InvalidJob(
                        f"{self.where} was traced in training mode ({operator.removeprefix('aten::')} is at work); "
                        "call model.eval() and trace it again"
                    )
