"""Which recipe a device gains by: candidates, the check against eager fp32, paired timings, the decision."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from batchjob.devices import Traits
from batchjob.likeness import Likeness, compare
from batchjob.records import Precision, Recipe
from batchjob.settings import Settings

__all__ = [
    "Acceleration",
    "Decision",
    "Subject",
    "Trial",
    "candidates",
    "choose",
    "pinned",
    "tried",
    "wished",
]

_GAIN = 1.03  # below that it is noise, and eager is simpler
_HOPELESS = 0.7  # a first pair of timings below that needs no second
_PAIRS = range(5, 31)  # timings: so many at least and at most
_PAIRS_SECONDS = 3.0


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


@dataclass(frozen=True)
class Trial:
    """A line of the table.

    Attributes:
        recipe: what was tried.
        verdict: `passed`, or why not.
        passed: it ran, and its outputs are near enough.
        speedup: over eager fp32, median of paired timings; 0 where it was not timed.
        images_per_second: of the forward pass alone: eager fp32's, times `speedup`.
        likeness: None where it did not run.
        warm_up_s: from the module to the first output, compiling included.
    """

    recipe: Recipe
    verdict: str
    passed: bool = False
    speedup: float = 0.0
    images_per_second: float = 0.0
    likeness: Likeness | None = None
    warm_up_s: float = 0.0


@dataclass(frozen=True)
class Decision:
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
    recipe: Recipe
    reason: str
    trials: tuple[Trial, ...] = ()
    seconds: float = 0.0

    def dump(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def parse(cls, data: bytes) -> Decision:
        """Raises ValueError, KeyError or TypeError where it is none of this version's."""
        facts = json.loads(data)
        trials = tuple(_trial(trial) for trial in facts.pop("trials"))
        return cls(**{**facts, "recipe": Recipe(**facts["recipe"]), "trials": trials})

    @property
    def key(self) -> str:
        """Name of its object in the plan's folder `tuning/`."""
        plain = "".join(letter if letter.isalnum() else "-" for letter in f"{self.device}-torch-{self.torch}")
        return f"tuning/{plain}.json"


def _trial(facts: dict[str, Any]) -> Trial:
    likeness = facts["likeness"]
    made = {"recipe": Recipe(**facts["recipe"]), "likeness": None if likeness is None else Likeness(**likeness)}
    return Trial(**{**facts, **made})


# -- candidates ------------------------------------------------------------------------------------------------


def wished(asked: Acceleration) -> Recipe:
    """The recipe with nothing but what the job names: eager fp32 where it leaves everything open."""
    return pinned(Recipe(), asked)


def candidates(asked: Acceleration, device: Traits) -> list[Recipe]:
    """What to try, the quickest to try first; each holds to what the job names. The first is `wished`."""
    curated = [wished(asked), *(pinned(recipe, asked) for recipe in _curated(device))]
    return [recipe for recipe in dict.fromkeys(curated) if _sound(recipe)]


def _curated(device: Traits) -> Iterator[Recipe]:
    """What has been found to win on some model; trying is cheaper than guessing which. Compiling comes last."""
    plain = Recipe()
    fast: list[Precision] = ["bf16"] if device.bf16 else ["fp16"] if device.fp16 else []
    if device.kind == "cuda":
        yield replace(plain, precision="tf32", channels_last=True, cudnn_benchmark=True)
        for precision in fast:
            half = replace(plain, precision=precision, channels_last=True, cudnn_benchmark=True)
            yield from (half, replace(half, compile="default", freeze=True), replace(half, compile="reduce-overhead"))
            yield replace(half, compile="max-autotune")
        return
    yield replace(plain, channels_last=True, fold=True)
    yield from (replace(plain, precision=precision, channels_last=True) for precision in fast)
    yield replace(plain, channels_last=True)
    yield from (replace(plain, precision=precision, compile="default", freeze=True) for precision in (*fast, "fp32"))


def pinned(recipe: Recipe, asked: Acceleration) -> Recipe:
    """The recipe, changed where the job names something else."""
    named: dict[str, Any] = {
        name: getattr(asked, name) == "on"
        for name in ("channels_last", "fold", "freeze", "cudnn_benchmark")
        if getattr(asked, name) != "auto"
    }
    if asked.precision != "auto":
        named["precision"] = asked.precision
    if asked.compile != "auto":
        named["compile"] = "default" if asked.compile == "on" else asked.compile
    named["quantize"] = "none" if asked.quantize == "off" else asked.quantize
    made = replace(recipe, **named)
    return replace(made, half=asked.half_weights == "on" and made.precision in {"bf16", "fp16"})


