"""An onnxruntime session as a module: tensors in and out without copies, on the device that the images are on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from batchjob.errors import InvalidJob
from batchjob.models.onnx_graph import OnnxModelFiles, explain_open_error

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

__all__ = ["ExecutionProvider", "OnnxImageInput", "OnnxRunner", "find_image_input", "select_output_names"]

ExecutionProvider = Literal["cuda", "tensorrt", "openvino", "cpu"]
_NAMES: dict[str, str] = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_PACKAGES = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "openvino": "onnxruntime-openvino"}
_ON_GPU = {"cuda", "tensorrt"}
_IMAGE_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
}
_TYPES = _IMAGE_TYPES | {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool"}


@dataclass(frozen=True)
class OnnxImageInput:
    """Where a graph takes its images, and what else it takes.

    Attributes:
        name: of the input.
        dtype: of its numbers: float32, float16, float64 or uint8.
        shape: `(n, c, h, w)`, None where it is free.
        constants: values of the other inputs.
        repeated: those of them that are repeated for each image.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    constants: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()


def find_image_input(session: Any, name: str | None, constants: Mapping[str, Any], where: str) -> OnnxImageInput:
    """The input that gets the images.

    Args:
        session: an onnxruntime session.
        name: as the job gives it, None where there is one alone.
        constants: values of all others.
        where: for the sentence.

    Raises:
        InvalidJob: there is no such input, others lack a value, or it takes no batch of images `[n, c, h, w]`.
    """
    inputs = {one.name: one for one in session.get_inputs()}
    listed = ", ".join(f"{one.name} {one.type} {_sizes(one.shape)}" for one in inputs.values())
    unknown = [key for key in constants if key not in inputs]
    if unknown:
        raise InvalidJob(f"model.constants: {where.partition(': ')[2]} has no input {unknown[0]}; it has {listed}")
    free = [key for key in inputs if key not in constants]
    if name is None:
        if len(free) != 1:
            raise InvalidJob(
                f"{where} has the inputs {listed}; write model.input: NAME for the one that gets the images, "
                "and values for the others under model.constants"
            )
        name = free[0]
    if name not in inputs:
        raise InvalidJob(f"model.input: {where.partition(': ')[2]} has no input {name!r}; it has {listed}")
    lacking = [key for key in free if key != name]
    if lacking:
        raise InvalidJob(f"model.constants: no value for the input {lacking[0]} of the model; it takes {listed}")
    values = {key: _constant(inputs[key], value) for key, value in constants.items()}
    repeated = frozenset(key for key in values if inputs[key].shape and not isinstance(inputs[key].shape[0], int))
    shape = _image_shape(inputs[name], where)
    return OnnxImageInput(name, _IMAGE_TYPES[inputs[name].type], shape, values, repeated)


def _image_shape(given: Any, where: str) -> tuple[int | None, ...]:
    said = f"{where}: its input {given.name} takes {given.type} {_sizes(given.shape)}"
    if given.type not in _IMAGE_TYPES:
        raise InvalidJob(f"{said}, which images are not; export it with a float32, float16 or uint8 input")
    shape = tuple(size if isinstance(size, int) else None for size in given.shape)
    if len(shape) != 4:
        raise InvalidJob(f"{said}, but a batch of images is [n, c, h, w]; export it so, or choose with model.input")
    if shape[3] in {1, 3} and shape[1] not in {1, 3}:
        raise InvalidJob(
            f"{said}: channels last (NHWC), but images come as [n, c, h, w]; export it with channels first "
            f"(tf2onnx: --inputs-as-nchw {given.name})"
        )
    return shape


