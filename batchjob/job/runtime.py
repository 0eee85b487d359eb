"""Job settings of a run: workers, devices, batches, error budget and output."""

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
_RAY_UNIT = 0.0001  # smallest part of a CPU or GPU that Ray counts


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d+)?", value):
        raise ValueError(f"must be auto, cuda, cuda:N, mps, xpu or cpu, not {value!r}")
    return value


def _check_gpus(value: float) -> float:
    """Check GPUs as Ray does: parts of one GPU, or whole ones, in units of 0.0001."""
    if value > 1 and value != int(value):
        raise ValueError(f"must be a whole number or at most 1, not {value:g}: no worker gets parts of two GPUs")
    if 0 < value < _RAY_UNIT:
        raise ValueError(f"must be 0 or at least {_RAY_UNIT}, not {value:g}")
    return value


def _check_cpus(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"must be a whole number or at most 1, not {value:g}: a worker uses whole cores")
    if value < _RAY_UNIT:
        raise ValueError(f"must be at least {_RAY_UNIT}, not {value:g}")
    return value


class Workers(Settings):
    """Number of workers of a run.

    Attributes:
        min: Workers that must be ready before work starts.
        max: Most workers at any time.
    """

    min: AtLeastOne = 1
    max: AtLeastOne

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"has max {self.max} below min {self.min}")
        return self


class Runtime(Acceleration):
    """Place and manner of a run. Only `precision`, `half_weights` and `quantize`
    change predictions by more than rounding.

    Attributes:
        pool: `ray` runs workers as Ray actors, `local` runs one worker in this process.
        workers: Number of workers, or a section with `min` and `max`.
        gpus_per_worker: GPUs of each worker: a whole number, or a fraction of one GPU.
        cpus_per_worker: Cores of each worker, its loader processes included: a whole number, or a fraction of one
            core.
        device: auto, cuda, cuda:N, mps, xpu or cpu. A device that is asked for and absent is an error.
        batch_size: Images in a batch.
        grad_mode: `no_grad` for models that fail under inference mode.
        shard_size: Images in a shard, the unit that is committed.
        loader: Loading of images.
        stall_seconds: Time after which a worker that shows no progress is replaced, in seconds; on the local pool the
            run ends. It limits one batch in the model and one wait for the loader. A wait for a store may take
            `errors.outage_seconds` longer. Loading the model, tuning and compiling do not count.
    """

    pool: Literal["ray", "local"] = "ray"
    workers: AtLeastOne | Auto | Workers = "auto"
    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_check_gpus)] | Auto = "auto"
    cpus_per_worker: Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_check_cpus)] | Auto = "auto"
    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    batch_size: AtLeastOne | Auto = "auto"
    grad_mode: Literal["inference", "no_grad"] = "inference"
    shard_size: AtLeastOne | Auto = "auto"
    loader: LoaderSettings = LoaderSettings()
    stall_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0

    @property
    def requested_workers(self) -> int:
        """Most workers that the job asks for; 1 if it leaves that open."""
        return self.workers.max if isinstance(self.workers, Workers) else 1 if self.workers == "auto" else self.workers


class ErrorBudget(Settings):
    """Limits on errors.

    Attributes:
        max_rate: Largest share of images that may be error rows. Above it the run ends with exit 3, without `_SUCCESS`.
        max_count: Most error rows; null sets no limit.
        abort_early: Stop as soon as it is certain that the run will exceed one of these two.
        attempts: Attempts at a shard before it is given up.
        retries: Further reads of an image that cannot be read for a reason that may pass, while other images of its
            store can be read; after them it is an error row. Each read is retried for up to 30 seconds.
        outage_seconds: Time to wait for a store that does not answer at all, in seconds, once work has begun; then the
            run ends with exit 75. Network and credential faults use up no attempts and leave no error rows.
    """

    max_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_count: Annotated[int, Field(ge=0)] | None = None
    abort_early: bool = True
    attempts: AtLeastOne = 3
    retries: Annotated[int, Field(ge=0)] = 2
    outage_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 360.0


class Output(Settings):
    """Place of the output.

    Attributes:
        uri: Folder of the output, a local path or a URI. `predictions/` and `_SUCCESS` appear in it.
    """

    uri: Uri
