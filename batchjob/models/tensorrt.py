"""`type: tensorrt`: an engine that torch-tensorrt has compiled, for the GPU it was compiled on."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.models.file_format import FileFormat
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.output_selection import select_output
from batchjob.models.trusted_file import TrustedFileModel
from batchjob.system import require_packages

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["TensorrtModel"]


class TensorrtModel(TrustedFileModel):
    """A model compiled by torch-tensorrt and saved by `torch_tensorrt.save`. It runs on CUDA only.

    Its precision stands in its graph: TensorRT 11 has no flags for it.

    Attributes:
        weights: the `.ep`, `.pt2` or `.ts` file. It is code: `trust: true` and its `sha256` must be given.
        batch_size: the number of images it was compiled for; none where that is free.
    """

    type: Literal["tensorrt"] = "tensorrt"
    batch_size: int | None = Field(default=None, ge=1)
    format_name: ClassVar[str] = "an engine of torch-tensorrt"
    accepted_formats: ClassVar[tuple[FileFormat, ...]] = ("exported", "torchscript", "unknown")

    def check(self, reader: Reader, base: Path) -> None:
        """Looks without torch whether torch-tensorrt and the file are there. Raises InvalidJob, Unavailable."""
        _require_package()
        super().check(reader, base)

    def load(self, reader: Reader, base: Path) -> LoadedModel:  # noqa: ARG002
        """Loads the engine onto the GPU; no preprocessing and no labels of its own.

        Raises:
            InvalidJob: no GPU, no torch-tensorrt, no such file, no trust in it, another digest, or an engine for
                another GPU or version.
            Unavailable: the store cannot be reached.
        """
        import torch

        data, digest, _ = self.read_trusted(reader)
        if not torch.cuda.is_available():
            raise InvalidJob(
                "model.type: tensorrt needs an NVIDIA GPU, and there is none; run it where one is, or give the model "
                "before it was compiled (model.type: exported or checkpoint)"
            )
        _require_package()
        module = self._loaded(data)
        return LoadedModel(
            select_output(module, self.output),
            None,
            None,
            digest,
            eager=False,
            devices=("cuda",),
            batch_size=self.batch_size,
        )

    def _loaded(self, data: bytes) -> Any:
        import torch_tensorrt

        suffix = PurePosixPath(self.weights).suffix
        with tempfile.NamedTemporaryFile(prefix="batchjob-", suffix=suffix) as spool, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which such a file may hold
            spool.write(data)
            spool.flush()
            try:
                loaded = torch_tensorrt.load(spool.name)
            except Exception as error:  # wrong GPU, wrong version, no engine at all
                reason = " ".join(str(error).split())[:300]
                raise InvalidJob(
                    f"model.weights: {self.weights} cannot be loaded by torch-tensorrt {torch_tensorrt.__version__} "
                    f"({reason}); compile it again with this version, on this kind of GPU"
                ) from error
        return loaded.module() if hasattr(loaded, "module") else loaded


def _require_package() -> None:
    try:
        require_packages("tensorrt", "tensorrt", "torch_tensorrt")
    except InvalidJob as error:
        raise InvalidJob(
            "model.type: tensorrt needs torch-tensorrt, which fits one version of torch each; "
            "pip install torch-tensorrt on the machine with the GPU"
        ) from error
