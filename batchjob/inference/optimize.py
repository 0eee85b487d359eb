"""Forms of a module for an execution config: folded, in half precision, channels-last, quantised, compiled, pruned."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import prune

from batchjob.errors import InvalidJob
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.system import install_command

__all__ = ["find_weight_dtype", "fold_batch_norms", "measure_sparsity", "optimize", "prune_weights", "quantize_module"]

# From so many blocks of one class on, compiling one of them for all is worth it.
_MIN_REPEATED_BLOCKS = 2


def optimize(module: nn.Module, config: ExecutionConfig, example: torch.Tensor) -> nn.Module:
    """Return the module prepared for an execution config; the given module is not changed, weights may be shared.

    Args:
        module: Module in eval mode, on its device.
        config: Options to apply. Autocast and TF32 are not among them: the forward pass sets them in each call.
        example: Inputs `[n, c, h, w]` on the device, as the module gets them; quantisation is calibrated on them.

    Raises:
        InvalidJob: A package is missing.
        Exception: Any error of torch, where the module does not support an option.
    """
    result = fold_batch_norms(module) if config.fold else module
    if find_weight_dtype(result) != config.weight_dtype:
        result = copy.deepcopy(result).to(config.weight_dtype)
    if config.channels_last:
        result = copy.deepcopy(result).to(memory_format=torch.channels_last)
    if config.quantize != "none":
        result = quantize_module(result, config.quantize, example)
    return _compile(result, config)


def find_weight_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first floating point weight, which meets its input; float32 if it has none."""
    weights = chain(module.parameters(), module.buffers())
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Return a copy whose batch norms are folded into the convolutions before them, by torch.fx.

    Raises:
        Exception: The module cannot be traced.
    """
    from torch.fx.experimental.optimization import fuse

    folded: nn.Module = fuse(module)
    return folded.eval().requires_grad_(False)


def quantize_module(module: nn.Module, mode: str, example: torch.Tensor) -> nn.Module:
    """Return a copy that computes in eight bits, by torchao.

    Args:
        module: Module in eval mode, fp32.
        mode: `int8-dynamic` and `fp8` quantise linear layers, with scales for activations computed in each call;
            `int8-static` quantises convolutions too, with scales learnt from the example. Only compiled, a graph of
            `int8-static` is faster than fp32.
        example: Inputs `[n, c, h, w]`.

    Raises:
        InvalidJob: torchao is not installed.
        Exception: The module cannot be exported.
    """
    try:
        with _torchao_warnings_ignored():
            import torchao  # noqa: F401 - a missing package is reported here, in one sentence
    except ImportError as error:
        raise InvalidJob(f"runtime.quantize needs torchao; {install_command('quant', 'torchao')}") from error
    with _torchao_warnings_ignored():
        return _quantize_static(module, example) if mode == "int8-static" else _quantize_dynamic(module, mode)


def prune_weights(module: nn.Module, amount: float, *, structured: bool = False) -> nn.Module:
    """Return a copy in which the smallest weights of each convolution and linear layer are zero, by magnitude.

    Args:
        module: Module in eval mode.
        amount: Share of a layer's weights, or with `structured` of its output channels by L2 norm, from 0 to 1.
        structured: Set whole output channels to zero in place of single weights.
    """
    pruned = copy.deepcopy(module)
    for layer in pruned.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if structured:
                prune.ln_structured(layer, "weight", amount=amount, n=2, dim=0)
            else:
                prune.l1_unstructured(layer, "weight", amount=amount)
            prune.remove(layer, "weight")
    return pruned.requires_grad_(False)


def measure_sparsity(module: nn.Module) -> float:
    """Return the share of weights of convolutions and linear layers that are zero, from 0 to 1."""
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))


# -- quantisation ----------------------------------------------------------------------------------------------


def _quantize_dynamic(module: nn.Module, mode: str) -> nn.Module:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    quantized = copy.deepcopy(module)
    config = Float8DynamicActivationFloat8WeightConfig() if mode == "fp8" else Int8DynamicActivationInt8WeightConfig()
    quantize_(quantized, config)
    return quantized


def _quantize_static(module: nn.Module, example: torch.Tensor) -> nn.Module:
    """Quantise the exported graph after training, as PyTorch 2 Export Quantization for x86 does."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config())
    with torch.inference_mode(False), torch.no_grad():
        source = copy.deepcopy(module)
        inputs = example.clone()
        # The quantiser finds its patterns only in graphs that were exported strictly.
        graph = torch.export.export(source, (inputs,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=True)
        prepared = prepare_pt2e(graph.module(), quantizer)
        prepared(inputs)
        quantized: nn.Module = convert_pt2e(prepared)
        return quantized


@contextmanager
def _torchao_warnings_ignored() -> Iterator[None]:
    """Ignore torchao's warnings of imports and of deprecations in torch: a user can do nothing about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- compilation -----------------------------------------------------------------------------------------------


def _compile(module: nn.Module, config: ExecutionConfig) -> nn.Module:
    if config.compile == "off":
        return module
    if config.compile == "regional":
        return _compile_regions(module)
    # Importing the compiler takes seconds.
    from torch._inductor import list_mode_options

    options: dict[str, Any] = dict(list_mode_options(config.compile) or {})
    if config.freeze:
        options["freezing"] = True
    return cast("nn.Module", torch.compile(module, dynamic=False, options=options))


def _compile_regions(module: nn.Module) -> nn.Module:
    """Compile each block that the module repeats; equal blocks share one compilation."""
    compiled = copy.deepcopy(module)
    counts = Counter(type(block) for block in _blocks(compiled))
    repeated = [block for block in _blocks(compiled) if counts[type(block)] >= _MIN_REPEATED_BLOCKS]
    if not repeated:
        raise InvalidJob(
            "runtime.compile: regional needs blocks that repeat, and this model has none; write compile: on"
        )
    for block in repeated:
        block.compile(dynamic=False)
    return compiled


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the items of module lists and sequences that consist of more than one layer."""
    for child in module.modules():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (block for block in child.children() if any(block.children()))