def _constant(given: Any, value: Any) -> np.ndarray[Any, Any]:
    import numpy as np

    said = f"model.constants: the input {given.name} takes {given.type} {_sizes(given.shape)}"
    if given.type not in _TYPES:
        raise InvalidJob(f"{said}, for which a job has no values; export the model without it")
    try:
        array = np.asarray(value, dtype=_TYPES[given.type])
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidJob(f"{said}, and {value!r} is none ({error})") from error
    shape = list(given.shape)
    if shape and not isinstance(shape[0], int):
        del shape[0]
    fits = len(shape) == array.ndim and all(
        not isinstance(size, int) or size == got for size, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise InvalidJob(f"{said}, so the value has the shape {_sizes(shape)}, and {value!r} has {list(array.shape)}")
    return array


def select_output_names(session: Any, output: str | int | None, where: str) -> tuple[str, ...]:
    """Names of the outputs that are wanted: the one the job names, or all. Raises InvalidJob where there is none."""
    outputs = {one.name: one.type for one in session.get_outputs()}
    names = tuple(outputs)
    if isinstance(output, int) and output < len(names):
        names = (names[output],)
    elif isinstance(output, str) and output in outputs:
        names = (output,)
    elif output is not None:
        raise InvalidJob(
            f"model.output is {output!r}, but the model gives {', '.join(names)}; "
            f"name one of them, or write a number from 0 to {len(names) - 1}"
        )
    for name in names:
        if outputs[name] not in _TYPES:
            raise InvalidJob(
                f"{where}: its output {name} is {outputs[name]} and no tensor of numbers; pick another with "
                "model.output, or export the model without it (skl2onnx: zipmap=False)"
            )
    return names


class OnnxRunner:
    """Opens a graph on the device where the images turn out to be.

    Args:
        graph: the model.
        providers: as the job gives them.

    Raises:
        InvalidJob: a provider that is asked for is not in this onnxruntime.
    """

    def __init__(self, graph: OnnxModelFiles, providers: Literal["auto"] | Sequence[ExecutionProvider]) -> None:
        import onnxruntime

        self._graph = graph
        there = onnxruntime.get_available_providers()
        for name in () if providers == "auto" else providers:
            if _NAMES[name] not in there:
                has = ", ".join(known for known, full in _NAMES.items() if full in there)
                raise InvalidJob(
                    f"model.providers: {name} is not in this onnxruntime {onnxruntime.__version__}, which has {has}; "
                    f"install {_PACKAGES.get(name, 'onnxruntime')} in its place, or write providers: auto"
                )
        self._providers = providers
        self.devices = self._devices(there)
        self._open: dict[str, Any] = {}

    def _devices(self, there: Sequence[str]) -> tuple[str, ...]:
        if self._providers == "auto":
            return ("cuda", "cpu") if _NAMES["cuda"] in there else ("cpu",)
        return ("cuda",) if _ON_GPU & set(self._providers) else ("cpu",)

    def session(self, device: str) -> Any:
        """The session on `cpu` or `cuda:N`; opened once. Raises InvalidJob where onnxruntime refuses the graph."""
        if device not in self._open:
            self._open.clear()  # a session holds all weights
            self._open[device] = _opened(self._graph, self._chosen(device))
        return self._open[device]

    def _chosen(self, device: str) -> list[tuple[str, dict[str, str]]]:
        on_gpu = device.startswith("cuda")
        if self._providers == "auto":
            names: Sequence[str] = ("cuda", "cpu") if on_gpu else ("cpu",)
        else:
            names = [name for name in self._providers if on_gpu or name not in _ON_GPU] or ["cpu"]
        options = {"device_id": device.partition(":")[2] or "0"}
        return [(_NAMES[name], options if name in _ON_GPU else {}) for name in names]

    def build_module(self, image: OnnxImageInput, outputs: tuple[str, ...]) -> nn.Module:
        """The graph as a module from `[n, c, h, w]` to its only output, or to a dict of several by name."""
        import torch

        runner = self

        class OnnxGraph(torch.nn.Module):
            """Runs the graph where the images are."""

            def forward(self, pixels: torch.Tensor) -> Any:
                values = _cast(pixels, image)
                made = _run(runner.session(str(pixels.device)), values, image, outputs)
                return made[outputs[0]] if len(outputs) == 1 else made

        return OnnxGraph().eval()


def _opened(graph: OnnxModelFiles, providers: list[tuple[str, dict[str, str]]]) -> Any:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: warnings are of its own optimisations
    if graph.external:
        files, contents = list(graph.external), list(graph.external.values())
        options.add_external_initializers_from_files_in_memory(files, contents, [len(content) for content in contents])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of providers that did not start: said below
            session = onnxruntime.InferenceSession(graph.data, options, providers=providers)
    except Exception as error:  # its exceptions have no ancestor of their own
        raise InvalidJob(f"{graph.where} {explain_open_error(error, onnxruntime.__version__)}") from error
    silent = [name for name, _ in providers if name not in session.get_providers()]
    if silent:
        raise InvalidJob(
            f"model.providers: onnxruntime {onnxruntime.__version__} could not start {silent[0]} (its libraries are "
            "not found, or there is no such device); install what it needs, or write model.providers: [cpu]"
        )
    return session


def _cast(pixels: torch.Tensor, image: OnnxImageInput) -> torch.Tensor:
    import torch

    if any(wanted not in {None, got} for wanted, got in zip(image.shape, pixels.shape, strict=True)):
        raise InvalidJob(
            f"the model's input {image.name} takes {_sizes(image.shape)}, and the images come as "
            f"{list(pixels.shape)}; set preprocess.crop (or resize: [height, width]) and channels to what it takes"
        )
    if image.dtype != "uint8":
        return pixels.to(getattr(torch, image.dtype)).contiguous()
    whole = pixels.round()
    if not torch.equal(whole, pixels) or bool((whole < 0).any()) or bool((whole > 255).any()):
        raise InvalidJob(
            f"the model's input {image.name} takes whole numbers from 0 to 255 (uint8), and the images come "
            "otherwise; write preprocess: {scale: none, mean: null, std: null}"
        )
    return whole.to(torch.uint8).contiguous()


def _run(session: Any, values: torch.Tensor, image: OnnxImageInput, outputs: Sequence[str]) -> dict[str, torch.Tensor]:
    """Binds the tensors' own memory; what comes back is onnxruntime's, which lives as long as the tensors."""
    import numpy as np
    import torch
    from torch.utils.dlpack import from_dlpack

    kind, index = values.device.type, values.device.index or 0
    binding = session.io_binding()
    dtype = np.dtype(image.dtype).type
    binding.bind_input(image.name, kind, index, dtype, tuple(values.shape), values.data_ptr())
    for name, value in image.constants.items():
        repeats = np.repeat(value[None], len(values), 0) if name in image.repeated else value
        binding.bind_cpu_input(name, np.ascontiguousarray(repeats))
    for name in outputs:
        binding.bind_output(name, kind, index)
    if kind == "cuda":
        torch.cuda.current_stream(values.device).synchronize()  # onnxruntime computes on a stream of its own
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        text = " ".join(str(error).split())
        short = "allocate memory" in text or "out of memory" in text
        raise RuntimeError(f"onnxruntime{' is out of memory' if short else ''}: {text[:500]}") from error
    binding.synchronize_outputs()
    made = binding.get_outputs()
    return {name: from_dlpack(one._ortvalue) for name, one in zip(outputs, made, strict=True)}


def _sizes(shape: Sequence[Any]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
