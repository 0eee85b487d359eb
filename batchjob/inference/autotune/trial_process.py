"""Recipes tried in a throw-away process: one that crashes or hangs there is a line in the table, not a failed job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from batchjob.concurrency import end_with_parent, preload, starting
from batchjob.inference import cpu_parallelism
from batchjob.inference.autotune.cache import use_compile_cache
from batchjob.inference.autotune.trials import Subject, Trial, tried
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import Recipe
from batchjob.inference.forward import Forward
from batchjob.inference.predictor import random_pixels
from batchjob.job.job import Job
from batchjob.storage.reader import Reader

if TYPE_CHECKING:
    import torch

__all__ = ["TIME_WAS_UP", "Bench", "Images", "table"]

TIME_WAS_UP = "the time was up"
_POLL_SECONDS = 0.5
_FAREWELL_SECONDS = 3.0
_SHARE = 0.6  # of the time left
_LEAST_SECONDS = 30.0
_DISTINCT = 64  # images that are looked at; a larger batch repeats them


@dataclass(frozen=True)
class Bench:
    """What a throw-away process needs to know.

    Attributes:
        job: in portable form.
        base: the job's folder here.
        data_base: the folder that its input and output paths mean.
        sample: locations of the job's own images.
        batch_size: images a call.
        threads: of torch, for the model.
    """

    job: Mapping[str, Any]
    base: Path
    data_base: Path
    sample: tuple[str, ...]
    batch_size: int
    threads: int


def table(bench: Bench, recipes: Sequence[Recipe], budget: float, stopped: Callable[[], bool]) -> list[Trial]:
    """Eager fp32 and each recipe, a line each; one failed line of eager fp32 where that does not run.

    Args:
        bench: see there.
        recipes: in the order they are tried.
        budget: seconds for all of them, the start of their process included; one that takes more than its share of
            what is left is given up.
        stopped: asked now and then; True ends it.
    """
    made: list[Trial] = []
    left = deque(recipe for recipe in recipes if recipe != Recipe())
    until = time.monotonic() + budget
    while True:
        with _Process(bench, tuple(left)) as process:
            while isinstance(said := process.next(_share(until) if made else until, stopped), Trial):
                if said.recipe != Recipe():
                    made.append(said)
                    left.popleft()
                elif not made:
                    made.append(said)
        if not made:
            return [Trial(Recipe(), said or "ended early")]
        if not left:
            return made
        made.append(Trial(left.popleft(), said or "ended early"))
        if not left or time.monotonic() >= until or stopped():
            return made + [Trial(recipe, f"not tried, {TIME_WAS_UP}") for recipe in left]


def _share(until: float) -> float:
    """When one recipe is given up, so that those after it have their turn too."""
    now = time.monotonic()
    return now + max(_SHARE * (until - now), min(_LEAST_SECONDS, until - now))


class _Process:
    """A process that tries recipes, and all that it has started."""

    def __init__(self, bench: Bench, recipes: tuple[Recipe, ...]) -> None:
        context = multiprocessing.get_context("forkserver")
        self._lines, theirs = context.Pipe(duplex=False)
        self._finished = False
        self._process = context.Process(target=_try_all, args=(bench, recipes, theirs), name="trial")
        preload(__name__)
        with starting():
            self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def next(self, until: float, stopped: Callable[[], bool]) -> Trial | str | None:
        """The next line; None after the last; else what has become of the recipe at work."""
        while not stopped() and time.monotonic() < until:
            try:
                if self._lines.poll(_POLL_SECONDS):
                    said: Trial | None = self._lines.recv()
                    self._finished = said is None
                    return said
            except (EOFError, OSError):
                self._process.join()
                return _fate(self._process.exitcode)
        return "stopped" if stopped() else f"given up, {TIME_WAS_UP}"

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            self._process.terminate()  # kill alone would leave semaphores behind, which are complained of at our exit
        self._process.join(_FAREWELL_SECONDS)
        if self._process.is_alive() and self._process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        self._lines.close()


def _fate(code: int | None) -> str:
    if code is not None and code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"crashed (exit code {code})"


def _try_all(bench: Bench, recipes: tuple[Recipe, ...], lines: Connection) -> None:
    """Send a `Trial` for eager fp32 and for each recipe, then None."""
    with suppress(OSError):
        os.setsid()  # so that the compiler's own processes end with this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=end_with_parent, name="parent-watch", daemon=True).start()
    use_compile_cache()
    import torch

    cpu_parallelism.keep()  # as the worker does
    torch.set_num_threads(bench.threads)
    job = Job.from_portable(bench.job, bench.base, bench.data_base)
    subject = Images(Engine(job, Reader(job.storage), bench.sample), bench.sample, bench.batch_size)
    for trial in tried(subject, recipes):
        lines.send(trial)
    lines.send(None)


class Images(Subject):
    """An engine and a batch of the job's own images.

    Args:
        engine: with its model loaded.
        sample: locations of images.
        batch_size: how many go to the model at once; fewer images are repeated.
    """

    def __init__(self, engine: Engine, sample: Sequence[str], batch_size: int) -> None:
        self._engine = engine
        self.images, self.classes = engine.model.batch_size or batch_size, engine.classes
        self._pixels = self._batch(sample)
        self._as_it_is = engine.preprocess.transform is not None

    def build(self, recipe: Recipe) -> Callable[[], Any]:
        forward, _ = self.forward(recipe), self._inputs  # which are made before a clock runs
        return partial(self.run, forward)

    def forward(self, recipe: Recipe) -> Forward:
        """The engine's module by that recipe, calibrated on these images where it has to be."""
        import torch

        stacks = self._engine.model.takes == "batch"
        return self._engine.forward(recipe, torch.stack(self._pixels) if stacks else None)

    def run(self, forward: Forward) -> Any:
        """Its output for the batch, which lies on the device already, once it is there."""
        import torch

        with forward.modes():
            inputs = self._inputs
            if self._as_it_is:  # the module gets these very tensors, and may write into them
                inputs = [one.clone() for one in inputs] if isinstance(inputs, list) else inputs.clone()
            output = forward(inputs)
            if forward.device.type == "cuda":
                torch.cuda.synchronize(forward.device)
        return output

    @cached_property
    def _inputs(self) -> torch.Tensor | list[torch.Tensor]:
        """The batch as real ones reach the module: on the device, in one piece unless it takes a list."""
        import torch

        engine = self._engine
        with engine.forward(Recipe()).modes():  # the tensors of real batches are inference tensors too
            if engine.model.takes == "batch":
                return torch.stack(self._pixels).to(engine.device)
            return [pixels.to(engine.device, copy=True) for pixels in self._pixels]

    def _batch(self, sample: Sequence[str]) -> list[torch.Tensor]:
        engine, wanted = self._engine, min(self.images, _DISTINCT)
        alike = (
            pixels
            for pixels in engine.prepared(sample)
            if engine.model.takes == "list" or pixels.shape == engine.example.shape
        )
        found = list(islice(alike, wanted)) or list(random_pixels(engine.example.shape, wanted, engine.example.dtype))
        return [found[at % len(found)] for at in range(self.images)]
