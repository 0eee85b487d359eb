"""Trials in a disposable process: a config that crashes or hangs there is a failed trial, not a failed job."""

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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from batchjob.concurrency import clean_process_start, exit_with_parent, start_forkserver
from batchjob.inference.autotune.cache import use_compile_cache
from batchjob.inference.autotune.engine_trial import EngineTrialModel
from batchjob.inference.autotune.trials import Trial, run_trials
from batchjob.inference.cpu_parallelism import retain_freed_memory
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.job.job import Job
from batchjob.storage.reader import Reader

__all__ = ["TIME_BUDGET_EXCEEDED", "TrialSpec", "run_isolated_trials"]

# End of the verdict of a config for which there was no time; part of the stored JSON.
TIME_BUDGET_EXCEEDED = "the time was up"

_POLL_SECONDS = 0.5
_EXIT_SECONDS = 3.0
# One config may take this share of the remaining time, or the least time below if that is more.
_TIME_SHARE = 0.6
_MIN_CONFIG_SECONDS = 30.0


@dataclass(frozen=True)
class TrialSpec:
    """Input of a trial process.

    Attributes:
        job: Job in serialized form.
        job_folder: Folder of the job file on this machine.
        data_folder: Folder to which the job's input and output paths are relative.
        sample_locations: Locations of the job's own images.
        batch_size: Images in a call of the model.
        threads: Threads of torch for the model.
        decisions: Decisions of the plan on settings that the job leaves at `auto`, see `Engine.decisions`.
    """

    job: Mapping[str, Any]
    job_folder: Path
    data_folder: Path
    sample_locations: tuple[str, ...]
    batch_size: int
    threads: int
    decisions: Mapping[str, str] = field(default_factory=dict)


def run_isolated_trials(
    spec: TrialSpec, configs: Sequence[ExecutionConfig], budget: float, is_stopped: Callable[[], bool]
) -> list[Trial]:
    """Try eager fp32 and each config in a process of their own.

    After a crash, the rest is tried in a new process.

    Args:
        spec: Job, images and batch size.
        configs: Configs in the order in which they are tried.
        budget: Seconds for all trials, the start of the process included; a config that takes more than its share of
            the remaining time is given up.
        is_stopped: Polled every 0.5 s; True ends the trials.

    Returns:
        A trial for eager fp32 and for each config; only a failed one for eager fp32 if that does not run.
    """
    trials: list[Trial] = []
    remaining = deque(config for config in configs if config != ExecutionConfig())
    deadline = time.monotonic() + budget
    while True:
        with _TrialProcess(spec, tuple(remaining)) as process:
            while isinstance(
                result := process.next(_config_deadline(deadline) if trials else deadline, is_stopped), Trial
            ):
                if result.config != ExecutionConfig():
                    trials.append(result)
                    remaining.popleft()
                elif not trials:
                    trials.append(result)
        if not trials:
            return [Trial(ExecutionConfig(), result or "ended early")]
        if not remaining:
            return trials
        trials.append(Trial(remaining.popleft(), result or "ended early"))
        if not remaining or time.monotonic() >= deadline or is_stopped():
            return trials + [Trial(config, f"not tried, {TIME_BUDGET_EXCEEDED}") for config in remaining]


def _config_deadline(deadline: float) -> float:
    """Return the time at which one config is given up, so that there is time for those after it.

    Example: with 100 s until the deadline a config gets 60 s, with 40 s it gets 30 s, with 20 s it gets 20 s.
    """
    now = time.monotonic()
    return now + max(_TIME_SHARE * (deadline - now), min(_MIN_CONFIG_SECONDS, deadline - now))


class _TrialProcess:
    """Process that tries configs, with all processes that it starts itself."""

    def __init__(self, spec: TrialSpec, configs: tuple[ExecutionConfig, ...]) -> None:
        context = multiprocessing.get_context("forkserver")
        self._trials, child_end = context.Pipe(duplex=False)
        self._finished = False
        self._process = context.Process(target=_send_trials, args=(spec, configs, child_end), name="trial")
        start_forkserver(__name__)
        with clean_process_start():
            self._process.start()
        child_end.close()

    def __enter__(self) -> Self:
        return self

    def next(self, deadline: float, is_stopped: Callable[[], bool]) -> Trial | str | None:
        """Return the next trial, None after the last one, or the reason why the config at work has no result."""
        while not is_stopped() and time.monotonic() < deadline:
            try:
                if self._trials.poll(_POLL_SECONDS):
                    trial: Trial | None = self._trials.recv()
                    self._finished = trial is None
                    return trial
            except (EOFError, OSError):
                self._process.join()
                return _describe_exit(self._process.exitcode)
        return "stopped" if is_stopped() else f"given up, {TIME_BUDGET_EXCEEDED}"

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            # A process that is only killed leaves semaphores behind, of which Python warns at its exit.
            self._process.terminate()
        self._process.join(_EXIT_SECONDS)
        if self._process.is_alive() and self._process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        self._trials.close()


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"crashed (exit code {code})"


def _send_trials(spec: TrialSpec, configs: tuple[ExecutionConfig, ...], connection: Connection) -> None:
    """Send from the trial process a trial for eager fp32 and for each config, then None."""
    with suppress(OSError):
        # Processes that the compiler starts belong to this process group and end with it.
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=exit_with_parent, name="parent-watch", daemon=True).start()
    use_compile_cache()
    # The conditions of the worker: its allocator, and the threads that a batch has there.
    retain_freed_memory()
    torch.set_num_threads(spec.threads)
    job = Job.deserialize(spec.job, spec.job_folder, spec.data_folder)
    engine = Engine(job, Reader(job.storage, within=job.input.prefixes), spec.sample_locations)
    engine.adopt(spec.decisions)
    for trial in run_trials(EngineTrialModel(engine, spec.sample_locations, spec.batch_size), configs):
        connection.send(trial)
    connection.send(None)
