"""`type: onnx`: an ONNX graph, run by onnxruntime."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.models.file_format import expect
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.onnx_graph import Graph, data_files, parse_graph
from batchjob.models.onnx_session import Provider, Runner, input_of, outputs_of
from batchjob.models.output_selection import SelectedOutput
from batchjob.models.trusted_file import WeightsFile, verified
from batchjob.models.weights import read_file, stat_file
from batchjob.settings import Uri
from batchjob.system import require

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["OnnxModel"]


class OnnxModel(WeightsFile, SelectedOutput):
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
    providers: Literal["auto"] | Annotated[tuple[Provider, ...], Field(min_length=1)] = "auto"
    input: str | None = None
    constants: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """What `model_id` calls it, before the digest."""
        return self.weights.rsplit("/", 1)[-1]

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all formats
        """Looks whether onnxruntime and the file are there. Raises InvalidJob, Unavailable."""
        require("onnx", "onnx", "onnx", "onnxruntime")
        stat_file(reader, self.weights, "model.weights")

    def load(self, reader: Reader, base: Path) -> LoadedModel:  # noqa: ARG002
        """Opens the graph; no preprocessing and no labels of its own.

        Raises:
            InvalidJob: no such file or package, a graph that this onnxruntime cannot run or that does not take images,
                another digest, or a provider that is not there.
            Unavailable: the store cannot be reached.
        """
        require("onnx", "onnx", "onnx", "onnxruntime")
        graph, digest = self._graph(reader)
        runner = Runner(graph, self.providers)
        session = runner.session("cpu")
        where = f"model.weights: {self.weights}"
        image = input_of(session, self.input, self.constants, where)
        outputs = outputs_of(session, self.output, where)
        module = runner.module(image, outputs)
        return LoadedModel(module, None, None, digest, eager=False, devices=runner.devices, batch_size=image.shape[0])

    def _graph(self, reader: Reader) -> tuple[Graph, str]:
        data = read_file(reader, self.weights, "model.weights")
        where = f"model.weights: {self.weights}"
        expect(data, where, "onnx", "unknown", wish="an ONNX model")
        external: dict[str, bytes] = {}
        folder = self.weights.rpartition("/")[0]
        for location in data_files(parse_graph(data, where), where):
            external[location] = read_file(reader, f"{folder}/{location}", f"{where} keeps its weights beside it")
        if not external:
            return Graph(data, external, where), verified(data, self.weights, self.sha256)
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
        return Graph(data, external, where), found
