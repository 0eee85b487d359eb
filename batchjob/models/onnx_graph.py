"""ONNX files: bytes to a graph, the files its weights lie in, and what onnxruntime says of one it cannot open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxModelFiles", "explain_open_error", "external_data_files", "parse_onnx"]


@dataclass(frozen=True)
class OnnxModelFiles:
    """An ONNX model as it was read.

    Attributes:
        data: the `.onnx` file.
        external: the files beside it that hold its weights, by the names it gives them.
        where: `model.weights: URI`, for sentences.
    """

    data: bytes
    external: Mapping[str, bytes]
    where: str


def parse_onnx(data: bytes, where: str) -> onnx.ModelProto:
    """The parsed file. Raises InvalidJob where it is none of ONNX."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise InvalidJob(f"{where} is no whole ONNX file ({error}); copy it there again") from error
    if not model.graph.node:
        raise InvalidJob(f"{where} is no ONNX file, or holds an empty graph; export the model again")
    return model


def external_data_files(model: onnx.ModelProto, where: str) -> list[str]:
    """Names of the files that hold weights outside the model, sorted. Raises InvalidJob where one lies elsewhere."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    found = {ExternalDataInfo(tensor).location for tensor in _tensors(model) if uses_external_data(tensor)}
    for location in found:
        path = PurePosixPath(location)
        if path.is_absolute() or ".." in path.parts:
            raise InvalidJob(
                f"{where} says its weights lie in {location}, which is not beside it; "
                "save it again with onnx.save(model, path, save_as_external_data=True, location='model.onnx.data')"
            )
    return sorted(found)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)


def explain_open_error(error: Exception, version: str) -> str:
    """What to say of a graph that onnxruntime of this version does not open."""
    text = " ".join(str(error).split())
    opset = re.search(r"Opset (\d+) is under development.*? is till opset (\d+)", text)
    if opset:
        return (
            f"has opset {opset[1]}, and onnxruntime {version} knows them up to {opset[2]}; pip install -U onnxruntime, "
            f"or export it again with opset_version={opset[2]}"
        )
    ir = re.search(r"IR version: (\d+), max supported IR version: (\d+)", text)
    if ir:
        return (
            f"is written in IR version {ir[1]}, and onnxruntime {version} reads them up to {ir[2]}; "
            f"pip install -U onnxruntime, or save it again with model.ir_version = {ir[2]}"
        )
    operator = re.search(r"(\S+?)(?:\(-?\d+\))? is not a registered function/op|No Op registered for (\S+)", text)
    if operator:
        return (
            f"uses the operator {operator[1] or operator[2]}, which onnxruntime {version} does not have; "
            "libraries of operators are code and are not loaded: export the model with standard operators"
        )
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return f"cannot be opened by onnxruntime {version} ({reason[:300]}); export it again, or look at model.providers"
