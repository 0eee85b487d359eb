"""`type: tensorrt`: an engine compiled by torch-tensorrt, which runs on the kind of GPU it was compiled on."""

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
    """Model compiled by torch-tensorrt and saved by `torch_tensorrt.save`. It runs only on CUDA.

    Its precision is fixed in its graph: TensorRT 11 has no flags for it.

    Attributes:
        weights: Local path or URI of the `.ep`, `.pt2` or `.ts` file. It is code: `trust: true` and its `sha256` are
            required.
        batch_size: Batch size the engine was compiled for, in images; null if it accepts any.
    """

    type: Literal["tensorrt"] = "tensorrt"
    batch_size: int | None = Field(default=None, ge=1)
    format_name: ClassVar[str] = "an engine of torch-tensorrt"
    accepted_formats: ClassVar[tuple[FileFormat, ...]] = ("exported", "torchscript", "unknown")

    def check(self, reader: Reader, folder: Path) -> None:
        """Check, without torch, that torch-tensorrt is installed and that the file exists and is trusted.

        Raises:
            InvalidJob: One of these is not so.
            Unavailable: The store cannot be reached.
        """
        _require_torch_tensorrt()
        super().check(reader, folder)

    def load(self, reader: Reader, folder: Path) -> LoadedModel:  # noqa: ARG002
        """Load the engine onto the GPU. It brings neither preprocessing nor labels.

        Raises:
            InvalidJob: There is no GPU or no torch-tensorrt; the file does not exist, is not trusted, has another
                digest, or holds an engine for another GPU or another version.
            Unavailable: The store cannot be reached.
        """
        import torch

        data, digest, _ = self.read_trusted(reader)
        if not torch.cuda.is_available():
            raise InvalidJob(
                "model.type: tensorrt needs an NVIDIA GPU, and there is none; run it where one is, or give the model "
                "before it was compiled (model.type: exported or checkpoint)"
            )
        _require_torch_tensorrt()
        module = self._load_engine(data)
        return LoadedModel(
            select_output(module, self.output),
            preprocess=None,
            labels=None,
            digest=digest,
            eager=False,
            devices=("cuda",),
            batch_size=self.batch_size,
        )

    def _load_engine(self, data: bytes) -> Any:
        import torch_tensorrt

        suffix = PurePosixPath(self.weights).suffix
        with tempfile.NamedTemporaryFile(prefix="batchjob-", suffix=suffix) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The file may hold TorchScript, of whose deprecation torch warns.
            file.write(data)
            file.flush()
            try:
                loaded = torch_tensorrt.load(file.name)
            except Exception as error:  # another GPU, another version, or no engine
                reason = " ".join(str(error).split())[:300]
                raise InvalidJob(
                    f"model.weights: {self.weights} cannot be loaded by torch-tensorrt {torch_tensorrt.__version__} "
                    f"({reason}); compile it again with this version, on this kind of GPU"
                ) from error
        return loaded.module() if hasattr(loaded, "module") else loaded


def _require_torch_tensorrt() -> None:
    try:
        require_packages("torch_tensorrt", model_type="tensorrt", extra="tensorrt")
    except InvalidJob as error:
        raise InvalidJob(
            "model.type: tensorrt needs torch-tensorrt, which fits one version of torch each; "
            "pip install torch-tensorrt on the machine with the GPU"
        ) from error
