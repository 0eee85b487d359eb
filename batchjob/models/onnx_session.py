"""Sessions of onnxruntime as a module: tensors go in and out without copies, on the device that the images are on."""

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

_PROVIDER_NAMES: dict[str, str] = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_PROVIDER_PACKAGES = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "openvino": "onnxruntime-openvino"}
_GPU_PROVIDERS = {"cuda", "tensorrt"}
# Types of onnxruntime to dtypes of NumPy: those that images can be cast to, and those of outputs and `constants`.
_IMAGE_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
}
_DTYPES = _IMAGE_DTYPES | {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool"}


@dataclass(frozen=True)
class OnnxImageInput:
    """Input of a graph that gets the images, with the values of its other inputs.

    Attributes:
        name: Name of the input.
        dtype: Its element type: float32, float16, float64 or uint8.
        shape: `(n, c, h, w)`, with None for a free dimension.
        constants: Values of the other inputs by name.
        repeated: Names of those whose value is repeated for each image of a batch.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    constants: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()


def find_image_input(session: Any, name: str | None, constants: Mapping[str, Any], where: str) -> OnnxImageInput:
    """Find the input that gets the images, and convert the values of all others.

    Args:
        session: Session of onnxruntime.
        name: Name of the input in the job; None if the graph has only one without a value.
        constants: Values of all other inputs, as numbers or nested lists.
        where: Job key and file, the start of error messages.

    Raises:
        InvalidJob: There is no such input, another one has no value or a wrong one, or it does not take a batch of
            images `[n, c, h, w]`.
    """
    inputs = {node.name: node for node in session.get_inputs()}
    input_list = ", ".join(f"{node.name} {node.type} {_format_shape(node.shape)}" for node in inputs.values())
    file = where.partition(": ")[2]
    unknown = [key for key in constants if key not in inputs]
    if unknown:
        raise InvalidJob(f"model.constants: {file} has no input {unknown[0]}; it has {input_list}")
    without_value = [key for key in inputs if key not in constants]
    if name is None:
        if len(without_value) != 1:
            raise InvalidJob(
                f"{where} has the inputs {input_list}; write model.input: NAME for the one that gets the images, "
                "and values for the others under model.constants"
            )
        name = without_value[0]
    if name not in inputs:
        raise InvalidJob(f"model.input: {file} has no input {name!r}; it has {input_list}")
    missing = [key for key in without_value if key != name]
    if missing:
        raise InvalidJob(f"model.constants: no value for the input {missing[0]} of the model; it takes {input_list}")
    values = {key: _convert_constant(inputs[key], value) for key, value in constants.items()}
    repeated = frozenset(key for key in values if inputs[key].shape and not isinstance(inputs[key].shape[0], int))
    shape = _check_image_input(inputs[name], where)
    return OnnxImageInput(name, _IMAGE_DTYPES[inputs[name].type], shape, values, repeated)


def select_output_names(session: Any, output: str | int | None, where: str) -> tuple[str, ...]:
    """Select the outputs to compute.

    Args:
        session: Session of onnxruntime.
        output: Name or index of one output; None for all of them.
        where: Job key and file, the start of error messages.

    Raises:
        InvalidJob: There is no such output, or it is not a tensor of numbers.
    """
    outputs = {node.name: node.type for node in session.get_outputs()}
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
        if outputs[name] not in _DTYPES:
            raise InvalidJob(
                f"{where}: its output {name} is {outputs[name]} and no tensor of numbers; pick another with "
                "model.output, or export the model without it (skl2onnx: zipmap=False)"
            )
    return names


class OnnxRunner:
    """Session of a graph, opened on the device that the images turn out to be on.

    Args:
        files: Files of the model.
        providers: Execution providers in the job: `auto`, or names, the first choice first.

    Attributes:
        devices: Device types it runs on: `cuda`, `cpu` or both.

    Raises:
        InvalidJob: The job names a provider that this onnxruntime does not have.
    """

    def __init__(self, files: OnnxModelFiles, providers: Literal["auto"] | Sequence[ExecutionProvider]) -> None:
        import onnxruntime

        self._files = files
        available = onnxruntime.get_available_providers()
        for name in () if providers == "auto" else providers:
            if _PROVIDER_NAMES[name] not in available:
                names = ", ".join(key for key, full_name in _PROVIDER_NAMES.items() if full_name in available)
                raise InvalidJob(
                    f"model.providers: {name} is not in this onnxruntime {onnxruntime.__version__}, which has {names}; "
                    f"install {_PROVIDER_PACKAGES.get(name, 'onnxruntime')} in its place, or write providers: auto"
                )
        self._providers = providers
        self.devices = self._list_devices(available)
        self._sessions: dict[str, Any] = {}  # by device; at most one

    def session(self, device: str) -> Any:
        """Return the session on `cpu` or `cuda:N`, opened on the first call.

        Raises:
            InvalidJob: onnxruntime does not open the graph, or cannot start a provider.
        """
        if device not in self._sessions:
            self._sessions.clear()  # A session holds a copy of all weights.
            self._sessions[device] = _open_session(self._files, self._choose_providers(device))
        return self._sessions[device]

    def build_module(self, image_input: OnnxImageInput, outputs: tuple[str, ...]) -> nn.Module:
        """Build a module from images `[n, c, h, w]` to the only output, or to a dict of several by name."""
        import torch

        runner = self

        class OnnxModule(torch.nn.Module):
            """Module that runs the graph on the device that the images are on."""

            def forward(self, pixels: torch.Tensor) -> Any:
                values = _cast_pixels(pixels, image_input)
                results = _run_session(runner.session(str(pixels.device)), values, image_input, outputs)
                return results[outputs[0]] if len(outputs) == 1 else results

        return OnnxModule().eval()

    def _list_devices(self, available: Sequence[str]) -> tuple[str, ...]:
        if self._providers == "auto":
            return ("cuda", "cpu") if _PROVIDER_NAMES["cuda"] in available else ("cpu",)
        return ("cuda",) if _GPU_PROVIDERS & set(self._providers) else ("cpu",)

    def _choose_providers(self, device: str) -> list[tuple[str, dict[str, str]]]:
        on_gpu = device.startswith("cuda")
        if self._providers == "auto":
            names: Sequence[str] = ("cuda", "cpu") if on_gpu else ("cpu",)
        else:
            names = [name for name in self._providers if on_gpu or name not in _GPU_PROVIDERS] or ["cpu"]
        options = {"device_id": device.partition(":")[2] or "0"}
        return [(_PROVIDER_NAMES[name], options if name in _GPU_PROVIDERS else {}) for name in names]


def _check_image_input(node: Any, where: str) -> tuple[int | None, ...]:
    description = f"{where}: its input {node.name} takes {node.type} {_format_shape(node.shape)}"
    if node.type not in _IMAGE_DTYPES:
        raise InvalidJob(f"{description}, which images are not; export it with a float32, float16 or uint8 input")
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    if len(shape) != 4:
        raise InvalidJob(
            f"{description}, but a batch of images is [n, c, h, w]; export it so, or choose with model.input"
        )
    if shape[3] in {1, 3} and shape[1] not in {1, 3}:
        raise InvalidJob(
            f"{description}: channels last (NHWC), but images come as [n, c, h, w]; export it with channels first "
            f"(tf2onnx: --inputs-as-nchw {node.name})"
        )
    return shape


def _convert_constant(node: Any, value: Any) -> np.ndarray[Any, Any]:
    import numpy as np

    description = f"model.constants: the input {node.name} takes {node.type} {_format_shape(node.shape)}"
    if node.type not in _DTYPES:
        raise InvalidJob(f"{description}, for which a job has no values; export the model without it")
    try:
        array = np.asarray(value, dtype=_DTYPES[node.type])
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidJob(f"{description}, and {value!r} is none ({error})") from error
    # Without a free first dimension, which stands for the batch. Example: ["n", 1, 1, 1] → [1, 1, 1].
    shape = list(node.shape)
    if shape and not isinstance(shape[0], int):
        del shape[0]
    fits = len(shape) == array.ndim and all(
        not isinstance(expected, int) or expected == actual for expected, actual in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise InvalidJob(
            f"{description}, so the value has the shape {_format_shape(shape)}, and {value!r} has {list(array.shape)}"
        )
    return array


def _open_session(files: OnnxModelFiles, providers: list[tuple[str, dict[str, str]]]) -> Any:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only: its warnings are about its own optimisations
    if files.external:
        names, contents = list(files.external), list(files.external.values())
        options.add_external_initializers_from_files_in_memory(names, contents, [len(content) for content in contents])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A provider that did not start is an error below.
            session = onnxruntime.InferenceSession(files.data, options, providers=providers)
    except Exception as error:  # The exceptions of onnxruntime have no common class.
        raise InvalidJob(f"{files.where} {explain_open_error(error, onnxruntime.__version__)}") from error
    not_started = [name for name, _ in providers if name not in session.get_providers()]
    if not_started:
        raise InvalidJob(
            f"model.providers: onnxruntime {onnxruntime.__version__} could not start {not_started[0]} (its libraries "
            "are not found, or there is no such device); install what it needs, or write model.providers: [cpu]"
        )
    return session


def _cast_pixels(pixels: torch.Tensor, image_input: OnnxImageInput) -> torch.Tensor:
    import torch

    shapes = zip(image_input.shape, pixels.shape, strict=True)
    if any(expected not in {None, actual} for expected, actual in shapes):
        raise InvalidJob(
            f"the model's input {image_input.name} takes {_format_shape(image_input.shape)}, and the images come as "
            f"{list(pixels.shape)}; set preprocess.crop (or resize: [height, width]) and channels to what it takes"
        )
    if image_input.dtype != "uint8":
        return pixels.to(getattr(torch, image_input.dtype)).contiguous()
    rounded = pixels.round()
    if not torch.equal(rounded, pixels) or bool((rounded < 0).any()) or bool((rounded > 255).any()):
        raise InvalidJob(
            f"the model's input {image_input.name} takes whole numbers from 0 to 255 (uint8), and the images come "
            "otherwise; write preprocess: {scale: none, mean: null, std: null}"
        )
    return rounded.to(torch.uint8).contiguous()


def _run_session(
    session: Any, values: torch.Tensor, image_input: OnnxImageInput, outputs: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Run a session without copies: it reads the tensor's memory, and the results share the memory of onnxruntime."""
    import numpy as np
    import torch
    from torch.utils.dlpack import from_dlpack

    device_type, device_index = values.device.type, values.device.index or 0
    binding = session.io_binding()
    dtype = np.dtype(image_input.dtype).type
    binding.bind_input(image_input.name, device_type, device_index, dtype, tuple(values.shape), values.data_ptr())
    for name, value in image_input.constants.items():
        # Example: the value [0.5] becomes [[0.5], [0.5], [0.5]] for three images.
        array = np.repeat(value[None], len(values), 0) if name in image_input.repeated else value
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name in outputs:
        binding.bind_output(name, device_type, device_index)
    if device_type == "cuda":
        # onnxruntime computes on a stream of its own, so the pixels must be complete before.
        torch.cuda.current_stream(values.device).synchronize()
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        text = " ".join(str(error).split())
        is_out_of_memory = "allocate memory" in text or "out of memory" in text
        raise RuntimeError(f"onnxruntime{' is out of memory' if is_out_of_memory else ''}: {text[:500]}") from error
    binding.synchronize_outputs()
    # The OrtValue behind each result lives as long as the tensor that DLPack makes of it.
    return {name: from_dlpack(result._ortvalue) for name, result in zip(outputs, binding.get_outputs(), strict=True)}


def _format_shape(shape: Sequence[Any]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
