"""Which recipe a device gains by: candidates, the check against eager fp32, paired timings, the decision."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from batchjob.inference.autotune.trials import _GAIN, Trial
from batchjob.inference.execution_config import ExecutionConfig, requested_config
from batchjob.inference.output_comparison import OutputComparison
from batchjob.job.acceleration import Acceleration

__all__ = ["TuningDecision", "choose_config"]


@dataclass(frozen=True)
class TuningDecision:
    """What a device of that name is to do, and how that was found.

    Attributes:
        device: its name.
        torch: version.
        recipe: chosen.
        reason: in words.
        trials: the table, eager fp32 first.
        seconds: that finding it took.
    """

    device: str
    torch: str
    recipe: ExecutionConfig
    reason: str
    trials: tuple[Trial, ...] = ()
    seconds: float = 0.0

    def dump(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def parse(cls, data: bytes) -> TuningDecision:
        """Raises ValueError, KeyError or TypeError where it is none of this version's."""
        facts = json.loads(data)
        trials = tuple(_trial(trial) for trial in facts.pop("trials"))
        return cls(**{**facts, "recipe": ExecutionConfig(**facts["recipe"]), "trials": trials})

    @property
    def key(self) -> str:
        """Name of its object in the plan's folder `tuning/`."""
        plain = "".join(letter if letter.isalnum() else "-" for letter in f"{self.device}-torch-{self.torch}")
        return f"tuning/{plain}.json"


def _trial(facts: dict[str, Any]) -> Trial:
    likeness = facts["likeness"]
    made = {
        "recipe": ExecutionConfig(**facts["recipe"]),
        "likeness": None if likeness is None else OutputComparison(**likeness),
    }
    return Trial(**{**facts, **made})


def choose_config(
    settings: Acceleration, trials: Iterable[Trial], images: float, check_images: int = 0
) -> tuple[ExecutionConfig, str]:
    """The recipe that is through first with so many images, its warm-up and its check counted, and why.

    What a job names is kept even where it does not win: then the fastest is sought among those that keep to it.

    Args:
        asked: by the job.
        trials: the table.
        images: one batch after the other, as in the trials.
        checked: images that a recipe and eager fp32 run beside these, before it is taken up.
    """
    table = list(trials)
    base = requested_config(settings)
    eager = next((trial for trial in table if trial.recipe == base and trial.passed), None)
    passed = [trial for trial in table if trial.passed and trial.recipe != ExecutionConfig()]
    if eager is None:
        best = max(passed, key=lambda trial: trial.speedup, default=None)
        return (base, "as the job says") if best is None else (best.recipe, f"{best.speedup:.2f} times eager fp32")
    gaining = [trial for trial in passed if trial.speedup > eager.speedup * _GAIN]
    plain = next((trial for trial in table if trial.recipe == ExecutionConfig() and trial.passed), eager)

    def through(trial: Trial) -> float:
        return _through(trial, images + check_images) + check_images / max(plain.images_per_second, 1e-9)

    best = min(gaining, key=through, default=eager)
    if best is eager or through(best) >= (_through(eager, images) if eager is plain else through(eager)):
        return base, "nothing that passed is faster" if not gaining else "the job is too short to gain by it"
    return best.recipe, f"{best.speedup:.2f} times eager fp32"


_WARM = 10.0  # what a second compilation takes at most, with the first one's cache


def _through(trial: Trial, images: float) -> float:
    """Seconds for so many images in a worker that starts with a warm compile cache."""
    return images / max(trial.images_per_second, 1e-9) + min(trial.warm_up_s, _WARM)
