"""Job settings of the model's execution: precision, memory layout, compiler, quantisation, and the autotuner."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from batchjob.settings import Settings

__all__ = ["Acceleration"]


def _convert_bool(value: Any) -> Any:
    """Turn True and False into `on` and `off`: YAML reads a bare `on` or `off` as a truth value."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_convert_bool)]
Compile = Annotated[
    Literal["auto", "on", "off", "regional", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
    BeforeValidator(_convert_bool),
]
Quantize = Annotated[Literal["off", "int8-dynamic", "int8-static", "fp8"], BeforeValidator(_convert_bool)]


class Acceleration(Settings):
    """Ways to run the model faster. `auto` is tried, compared with eager fp32 on the job's images, and timed.

    Attributes:
        precision: Precision of the model's arithmetic; bf16 and fp16 by autocast. `auto` goes as far as
            autocast; it never halves weights or quantises.
        half_weights: With bf16 or fp16, keep the weights in that precision too, without autocast.
        channels_last: Memory layout of images and convolutions.
        fold: Fold batch norms into the convolutions before them.
        compile: Use `torch.compile`: `on`, `regional` (each repeated block), or one of its modes.
        freeze: With `compile`, treat weights as constants.
        quantize: Eight bits by torchao: `int8-dynamic` and `fp8` for linear layers, `int8-static` for convolutions too.
        cudnn_benchmark: Let cuDNN time its algorithms and choose.
        tuning: `off` tries nothing; `on` also tries where a job seems too short to gain by it.
        tuning_budget_s: Time for the trials, in seconds from the start of their process. After that no candidate is
            started, and one that is running is given up.
    """

    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    half_weights: Annotated[Literal["on", "off"], BeforeValidator(_convert_bool)] = "off"
    channels_last: Switch = "auto"
    fold: Switch = "auto"
    compile: Compile = "auto"
    freeze: Switch = "auto"
    quantize: Quantize = "off"
    cudnn_benchmark: Switch = "auto"
    tuning: Switch = "auto"
    tuning_budget_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
