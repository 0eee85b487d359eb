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

from batchjob.concurrency import clean_process_start, exit_with_parent, start_forkserver
from batchjob.inference import cpu_parallelism
from batchjob.inference.autotune.cache import use_compile_cache
from batchjob.inference.autotune.trials import Trial, TrialModel, run_trials
from batchjob.inference.engine import Engine
from batchjob.inference.example_images import random_pixels
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.forward import ForwardPass
from batchjob.job.job import Job
from batchjob.storage.reader import Reader

if TYPE_CHECKING:
    import torch

__all__ = ["TIME_BUDGET_EXCEEDED", "EngineTrialModel", "TrialSpec", "run_isolated_trials"]

TIME_BUDGET_EXCEEDED = "the time was up"
_POLL_SECONDS = 0.5
_FAREWELL_SECONDS = 3.0
_SHARE = 0.6  # of the time left
_LEAST_SECONDS = 30.0
_DISTINCT = 64  # images that are looked at; a larger batch repeats them


@dataclass(frozen=True)
class TrialSpec:
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
    sample_locations: tuple[str, ...]
    batch_size: int
    threads: int


def run_isolated_trials(
    spec: TrialSpec, configs: Sequence[ExecutionConfig], budget: float, is_stopped: Callable[[], bool]
) -> list[Trial]:
    """Eager fp32 and each recipe, a line each; one failed line of eager fp32 where that does not run.

    Args:
        bench: see there.
        recipes: in the order they are tried.
        budget: seconds for all of them, the start of their process included; one that takes more than its share of
            what is left is given up.
        stopped: asked now and then; True ends it.
    """
    made: list[Trial] = []
    left = deque(recipe for recipe in configs if recipe != ExecutionConfig())
    until = time.monotonic() + budget
    while True:
        with _TrialProcess(spec, tuple(left)) as process:
            while isinstance(said := process.next(_share(until) if made else until, is_stopped), Trial):
                if said.recipe != ExecutionConfig():
                    made.append(said)
                    left.popleft()
                elif not made:
                    made.append(said)
        if not made:
            return [Trial(ExecutionConfig(), said or "ended early")]
        if not left:
            return made
        made.append(Trial(left.popleft(), said or "ended early"))
        if not left or time.monotonic() >= until or is_stopped():
            return made + [Trial(recipe, f"not tried, {TIME_BUDGET_EXCEEDED}") for recipe in left]


def _share(until: float) -> float:
    """When one recipe is given up, so that those after it have their turn too."""
    now = time.monotonic()
    return now + max(_SHARE * (until - now), min(_LEAST_SECONDS, until - now))


class _TrialProcess:
    """A process that tries recipes, and all that it has started."""

    def __init__(self, bench: TrialSpec, recipes: tuple[ExecutionConfig, ...]) -> None:
        context = multiprocessing.get_context("forkserver")
        self._lines, theirs = context.Pipe(duplex=False)
        self._finished = False
        self._process = context.Process(target=_try_all, args=(bench, recipes, theirs), name="trial")
        start_forkserver(__name__)
        with clean_process_start():
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
        return "stopped" if stopped() else f"given up, {TIME_BUDGET_EXCEEDED}"

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


def _try_all(bench: TrialSpec, recipes: tuple[ExecutionConfig, ...], lines: Connection) -> None:
    """Send a `Trial` for eager fp32 and for each recipe, then None."""
    with suppress(OSError):
        os.setsid()  # so that the compiler's own processes end with this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=exit_with_parent, name="parent-watch", daemon=True).start()
    use_compile_cache()
    import torch

    cpu_parallelism.retain_freed_memory()  # as the worker does
    torch.set_num_threads(bench.threads)
    job = Job.deserialize(bench.job, bench.base, bench.data_base)
    subject = EngineTrialModel(
        Engine(job, Reader(job.storage), bench.sample_locations), bench.sample_locations, bench.batch_size
    )
    for trial in run_trials(subject, recipes):
        lines.send(trial)
    lines.send(None)


class EngineTrialModel(TrialModel):
    """An engine and a batch of the job's own images.

    Args:
        engine: with its model loaded.
        sample: locations of images.
        batch_size: how many go to the model at once; fewer images are repeated.
    """

    def __init__(self, engine: Engine, sample_locations: Sequence[str], batch_size: int) -> None:
        self._engine = engine
        self.batch_size, self.argmax_is_class = engine.model.batch_size or batch_size, engine.argmax_is_class
        self._pixels = self._batch(sample_locations)
        self._as_it_is = engine.preprocess.transform is not None

    def build(self, config: ExecutionConfig) -> Callable[[], Any]:
        forward, _ = self.build_forward(config), self._inputs  # which are made before a clock runs
        return partial(self.run, forward)

    def build_forward(self, config: ExecutionConfig) -> ForwardPass:
        """The engine's module by that recipe, calibrated on these images where it has to be."""
        import torch

        stacks = self._engine.model.input_kind == "batch"
        return self._engine.build_forward(config, torch.stack(self._pixels) if stacks else None)

    def run(self, forward: ForwardPass) -> Any:
        """Its output for the batch, which lies on the device already, once it is there."""
        import torch

        with forward.disable_gradients():
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
        with engine.build_forward(
            ExecutionConfig()
        ).disable_gradients():  # the tensors of real batches are inference tensors too
            if engine.model.input_kind == "batch":
                return torch.stack(self._pixels).to(engine.device)
            return [pixels.to(engine.device, copy=True) for pixels in self._pixels]

    def _batch(self, sample: Sequence[str]) -> list[torch.Tensor]:
        engine, wanted = self._engine, min(self.batch_size, _DISTINCT)
        alike = (
            pixels
            for pixels in engine.load_images(sample)
            if engine.model.input_kind == "list" or pixels.shape == engine.example_image.shape
        )
        found = list(islice(alike, wanted)) or list(
            random_pixels(engine.example_image.shape, wanted, engine.example_image.dtype)
        )
        return [found[at % len(found)] for at in range(self.batch_size)]
