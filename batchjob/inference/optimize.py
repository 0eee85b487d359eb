"""A module as a `Recipe` wants it: folded, in half precision, channels last, quantised, compiled."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from batchjob.errors import InvalidJob
from batchjob.inference.execution_config import ExecutionConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["fold_batch_norms", "measure_sparsity", "optimize", "prune_weights", "quantize_module"]

_REPEATED = 2  # blocks of one class that are worth compiling once for all


def optimize(module: nn.Module, config: ExecutionConfig, example: torch.Tensor) -> nn.Module:
    """The module prepared for a recipe; the given one stays as it is, and may share its weights.

    Args:
        module: in eval mode, on its device.
        recipe: what to do. Autocast and tf32 are the caller's, per call.
        example: inputs `[n, c, h, w]` on the device, as the module gets them; quantisation is calibrated on them.

    Raises:
        InvalidJob: a package is missing.
        Exception: whatever torch raises where the module does not allow it.
    """
    import torch

    made = fold_batch_norms(module) if config.fold else module
    if config.half:
        made = copy.deepcopy(made).to({"bf16": torch.bfloat16, "fp16": torch.float16}[config.precision])
    if config.channels_last:
        made = copy.deepcopy(made).to(memory_format=torch.channels_last)
    if config.quantize != "none":
        made = quantize_module(made, config.quantize, example)
    return _compiled(made, config)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """A copy whose batch norms are folded into the convolutions before them, by torch.fx.

    Raises:
        Exception: the module cannot be traced.
    """
    from torch.fx.experimental.optimization import fuse

    made: nn.Module = fuse(module)
    return made.eval().requires_grad_(False)


def quantize_module(module: nn.Module, mode: str, example: torch.Tensor) -> nn.Module:
    """A copy that computes in eight bits, by torchao.

    Args:
        module: in eval mode, fp32.
        how: `int8-dynamic` and `fp8` (linear layers alone; activations are scaled as they come), or `int8-static`
            (convolutions and linear layers; scales are learnt from the example). Static graphs gain by compiling only.
        example: `[n, c, h, w]`.

    Raises:
        InvalidJob: torchao is not installed.
        Exception: the module cannot be exported.
    """
    try:
        with _quiet():
            import torchao  # noqa: F401 - its absence is said here, in one sentence
    except ImportError as error:
        raise InvalidJob("runtime.quantize needs torchao; pip install 'batchjob[quant]'") from error
    with _quiet():
        return _static(module, example) if mode == "int8-static" else _dynamic(module, mode)


def _dynamic(module: nn.Module, how: str) -> nn.Module:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    made = copy.deepcopy(module)
    config = Float8DynamicActivationFloat8WeightConfig() if how == "fp8" else Int8DynamicActivationInt8WeightConfig()
    quantize_(made, config)
    return made


def _static(module: nn.Module, example: torch.Tensor) -> nn.Module:
    """Post-training quantisation of the exported graph, as PyTorch 2 Export Quantization has it."""
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config())
    with torch.inference_mode(False), torch.no_grad():
        plain = copy.deepcopy(module)
        inputs = example.clone()
        # The quantiser finds its patterns only in graphs that were exported strictly.
        graph = torch.export.export(plain, (inputs,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=True)
        prepared = prepare_pt2e(graph.module(), quantizer)
        prepared(inputs)
        made: nn.Module = convert_pt2e(prepared)
        return made


def _compiled(module: nn.Module, recipe: ExecutionConfig) -> nn.Module:
    if recipe.compile == "off":
        return module
    if recipe.compile == "regional":
        return _by_region(module)
    import torch
    from torch._inductor import list_mode_options

    options: dict[str, Any] = dict(list_mode_options(recipe.compile) or {})
    if recipe.freeze:
        options["freezing"] = True
    return cast("nn.Module", torch.compile(module, dynamic=False, options=options))


def _by_region(module: nn.Module) -> nn.Module:
    """A copy in which each block that the module repeats is compiled, which takes one compilation for all of them."""
    made = copy.deepcopy(module)
    classes = Counter(type(child) for _, child in _blocks(made))
    repeated = [child for _, child in _blocks(made) if classes[type(child)] >= _REPEATED]
    if not repeated:
        raise InvalidJob(
            "runtime.compile: regional needs blocks that repeat, and this model has none; write compile: on"
        )
    for block in repeated:
        block.compile(dynamic=False)
    return made


def _blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Members of lists and sequences that hold more than one layer."""
    import torch

    for name, child in module.named_modules():
        if isinstance(child, torch.nn.ModuleList | torch.nn.Sequential):
            yield from ((f"{name}.{at}", block) for at, block in child.named_children() if any(block.children()))


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao's own chatter, of imports and deprecations upstream, is not for the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prune_weights(module: nn.Module, amount: float, *, structured: bool = False) -> nn.Module:
    """A copy in which the smallest weights of each convolution and linear layer are zero, by magnitude.

    Args:
        module: in eval mode.
        amount: share of a layer's weights, or of its output channels (by L2 norm), from 0 to 1.
        structured: whole channels.
    """
    import torch
    from torch.nn.utils import prune

    made = copy.deepcopy(module)
    for layer in made.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            if structured:
                prune.ln_structured(layer, "weight", amount=amount, n=2, dim=0)
            else:
                prune.l1_unstructured(layer, "weight", amount=amount)
            prune.remove(layer, "weight")
    return made.requires_grad_(False)


def measure_sparsity(module: nn.Module) -> float:
    """Share of the weights of convolutions and linear layers that are zero."""
    import torch

    weights = [layer.weight for layer in module.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))
