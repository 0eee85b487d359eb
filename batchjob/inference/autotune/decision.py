"""Tuning decision: chooses one execution config (such as compiled bf16) from the trials on a device."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from batchjob.inference.autotune.trials import Trial
from batchjob.inference.execution_config import ExecutionConfig, requested_config
from batchjob.inference.output_comparison import OutputComparison
from batchjob.job.acceleration import Acceleration

__all__ = ["TuningDecision", "choose_config"]

# Name of a field -> its key in the stored JSON, where they differ.
_STORED_KEYS = {"config": "recipe", "comparison": "likeness"}
_FIELD_NAMES = {key: name for name, key in _STORED_KEYS.items()}
# Speed relative to the requested config, below which a gain is noise and the simpler config stays.
_MIN_GAIN = 1.03
# Most seconds that a second compilation takes, with the compile cache of the first one.
_CACHED_WARM_UP_SECONDS = 10.0


@dataclass(frozen=True)
class TuningDecision:
    """Execution config for one kind of device.

    Attributes:
        device: Name of the device, see `DeviceCapabilities`.
        torch: Version of torch.
        config: Execution config that was chosen.
        reason: Reason of the choice, in words.
        trials: All trials, eager fp32 first; empty if none was made.
        seconds: Time that the decision took, in seconds.
    """

    device: str
    torch: str
    config: ExecutionConfig
    reason: str
    trials: tuple[Trial, ...] = ()
    seconds: float = 0.0

    def dump(self) -> bytes:
        """Return the decision as JSON."""
        record = _rename_keys(asdict(self), _STORED_KEYS)
        record["trials"] = [_rename_keys(trial, _STORED_KEYS) for trial in record["trials"]]
        return json.dumps(record, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes) -> TuningDecision:
        """Read a decision from JSON.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: The data was not written by this version.
        """
        record = _rename_keys(json.loads(data), _FIELD_NAMES)
        trials = tuple(_parse_trial(_rename_keys(trial, _FIELD_NAMES)) for trial in record.pop("trials"))
        return cls(**{**record, "config": ExecutionConfig(**record["config"]), "trials": trials})

    @property
    def key(self) -> str:
        """Key of the decision below the plan's folder: one for each name of a device and version of torch."""
        name = "".join(letter if letter.isalnum() else "-" for letter in f"{self.device}-torch-{self.torch}")
        return f"tuning/{name}.json"


def choose_config(
    settings: Acceleration, trials: Iterable[Trial], images: float, check_images: int = 0
) -> tuple[ExecutionConfig, str]:
    """Choose the config with which a worker finishes first, its warm-up and its check included.

    A config that the job names is kept even if it is slower; the fastest of those with it is chosen.

    Example: 500 images, eager fp32 at 100 images/s, a compiled config at 160 images/s after 5 s of warm-up: 5.0 s
    against 3.1 s + 5 s, so eager fp32 is chosen.

    Args:
        settings: Settings of the job.
        trials: Results of the trials.
        images: Images that the worker will predict, one batch after the other as in the trials.
        check_images: Images that eager fp32 and the chosen config each predict once more, as its check.

    Returns:
        The config, and the reason of the choice.
    """
    table = list(trials)
    requested = requested_config(settings)
    baseline = next((trial for trial in table if trial.config == requested and trial.passed), None)
    passed = [trial for trial in table if trial.passed and trial.config != ExecutionConfig()]
    if baseline is None:
        best = max(passed, key=lambda trial: trial.speedup, default=None)
        return (requested, "as the job says") if best is None else (best.config, _describe_speedup(best))
    faster = [trial for trial in passed if trial.speedup > baseline.speedup * _MIN_GAIN]
    eager = next((trial for trial in table if trial.config == ExecutionConfig() and trial.passed), baseline)

    def checked_seconds(trial: Trial) -> float:
        return _run_seconds(trial, images + check_images) + check_images / max(eager.images_per_second, 1e-9)

    best = min(faster, key=checked_seconds, default=baseline)
    # Eager fp32 needs no check.
    baseline_seconds = _run_seconds(baseline, images) if baseline is eager else checked_seconds(baseline)
    if best is baseline or checked_seconds(best) >= baseline_seconds:
        return requested, "nothing that passed is faster" if not faster else "the job is too short to gain by it"
    return best.config, _describe_speedup(best)


def _describe_speedup(trial: Trial) -> str:
    return f"{trial.speedup:.2f} times eager fp32"


def _run_seconds(trial: Trial, images: float) -> float:
    """Return the seconds for a number of images in a worker that starts with a filled compile cache."""
    return images / max(trial.images_per_second, 1e-9) + min(trial.warm_up_s, _CACHED_WARM_UP_SECONDS)


def _parse_trial(record: dict[str, Any]) -> Trial:
    comparison = record["comparison"]
    parsed = {
        "config": ExecutionConfig(**record["config"]),
        "comparison": None if comparison is None else OutputComparison(**comparison),
    }
    return Trial(**{**record, **parsed})


def _rename_keys(record: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in record.items()}
