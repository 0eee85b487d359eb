"""`type: onnx`: an ONNX graph, run by onnxruntime."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.models.file_format import require_format
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.onnx_graph import OnnxModelFiles, external_data_files, parse_onnx
from batchjob.models.onnx_session import ExecutionProvider, OnnxRunner, find_image_input, select_output_names
from batchjob.models.output_selection import OutputSelection
from batchjob.models.trusted_file import WeightsFile, verify_digest
from batchjob.models.weights import check_file_exists, read_file
from batchjob.settings import Uri
from batchjob.system import require_packages

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["OnnxModel"]


class OnnxModel(WeightsFile, OutputSelection):
    """A graph that onnxruntime runs. It is data: neither it nor libraries of operators bring code.

    Attributes:
        weights: the `.onnx` file. Its external data, if it has some, lies beside it; `sha256` is then that of all
            these files one after the other (`cat model.onnx model.onnx.data | sha256sum`).
        providers: `auto` takes CUDA where job and onnxruntime have it, else the CPU; or those to use, the first
            choice first: cuda, tensorrt, openvino, cpu. One that is asked for and absent is an error.
        input: which of several inputs gets the images.
        constants: values of the other inputs, as numbers or nested lists; where the first dimension of such an input
            is free, the value is that of one image.
    """

    type: Literal["onnx"] = "onnx"
    weights: Uri
    providers: Literal["auto"] | Annotated[tuple[ExecutionProvider, ...], Field(min_length=1)] = "auto"
    input: str | None = None
    constants: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """What `model_id` calls it, before the digest."""
        return self.weights.rsplit("/", 1)[-1]

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all formats
        """Looks whether onnxruntime and the file are there. Raises InvalidJob, Unavailable."""
        require_packages("onnx", "onnx", "onnx", "onnxruntime")
        check_file_exists(reader, self.weights, "model.weights")

    def load(self, reader: Reader, base: Path) -> LoadedModel:  # noqa: ARG002
        """Opens the graph; no preprocessing and no labels of its own.

        Raises:
            InvalidJob: no such file or package, a graph that this onnxruntime cannot run or that does not take images,
                another digest, or a provider that is not there.
            Unavailable: the store cannot be reached.
        """
        require_packages("onnx", "onnx", "onnx", "onnxruntime")
        graph, digest = self._graph(reader)
        runner = OnnxRunner(graph, self.providers)
        session = runner.session("cpu")
        where = f"model.weights: {self.weights}"
        image = find_image_input(session, self.input, self.constants, where)
        outputs = select_output_names(session, self.output, where)
        module = runner.build_module(image, outputs)
        return LoadedModel(module, None, None, digest, eager=False, devices=runner.devices, batch_size=image.shape[0])

    def _graph(self, reader: Reader) -> tuple[OnnxModelFiles, str]:
        data = read_file(reader, self.weights, "model.weights")
        where = f"model.weights: {self.weights}"
        require_format(data, where, "onnx", "unknown", expected="an ONNX model")
        external: dict[str, bytes] = {}
        folder = self.weights.rpartition("/")[0]
        for location in external_data_files(parse_onnx(data, where), where):
            external[location] = read_file(reader, f"{folder}/{location}", f"{where} keeps its weights beside it")
        if not external:
            return OnnxModelFiles(data, external, where), verify_digest(data, self.weights, self.sha256)
        digest = hashlib.sha256(data)
        for content in external.values():
            digest.update(content)
        found = digest.hexdigest()
        if self.sha256 is not None and self.sha256.lower() != found:
            files = " ".join([self.title, *external])
            raise InvalidJob(
                f"{where} with its data has the sha256 {found} (of {files}, one after the other), but model.sha256 is "
                f"{self.sha256}; it is not the model you meant, or model.sha256 must be corrected"
            )
        return OnnxModelFiles(data, external, where), found
