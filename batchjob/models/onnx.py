"""`type: onnx`: an ONNX graph, run by onnxruntime."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.models.file_format import require_format
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.onnx_graph import OnnxModelFiles, find_output_operation, list_external_files, parse_onnx
from batchjob.models.onnx_session import ExecutionProvider, OnnxRunner, find_image_input, select_output_names
from batchjob.models.output_selection import OutputSelection
from batchjob.models.trusted_file import WeightsFile, verify_digest
from batchjob.models.weights import check_file_exists, read_file
from batchjob.settings import Uri
from batchjob.system import require_packages

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["OnnxModel"]

_MAX_GRAPH_BYTES = 64 << 20


class OnnxModel(WeightsFile, OutputSelection):
    """Graph that onnxruntime runs. It is data, not code: libraries of custom operators are not loaded.

    Attributes:
        weights: Local path or URI of the `.onnx` file. Its external data, if any, is beside it; `sha256` is then that
            of all these files one after the other (`cat model.onnx model.onnx.data | sha256sum`).
        providers: Execution providers, the first choice first: cuda, tensorrt, openvino, cpu. One that onnxruntime does
            not have is an error. `auto` takes CUDA if the job and onnxruntime have it, else the CPU.
        input: Name of the input that gets the images; null if there is only one.
        constants: Values of the other inputs by name, as numbers or nested lists. If the first dimension of such an
            input is free, the value is that of one image.
    """

    type: Literal["onnx"] = "onnx"
    weights: Uri
    providers: Literal["auto"] | Annotated[tuple[ExecutionProvider, ...], Field(min_length=1)] = "auto"
    input: str | None = None
    constants: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name in the column `model_id`, before the digest."""
        return self.weights.rsplit("/", 1)[-1]

    def check(self, reader: Reader, folder: Path) -> None:  # noqa: ARG002 - all formats share this signature
        """Check that onnx and onnxruntime are installed and that the file exists.

        Raises:
            InvalidJob: One of these is not so.
            Unavailable: The store cannot be reached.
        """
        require_packages("onnx", "onnxruntime", model_type="onnx", extra="onnx")
        check_file_exists(reader, self.weights, "model.weights")

    def list_files(self, reader: Reader, folder: Path) -> list[str]:  # noqa: ARG002
        """Return the URIs of the graph and of its external data."""
        # A graph with external data is small; a larger file holds its weights itself, and is not read for this. A
        # complete output is looked at where onnx may not be installed: its record names the external data.
        if reader.stat(self.weights).size > _MAX_GRAPH_BYTES or find_spec("onnx") is None:
            return [self.weights]
        data, where = read_file(reader, self.weights, "model.weights"), f"model.weights: {self.weights}"
        parent = self.weights.rpartition("/")[0]
        return [self.weights, *(f"{parent}/{name}" for name in list_external_files(parse_onnx(data, where), where))]

    def load(self, reader: Reader, folder: Path) -> LoadedModel:  # noqa: ARG002
        """Open the graph. It brings neither preprocessing nor labels.

        Raises:
            InvalidJob: A package or a file does not exist, the file has another digest, this onnxruntime cannot run the
                graph, an execution provider is absent, or the graph does not take images.
            Unavailable: The store cannot be reached.
        """
        require_packages("onnx", "onnxruntime", model_type="onnx", extra="onnx")
        files, digest = self._read_files(reader)
        runner = OnnxRunner(files, self.providers)
        session = runner.session("cpu")
        image_input = find_image_input(session, self.input, self.constants, files.where)
        outputs = select_output_names(session, self.output, files.where)
        return LoadedModel(
            runner.build_module(image_input, outputs),
            preprocess=None,
            labels=None,
            digest=digest,
            eager=False,
            devices=runner.devices,
            batch_size=image_input.shape[0],
            output_operation=find_output_operation(parse_onnx(files.data, files.where), outputs[0]),
        )

    def _read_files(self, reader: Reader) -> tuple[OnnxModelFiles, str]:
        data = read_file(reader, self.weights, "model.weights")
        where = f"model.weights: {self.weights}"
        require_format(data, where, "onnx", "unknown", expected="an ONNX model")
        folder = self.weights.rpartition("/")[0]
        external = {
            name: read_file(reader, f"{folder}/{name}", f"{where} keeps its weights beside it")
            for name in list_external_files(parse_onnx(data, where), where)
        }
        files = OnnxModelFiles(data, external, where)
        if not external:
            return files, verify_digest(data, self.weights, self.sha256)
        sha256 = hashlib.sha256(data)
        for content in external.values():
            sha256.update(content)
        digest = sha256.hexdigest()
        if self.sha256 is not None and self.sha256.lower() != digest:
            names = " ".join([self.title, *external])
            raise InvalidJob(
                f"{where} with its data has the sha256 {digest} (of {names}, one after the other), but model.sha256 is "
                f"{self.sha256}; it is not the model you meant, or model.sha256 must be corrected"
            )
        return files, digest
