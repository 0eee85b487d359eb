"""Activation: tells logits from scores in a model's output, and turns logits into scores."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from batchjob.errors import InvalidJob
from batchjob.settings import Decision

if TYPE_CHECKING:
    import torch

    from batchjob.tasks.settings import RunModel, TaskModel

__all__ = ["Activation", "ScoreFunction", "apply_activation", "decide_activation"]

Activation = Literal["auto", "softmax", "sigmoid", "none"]
ScoreFunction = Literal["softmax", "sigmoid", "none"]

# Operations of torch and ONNX, in lower case and without leading or trailing underscores.
_ENDS_IN_SCORES = {"softmax": "a softmax", "special_softmax": "a softmax", "sigmoid": "a sigmoid"}
_ENDS_IN_SCORES |= {"special_expit": "a sigmoid", "hardsigmoid": "a sigmoid"}
_ENDS_IN_LOGITS = {
    "addmm", "baddbmm", "batch_norm", "bmm", "conv", "conv1d", "conv2d", "convolution", "einsum", "gemm", "linear",
    "log_softmax", "logsoftmax", "matmul", "mm", "native_batch_norm", "native_layer_norm", "special_log_softmax",
}  # fmt: skip
_KEEPS_VALUES = {
    "alias", "as_strided", "bfloat16", "cast", "clone", "contiguous", "cpu", "cuda", "detach", "double", "expand",
    "flatten", "float", "get", "getitem", "half", "identity", "index", "permute", "reshape", "reshape_alias", "select",
    "slice", "squeeze", "t", "to", "to_copy", "transpose", "type", "type_as", "unflatten", "unsafe_view", "unsqueeze",
    "view",
}  # fmt: skip
# Operations that average, limit or join the scores of several models or classes.
_COMBINES_SCORES = {
    "add", "amax", "cat", "clamp", "concat", "div", "maximum", "mean", "minimum", "mul", "stack", "sum", "where",
}  # fmt: skip
# So many numbers of different images between 0 and 1 count as scores; fewer logits may lie there by chance.
_MIN_SCORES = 16
_SUM_TOLERANCE = 2e-3


def apply_activation(output: torch.Tensor, activation: ScoreFunction) -> torch.Tensor:
    """Return the scores `[n, classes]` for a model's output `[n, classes]`, in float32."""
    values = output.float()
    if activation == "none":
        return values
    return values.sigmoid() if activation == "sigmoid" else values.softmax(dim=1)


def decide_activation(
    activation: Activation, model: TaskModel, run_model: RunModel, usual: Literal["softmax", "sigmoid"]
) -> dict[str, Decision]:
    """Choose the activation, if it is `auto`; see `TaskSettings.decide`.

    Args:
        activation: `task.activation` of the job.
        model: The model.
        run_model: Runs it.
        usual: Activation for logits.

    Raises:
        InvalidJob: The model gives features, which are no class scores.
    """
    if model.gives_features is not None:
        raise InvalidJob(
            f"model: {model.gives_features}; it gives features (task.type: embedding), so take a model with a head for "
            "classes"
        )
    decision = _find_activation(model, run_model, usual) if activation == "auto" else None
    return {} if decision is None else {"activation": decision}


def _find_activation(model: TaskModel, run_model: RunModel, usual: Literal["softmax", "sigmoid"]) -> Decision | None:
    """Find out if a model's output are logits or already scores.

    The last operation of the model decides, where it is seen and makes only one of both. Else the outputs for images
    that look very different do: logits would hardly add up to 1 for all of them.

    Returns:
        `none` for scores, else `usual`; None if the output is no tensor `[n, classes]`, which the task will refuse.
    """
    import torch

    outputs = run_model(model.module)
    with trace_operations(python_only=model.eager) as find_operation:
        output = next(outputs)
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or not output.is_floating_point():
        return None
    operation = _simplify(model.output_operation) if model.output_operation else find_operation(output)
    if operation in _ENDS_IN_SCORES:
        return Decision("none", f"the model itself ends in {_ENDS_IN_SCORES[operation]}")
    if operation in _ENDS_IN_LOGITS:
        return Decision(usual, f"the model gives logits, by its last operation, {operation}")
    # A classifier's logits may all be small and positive. Its scores add up to 1, or a sigmoid was seen to make them.
    may_be_sigmoids = operation is None or (usual == "sigmoid" and operation in _COMBINES_SCORES)
    if reason := _explain_scores(output, outputs, may_be_sigmoids=may_be_sigmoids):
        return Decision("none", reason)
    return Decision(usual, "the model's outputs are logits: they look neither like a softmax nor like sigmoids")


@contextmanager
def trace_operations(*, python_only: bool) -> Iterator[Callable[[torch.Tensor], str | None]]:
    """Watch torch's operations; yield a function that returns the name of the one that made a tensor's values.

    Views, casts and copies do not count. The function returns None for a tensor that another runtime has made.

    Args:
        python_only: Watch the operations that Python code calls, as in an eager module, and not those of a graph.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    # The second item tells the tensor from a later one with the same id.
    operations: dict[int, tuple[str | None, weakref.ref[torch.Tensor]]] = {}

    def find(tensor: object) -> str | None:
        operation, known = operations.get(id(tensor), (None, None))
        return operation if known is not None and known() is tensor else None

    def record(name: str, args: Sequence[Any], result: Any) -> None:
        operation: str | None = _simplify(name)
        if operation in _KEEPS_VALUES:
            operation = find(args[0]) if args else None
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                operations[id(tensor)] = operation, weakref.ref(tensor)

    class FunctionTrace(TorchFunctionMode):
        """Record the function of torch that made each tensor."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            record(getattr(func, "__name__", ""), args, result)
            return result

    if python_only:
        with FunctionTrace():
            yield find
        return
    # Its first use imports torch's compiler, which takes two seconds. Therefore it is not used for eager modules.
    from torch.utils._python_dispatch import TorchDispatchMode

    class OperatorTrace(TorchDispatchMode):
        """Record the operator that made each tensor, also one that a graph calls."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            record(func.overloadpacket.__name__, args, result)
            return result

    with OperatorTrace():  # type: ignore[no-untyped-call]
        yield find


def _simplify(operation: str) -> str:
    """Return the name of an operation without case and underscores: `_softmax`, `sigmoid_` and `Softmax`."""
    return operation.lower().strip("_")


def _explain_scores(first: torch.Tensor, others: Iterator[Any], *, may_be_sigmoids: bool) -> str | None:
    """Return why a model's outputs for different images look like scores; None if they do not.

    Args:
        first: Output for copies of one image.
        others: Outputs for other images, computed only where the first looks like scores.
        may_be_sigmoids: Numbers between 0 and 1 that do not add up to 1 may be scores, too.
    """
    import torch

    if not _is_within_unit(first):
        return None
    rows = torch.cat([output[:1].float() for output in (first, *others)])
    if not _is_within_unit(rows):
        return None
    if bool((rows.sum(dim=1) - 1).abs().max() <= _SUM_TOLERANCE):
        return "the model's outputs are scores: none is below 0, and those of an image add up to 1"
    if may_be_sigmoids and rows.numel() >= _MIN_SCORES:
        return "the model's outputs are scores: all are between 0 and 1"
    return None


def _is_within_unit(values: torch.Tensor) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())