def _sound(recipe: Recipe) -> bool:
    """Quantised modules are graphs of their own: neither folded nor in half precision; freezing is the compiler's."""
    if recipe.quantize != "none" and (recipe.fold or recipe.precision in {"bf16", "fp16"}):
        return False
    return recipe.compile not in {"off", "regional"} or not recipe.freeze


# -- trials ----------------------------------------------------------------------------------------------------


class Subject:
    """What is tuned, on its device.

    Attributes:
        images: in the batch that `run` sees.
        classes: see `compare`.
    """

    images: int
    classes: bool = True

    def build(self, recipe: Recipe) -> Callable[[], Any]:
        """The model so prepared: each call runs it on the batch, and returns its output once that is there."""
        raise NotImplementedError


def tried(subject: Subject, recipes: Sequence[Recipe]) -> Iterator[Trial]:
    """Eager fp32, then each recipe against it, one at a time, as they are asked for. What fails is a line as well."""
    eager = subject.build(Recipe())
    reference = eager()
    seconds = min(_clocked(eager) for _ in range(3))
    yield Trial(
        Recipe(), "the reference", True, 1.0, subject.images / seconds, Likeness(0.0, 1.0, 1.0), warm_up_s=seconds
    )
    for recipe in recipes:
        if recipe != Recipe():
            yield _tried(subject, recipe, eager, reference, subject.images / seconds)


def _tried(subject: Subject, recipe: Recipe, eager: Callable[[], Any], reference: Any, pace: float) -> Trial:
    began = time.perf_counter()
    try:
        fast = subject.build(recipe)
        likeness = compare(reference, fast(), classes=subject.classes)
        warm_up = time.perf_counter() - began
        if (fault := likeness.fault(recipe)) is not None:
            return Trial(recipe, fault, likeness=likeness, warm_up_s=warm_up)
        speedup = _paired(eager, fast)
    except Exception as error:  # noqa: BLE001 - a candidate that fails is a line in the table, not a failed job
        return Trial(recipe, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Trial(recipe, "passed", True, speedup, pace * speedup, likeness, warm_up)


def _paired(eager: Callable[[], Any], fast: Callable[[], Any]) -> float:
    """Median ratio of timings taken in turn, which a noisy machine cannot tilt."""
    fast()
    ratios: list[float] = []
    began = time.perf_counter()
    while len(ratios) < _PAIRS.stop - 1:
        ratios.append(_clocked(eager) / _clocked(fast))
        if ratios[0] < _HOPELESS or (len(ratios) >= _PAIRS.start and time.perf_counter() - began > _PAIRS_SECONDS):
            break
    return statistics.median(ratios)


def _clocked(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def choose(asked: Acceleration, trials: Iterable[Trial], images: float, checked: int = 0) -> tuple[Recipe, str]:
    """The recipe that is through first with so many images, its warm-up and its check counted, and why.

    What a job names is kept even where it does not win: then the fastest is sought among those that keep to it.

    Args:
        asked: by the job.
        trials: the table.
        images: one batch after the other, as in the trials.
        checked: images that a recipe and eager fp32 run beside these, before it is taken up.
    """
    table = list(trials)
    base = wished(asked)
    eager = next((trial for trial in table if trial.recipe == base and trial.passed), None)
    passed = [trial for trial in table if trial.passed and trial.recipe != Recipe()]
    if eager is None:
        best = max(passed, key=lambda trial: trial.speedup, default=None)
        return (base, "as the job says") if best is None else (best.recipe, f"{best.speedup:.2f} times eager fp32")
    gaining = [trial for trial in passed if trial.speedup > eager.speedup * _GAIN]
    plain = next((trial for trial in table if trial.recipe == Recipe() and trial.passed), eager)

    def through(trial: Trial) -> float:
        return _through(trial, images + checked) + checked / max(plain.images_per_second, 1e-9)

    best = min(gaining, key=through, default=eager)
    if best is eager or through(best) >= (_through(eager, images) if eager is plain else through(eager)):
        return base, "nothing that passed is faster" if not gaining else "the job is too short to gain by it"
    return best.recipe, f"{best.speedup:.2f} times eager fp32"


_WARM = 10.0  # what a second compilation takes at most, with the first one's cache


def _through(trial: Trial, images: float) -> float:
    """Seconds for so many images in a worker that starts with a warm compile cache."""
    return images / max(trial.images_per_second, 1e-9) + min(trial.warm_up_s, _WARM)
