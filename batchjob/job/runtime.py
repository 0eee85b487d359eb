"""`Job`: everything a run needs to know, as one frozen model made of the settings of the rooms below.

Read from a job file with every fault named at its line, or built in Python. Its fingerprint decides whether an output
belongs to it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from batchjob.job.acceleration import Acceleration
from batchjob.loader.settings import LoaderSettings
from batchjob.settings import Settings, Uri

__all__ = ["ErrorBudget", "Output", "Runtime", "Workers"]

Auto = Literal["auto"]
AtLeastOne = Annotated[int, Field(ge=1)]


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d+)?", value):
        raise ValueError(f"must be auto, cuda, cuda:N, mps, xpu or cpu, not {value!r}")
    return value


class Workers(Settings):
    """How many workers a run may have.

    Attributes:
        min: so many before work starts.
        max: never more than this.
    """

    min: AtLeastOne = 1
    max: AtLeastOne

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"has max {self.max} below min {self.min}")
        return self


class Runtime(Acceleration):
    """Where and how the job runs. Of all this only `precision`, `half_weights` and `quantize` alter a prediction.

    Attributes:
        pool: `ray` runs workers as Ray actors; `local` one worker in this process.
        workers: how many workers; a number, or `min` and `max`.
        gpus_per_worker: GPUs that each worker is given; may be a fraction.
        cpus_per_worker: cores that each worker is given, its loader processes included.
        device: auto, cuda, cuda:N, mps, xpu or cpu; one that is asked for and absent is an error.
        batch_size: images in a batch.
        grad_mode: `no_grad` for models that fail under inference mode.
        shard_size: images in a shard, the unit that is committed.
        loader: how images reach the model.
        stall_seconds: that one batch may take in the model, and its loader or, beyond `errors.outage_seconds`, its
            store go without a sign of life; then a worker is replaced, and on the local pool the run ends. Loading,
            tuning and compiling do not count.
    """

    pool: Literal["ray", "local"] = "ray"
    workers: AtLeastOne | Auto | Workers = "auto"
    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Auto = "auto"
    cpus_per_worker: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Auto = "auto"
    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    batch_size: AtLeastOne | Auto = "auto"
    grad_mode: Literal["inference", "no_grad"] = "inference"
    shard_size: AtLeastOne | Auto = "auto"
    loader: LoaderSettings = LoaderSettings()
    stall_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0


class ErrorBudget(Settings):
    """How much may go wrong.

    Attributes:
        max_rate: share of images that may be error rows; over it the run ends with exit 3 and no `_SUCCESS`.
        max_count: error rows that there may be in all; null counts none.
        abort_early: stop as soon as it is certain that the run will be over one of the two.
        attempts: how often a shard is tried before it is given up.
        retries: how often an image that cannot be read, for a reason that may pass, is asked for again while other
            images of its store can be read, before it is an error row; each time it is retried for up to 30 seconds.
        outage_seconds: how long a store that does not answer at all is waited for, once work has begun, before the run
            ends with exit 75. Faults of network and credentials use up no attempts and leave no rows.
    """

    max_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_count: Annotated[int, Field(ge=0)] | None = None
    abort_early: bool = True
    attempts: AtLeastOne = 3
    retries: Annotated[int, Field(ge=0)] = 2
    outage_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 360.0


class Output(Settings):
    """Where the rows go.

    Attributes:
        uri: folder of the output, a local path or a URI; `predictions/` and `_SUCCESS` appear in it.
    """

    uri: Uri
