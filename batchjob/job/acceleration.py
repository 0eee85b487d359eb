"""Which recipe a device gains by: candidates, the check against eager fp32, paired timings, the decision."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from batchjob.settings import Settings

__all__ = ["Acceleration"]


def _switch(value: Any) -> Any:
    """YAML reads a bare `on` or `off` as a truth value."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
Compile = Annotated[
    Literal["auto", "on", "off", "regional", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
    BeforeValidator(_switch),
]
Quantize = Annotated[Literal["off", "int8-dynamic", "int8-static", "fp8"], BeforeValidator(_switch)]


class Acceleration(Settings):
    """How the model is made fast. `auto` is tried, checked against eager fp32 on the job's images, and timed.

    Attributes:
        precision: of the model's arithmetic: bf16 and fp16 by autocast; `auto` goes no lower than that.
        half_weights: with bf16 or fp16, the weights too are in that precision, without autocast.
        channels_last: memory layout of images and convolutions.
        fold: fold batch norms into their convolutions.
        compile: `torch.compile`: `on`, `regional` (each repeated block), or a mode of its own.
        freeze: with `compile`: weights are constants to the compiler.
        quantize: eight bits by torchao: `int8-dynamic` and `fp8` for linear layers, `int8-static` for convolutions too.
        cudnn_benchmark: let cuDNN try its algorithms.
        tuning: `off` tries nothing; `on` also where a job seems too short to gain by it.
        tuning_budget_s: seconds, from the start of the process that tries them, after which no further candidate is
            begun, and one at work is given up.
    """

    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    half_weights: Annotated[Literal["on", "off"], BeforeValidator(_switch)] = "off"
    channels_last: Switch = "auto"
    fold: Switch = "auto"
    compile: Compile = "auto"
    freeze: Switch = "auto"
    quantize: Quantize = "off"
    cudnn_benchmark: Switch = "auto"
    tuning: Switch = "auto"
    tuning_budget_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
