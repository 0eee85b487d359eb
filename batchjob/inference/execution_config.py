"""Execution config: the precision (fp32, tf32, bf16, fp16), memory layout, compile mode and quantisation of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from batchjob.job.acceleration import Acceleration

if TYPE_CHECKING:
    import torch

__all__ = ["ExecutionConfig", "Precision", "config_of_weights", "requested_config", "with_overrides"]

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp64"]


@dataclass(frozen=True)
class ExecutionConfig:
    """Options by which a model runs on its device; the default is eager fp32, the reference for all others.

    The field names are keys of the stored tuning decisions.

    Attributes:
        precision: Precision of the arithmetic; bf16 and fp16 use autocast, fp64 is for modules with such weights.
        half: With bf16 or fp16, the weights have that precision too, in place of autocast.
        channels_last: Store images and convolution weights in channels-last memory layout.
        fold: Fold batch norms into the convolutions before them.
        compile: Mode of `torch.compile`; `regional` compiles each repeated block, `off` does not compile.
        freeze: With `compile`, treat the weights as constants.
        quantize: Eight-bit quantisation by torchao; `none` keeps floating point.
        cudnn_benchmark: Let cuDNN time its convolution algorithms and take the fastest.
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
        """Short text for people, such as `bf16 channels_last compile` or `eager fp32`."""
        precision = f"{self.precision} weights" if self.half else self.precision
        flags = [name for name in ("channels_last", "fold", "freeze", "cudnn_benchmark") if getattr(self, name)]
        compiled = {"off": [], "default": ["compile"]}.get(self.compile, [f"compile={self.compile}"])
        quantized = [] if self.quantize == "none" else [self.quantize]
        options = [*quantized, *flags, *compiled]
        return " ".join([precision, *options]) if options or precision != "fp32" else "eager fp32"

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weights and inputs; autocast computes in another one."""
        import torch

        if self.precision == "fp64":
            return torch.float64
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return half[self.precision] if self.half else torch.float32

    @property
    def fixed_batch(self) -> bool:
        """True if all batches must have one shape, so that short ones are padded; compiled modules need it."""
        return self.compile != "off"


def config_of_weights(dtype: torch.dtype) -> ExecutionConfig:
    """Return the config of a module that runs as it was loaded, with weights of this dtype."""
    import torch

    if dtype == torch.float64:
        return ExecutionConfig(precision="fp64")
    half: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return ExecutionConfig(precision=half[dtype], half=True) if dtype in half else ExecutionConfig()


def requested_config(settings: Acceleration, loaded: ExecutionConfig | None = None) -> ExecutionConfig:
    """Return the config with only what the job names.

    Args:
        settings: Settings of the job; `auto` leaves an option as it is.
        loaded: Config of the module as it was loaded; None for eager fp32.
    """
    loaded = loaded or ExecutionConfig()
    config = with_overrides(loaded, settings)
    # Weights that have the precision already need no autocast.
    return replace(config, half=True) if loaded.half and config.precision == loaded.precision else config


def with_overrides(config: ExecutionConfig, settings: Acceleration) -> ExecutionConfig:
    """Return the config with each option that the job names in place of its own; options at `auto` stay.

    Example: `with_overrides(ExecutionConfig(fold=True, channels_last=True), Acceleration(fold="off"))` is
    `ExecutionConfig(channels_last=True)`.
    """
    named: dict[str, Any] = {
        name: getattr(settings, name) == "on"
        for name in ("channels_last", "fold", "freeze", "cudnn_benchmark")
        if getattr(settings, name) != "auto"
    }
    if settings.precision != "auto":
        named["precision"] = settings.precision
    if settings.compile != "auto":
        named["compile"] = "default" if settings.compile == "on" else settings.compile
    named["quantize"] = "none" if settings.quantize == "off" else settings.quantize
    changed = replace(config, **named)
    return replace(changed, half=settings.half_weights == "on" and changed.precision in {"bf16", "fp16"})
