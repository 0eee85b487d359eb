"""The nouns: frozen data that the rooms hand to each other. No behaviour beyond reading and writing themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ExecutionConfig", "Precision"]

Precision = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class ExecutionConfig:
    """How a module is run on a device; `tuning.py` chooses.

    Attributes:
        precision: of the arithmetic; bf16 and fp16 by autocast.
        half: the weights are in that precision too, in place of autocast.
        channels_last: memory layout of images and convolutions.
        fold: batch norms folded into their convolutions.
        compile: mode of `torch.compile`, or `off`.
        freeze: weights are constants to the compiler.
        quantize: of weights and activations.
        cudnn_benchmark: let cuDNN try its algorithms.
    """

    precision: Precision = "fp32"
    half: bool = False
    channels_last: bool = False
    fold: bool = False
    compile: Literal["off", "default", "regional", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "off"
    )
    freeze: bool = False
    quantize: Literal["none", "int8-dynamic", "int8-static", "fp8"] = "none"
    cudnn_benchmark: bool = False

    @property
    def description(self) -> str:
        """For people: `bf16 channels_last compile`, or `eager fp32`."""
        half = f"{self.precision} weights" if self.half else self.precision
        flags = [name for name in ("channels_last", "fold", "freeze", "cudnn_benchmark") if getattr(self, name)]
        compiled = {"off": [], "default": ["compile"]}.get(self.compile, [f"compile={self.compile}"])
        quantized = [] if self.quantize == "none" else [self.quantize]
        more = [*quantized, *flags, *compiled]
        return " ".join([half, *more]) if more or half != "fp32" else "eager fp32"

    @property
    def fixed_batch(self) -> bool:
        """Whether every batch must have the same shape, a short one padded."""
        return self.compile != "off"
