"""Feature layer: finds the layer of a classifier that turns features into class scores, and leaves it out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob
from batchjob.settings import Decision
from batchjob.text import format_count

if TYPE_CHECKING:
    import torch
    from torch import nn

    from batchjob.tasks.settings import RunModel, TaskModel

__all__ = ["MODEL_OUTPUT", "decide_layer", "parse_left_out", "remove_layers"]

MODEL_OUTPUT = "output"
"""Value of `task.layer` for the output of the model."""
_BEFORE = "before:"
# Class counts of ImageNet and Places: no embedding is so long.
_CLASS_COUNTS = {365, 1000, 11221, 21841, 21843}
_CLASS_COUNT_NAMES = ("num_classes", "n_classes", "num_labels")
_CLASS_LAYER_NAMES = ("classifier", "classification_head", "cls_head", "class_head", "logits")


def parse_left_out(layer: str) -> tuple[str, ...]:
    """Return the layers that a value of `task.layer` leaves out: `head` and `head_dist` of `before:head,head_dist`."""
    return tuple(layer.removeprefix(_BEFORE).split(",")) if layer.startswith(_BEFORE) else ()


def remove_layers(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a copy of a module that passes on what these layers would get; weights are shared.

    Unlike a hook, this keeps the module free of state, and spares the computation of the layers.

    Args:
        module: Module in eval mode; it stays as it is.
        names: Layers by their names in `named_modules()`, the last ones that the module runs.
    """
    from torch.nn import Identity

    changed = copy.copy(module)
    children = dict(module._modules)
    changed.__dict__["_modules"] = children
    for name in dict.fromkeys(name.partition(".")[0] for name in names):
        inner = [rest for first, _, rest in (each.partition(".") for each in names) if first == name]
        child = children[name]
        children[name] = Identity() if child is None or "" in inner else remove_layers(child, inner)
    return changed


def decide_layer(model: TaskModel, run_model: RunModel) -> Decision:
    """Choose the features before the class scores where it is sure that there are some, else the model's output.

    It is sure where the format knows its class layers, or where the output is that of a linear layer with as many
    outputs as the model has classes. The layer is left out only if this gives exactly what it gets in the whole model.

    Args:
        model: The model.
        run_model: Runs it.
    """
    import torch

    with _record_linear_layers(model.module, model.class_layers) as recorded:
        output = next(run_model(model.module))
    numbers = f": {format_count(output[0].numel(), 'number')}" if isinstance(output, torch.Tensor) else ""
    if model.gives_features is not None:
        return Decision(MODEL_OUTPUT, f"{model.gives_features}{numbers}")
    names = model.class_layers or _find_class_layer(model, output, recorded)
    if not names:
        return Decision(MODEL_OUTPUT, f"no layer is known to turn features into class scores{numbers}")
    features = _run_without(model.module, names, run_model)
    got = recorded[names[0]][0] if len(names) == 1 and names[0] in recorded else None
    is_vector = features is not None and (features.ndim == 2 or tuple(features.shape[2:]) == (1, 1))
    if features is None or not is_vector or (got is not None and not _is_equal(features, got)):
        return Decision(MODEL_OUTPUT, f"{' and '.join(names)} cannot be left out{numbers}")
    made = f"{output[0].numel():,} class scores" if isinstance(output, torch.Tensor) else "class scores"
    return Decision(
        f"{_BEFORE}{','.join(names)}",
        f"{' and '.join(names)} would turn these {format_count(features[0].numel(), 'number')} into {made}",
    )


@contextmanager
def _record_linear_layers(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Record input and output of linear layers and of named ones, by name, for calls in this context."""
    from torch.nn import Linear

    recorded: dict[str, tuple[Any, Any]] = {}

    def record(name: str, layer: nn.Module) -> Any:
        def hook(_layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            recorded.pop(name, None)  # the order is that of the last calls
            recorded[name] = (inputs[0] if inputs else None, output)

        return layer.register_forward_hook(hook)

    layers = dict(module.named_modules())
    chosen = {name: layer for name, layer in layers.items() if type(layer) is Linear or name in names}
    handles = [record(name, layer) for name, layer in chosen.items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _find_class_layer(model: TaskModel, output: Any, recorded: dict[str, tuple[Any, Any]]) -> tuple[str, ...]:
    """Find the linear layer whose output is the model's, if it is by its size or name one for classes."""
    import torch

    name, (_, made) = next(reversed(recorded.items()), ("", (None, None)))
    if not name or made is not output or not isinstance(output, torch.Tensor) or output.ndim != 2:
        return ()
    classes = output.shape[1]
    stated = [getattr(part, key, None) for part in _unwrap(model.module) for key in _CLASS_COUNT_NAMES]
    is_known = classes in _CLASS_COUNTS or classes == len(model.labels or ())
    # In timm, `num_classes` may be the width of a projection.
    is_stated = classes in stated and not any(hasattr(part, "pretrained_cfg") for part in _unwrap(model.module))
    return (name,) if is_known or is_stated or name.rpartition(".")[2] in _CLASS_LAYER_NAMES else ()


def _unwrap(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module, and the one that it wraps, and so on."""
    yield module
    children = list(module.children())
    if len(children) == 1:
        yield from _unwrap(children[0])


def _run_without(module: nn.Module, names: Sequence[str], run_model: RunModel) -> torch.Tensor | None:
    """Return the output without these layers; None if the model does not run so."""
    import torch

    try:
        output = next(run_model(remove_layers(module, names)))
    except InvalidJob:
        return None
    return output if isinstance(output, torch.Tensor) and output.ndim >= 2 else None


def _is_equal(features: torch.Tensor, got: Any) -> bool:
    import torch

    return isinstance(got, torch.Tensor) and torch.equal(features.flatten(1), got.flatten(1))
