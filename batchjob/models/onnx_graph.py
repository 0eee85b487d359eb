"""ONNX files: parse the graph, list the files that hold its weights, and explain why onnxruntime cannot open it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxModelFiles", "explain_open_error", "find_output_operation", "list_external_files", "parse_onnx"]

_MOVING_OPERATORS = {"Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


@dataclass(frozen=True)
class OnnxModelFiles:
    """Contents of the files of an ONNX model.

    Attributes:
        data: Content of the `.onnx` file.
        external: Contents of the files beside it with its external data, by the names that the graph gives them.
        where: Job key and file, the start of error messages.
    """

    data: bytes
    external: Mapping[str, bytes]
    where: str


def parse_onnx(data: bytes, where: str) -> onnx.ModelProto:
    """Parse an ONNX file.

    Raises:
        InvalidJob: It is not an ONNX file, or it is incomplete.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise InvalidJob(f"{where} is no whole ONNX file ({error}); copy it there again") from error
    if not model.graph.node:
        raise InvalidJob(f"{where} is no ONNX file, or holds an empty graph; export the model again")
    return model


def find_output_operation(model: onnx.ModelProto, output: str) -> str | None:
    """Find the operator that makes the values of an output, `Softmax` or `Gemm`; None if an input or constant does.

    Operators that only move or convert values do not count.
    """
    nodes = {name: node for node in model.graph.node for name in node.output}
    while (node := nodes.get(output)) is not None and node.op_type in _MOVING_OPERATORS and node.input:
        output = node.input[0]
    return None if node is None else node.op_type


def list_external_files(model: onnx.ModelProto, where: str) -> list[str]:
    """List the names of the files beside the model that hold its external data, sorted.

    Raises:
        InvalidJob: One of them is in another folder.
    """
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    names = {ExternalDataInfo(tensor).location for tensor in _iterate_tensors(model) if uses_external_data(tensor)}
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise InvalidJob(
                f"{where} says its weights lie in {name}, which is not beside it; "
                "save it again with onnx.save(model, path, save_as_external_data=True, location='model.onnx.data')"
            )
    return sorted(names)


def explain_open_error(error: Exception, version: str) -> str:
    """Explain an exception of onnxruntime for a graph that it does not open, and suggest what to do.

    Args:
        error: Exception raised by `onnxruntime.InferenceSession`.
        version: Version of onnxruntime.
    """
    text = " ".join(str(error).split())
    opset = re.search(r"Opset (\d+) is under development.*? is till opset (\d+)", text)
    if opset:
        return (
            f"has opset {opset[1]}, and onnxruntime {version} knows them up to {opset[2]}; pip install -U onnxruntime, "
            f"or export it again with opset_version={opset[2]}"
        )
    ir_version = re.search(r"IR version: (\d+), max supported IR version: (\d+)", text)
    if ir_version:
        return (
            f"is written in IR version {ir_version[1]}, and onnxruntime {version} reads them up to {ir_version[2]}; "
            f"pip install -U onnxruntime, or save it again with model.ir_version = {ir_version[2]}"
        )
    operator = re.search(r"(\S+?)(?:\(-?\d+\))? is not a registered function/op|No Op registered for (\S+)", text)
    if operator:
        return (
            f"uses the operator {operator[1] or operator[2]}, which onnxruntime {version} does not have; "
            "libraries of operators are code and are not loaded: export the model with standard operators"
        )
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return f"cannot be opened by onnxruntime {version} ({reason[:300]}); export it again, or look at model.providers"


def _iterate_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _iterate_graph_tensors(model.graph)
    for function in model.functions:
        yield from _iterate_node_tensors(function.node)


def _iterate_graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _iterate_node_tensors(graph.node)


def _iterate_node_tensors(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs):
                yield from _iterate_graph_tensors(graph)
