"""The pool on Ray: one actor a worker, each holding a `LocalPool`; the only file that imports ray.

Ray carries shard keys, events and nothing else. Lost actors are replaced here; the shards they held come back to the
driver as failed attempts, of which only the one at work counts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchjob.errors import AttemptFailed, BatchjobError, Interrupted, InvalidJob, Temporary
from batchjob.job import Job, Workers
from batchjob.local import LocalPool, account, as_crash
from batchjob.placement import Placement
from batchjob.pool import Done, Event, Failed, Ready, Setup, WorkerFailed
from batchjob.records import ShardKey

__all__ = ["RayPool"]

_POLL_SECONDS = 5.0
_DEATHS_IN_A_ROW = 3
_START_SECONDS = 60.0
_SCHEDULE_SECONDS = 900.0
_PULSE_SECONDS = 5.0
_SILENT_SECONDS = 30.0  # without a head, Ray ends the driver's process after 60, with an exit code of its own
_CLOSE_SECONDS = 15.0
_FAREWELL_SECONDS = 5.0  # for the actors to clear away what is theirs, before they are killed
_OBJECT_STORE_BYTES = 128 << 20  # events only; what plasma takes of /dev/shm, the loaders lack
_UNSHIPPED = (".git", ".venv", "__pycache__", "*.pyc")


@dataclass(frozen=True)
class _Layout:
    """What the actors ask for."""

    workers: int
    least: int
    cpus: float
    gpus: float


@dataclass
class _Slot:
    """One actor, and the open question what happened there."""

    name: str
    actor: Any
    poll: Any
    ready: bool = False


class _Worker:
    """The actor: a `LocalPool` at the other end of a wire."""

    def __init__(self, cores: int, folder: str | None, setup: Setup) -> None:
        self._pool = LocalPool(cores, base=Path.cwd() / folder if folder is not None else None)
        self._pool.start(setup)

    def submit(self, key: ShardKey, plan: int) -> None:
        self._pool.submit(key, plan)

    def wait(self, timeout: float) -> list[Event]:
        return self._pool.wait(timeout)

    def close(self) -> None:
        self._pool.close()


class RayPool:
    """Ray actors, on a cluster or on a Ray started for this run. See `Pool`.

    Args:
        job: its `runtime` says how many workers of what size.
        address: of a cluster; None starts a local Ray that ends with the run.
    """

    def __init__(self, job: Job, address: str | None) -> None:
        if find_spec("ray") is None:
            raise InvalidJob(
                "runtime.pool: ray is not installed here; pip install 'ray[default]', or run with --pool local"
            )
        self._job, self._address = job, address
        self._slots: list[_Slot] = []
        self._events: list[Event] = []
        self._layout: _Layout | None = None
        self._setup: Setup | None = None
        self._placement = Placement()
        self._enough_at = time.monotonic()
        self._deaths = 0
        self._pulse: _Pulse | None = None
        self._started = threading.Event()
        self._closed = threading.Event()

    @property
    def size(self) -> int:
        return self._layout.workers if self._layout else 0

    def start(self, setup: Setup) -> None:
        self._setup = setup
        threading.Thread(target=self._start, name="ray-start", daemon=True).start()

    def free(self) -> int:
        return self._placement.free()

    def submit(self, key: ShardKey, plan: int) -> None:
        self._placement.submit(key, plan)
        self._hand_over()

    def wait(self, timeout: float) -> list[Event]:
        if not self._started.wait(timeout):
            return []
        events, self._events = self._events, []
        if self._pulse is not None and (lost := self._pulse.lost()):
            return [*events, WorkerFailed(Temporary(f"{self._where} {lost}; the same command resumes"))]
        if self._slots:
            events += self._poll(0.0 if events else timeout)
        self._hand_over()
        return events + self._too_few()

    def close(self) -> None:
        self._started.wait(_START_SECONDS)
        if self._pulse is not None:
            self._pulse.stop()
        leaving = threading.Thread(target=self._leave, name="ray-stop", daemon=True)
        leaving.start()
        leaving.join(_CLOSE_SECONDS)  # a Ray that is gone may never answer
        self._closed.set()

    def _leave(self) -> None:
        import ray

        farewells = [slot.actor.close.remote() for slot in self._slots if slot.ready]
        if farewells:
            ray.wait(farewells, num_returns=len(farewells), timeout=_FAREWELL_SECONDS)
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots.clear()
        ray.shutdown()

    @property
    def _where(self) -> str:
        return f"the cluster at {self._address}" if self._address else "a local Ray"

    # -- starting ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            with self._usable():
                self._connect()
                self._pulse = _Pulse()
                nodes = _nodes()
            self._layout = _plan_layout(self._job, nodes)
            self._placement = Placement(self._layout.least)
            with self._usable():
                for number in range(self._layout.workers):
                    self._slots.append(self._hire(f"{number}"))
        except Exception as error:  # noqa: BLE001 - the driver is told, not this thread's stderr
            self._events.append(WorkerFailed(as_crash(error)))
        finally:
            self._started.set()
            self._closed.wait()  # Linux ends a local Ray's processes with the thread that started them

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Around calls of Ray: what they raise is no bug of ours."""
        try:
            yield
        except Exception as error:
            raise Temporary(f"{self._where} could not be used: {_first_line(error)}") from error

    def _connect(self) -> None:
        import ray

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a worker without GPUs must see none
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
        if self._address:
            ray.init(address=self._address, runtime_env=self._runtime_env(), **quiet)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)

    def _runtime_env(self) -> dict[str, Any] | None:
        """Ship the job's folder, unless Ray has shipped it already (`ray job submit --working-dir`)."""
        if _submitted():
            return None
        base = self._job.base
        data = (Path(uri) for uri in (self._job.input.uri, self._job.output.uri))
        inside = [f"/{path.relative_to(base)}" for path in data if path.is_relative_to(base)]
        return {"working_dir": str(base), "excludes": [*_UNSHIPPED, *inside]}

    def _folder(self) -> str | None:
        """The job's folder relative to a worker's working directory; None where the driver's own path holds."""
        if not self._address:
            return None
        if _submitted():
            return os.path.relpath(self._job.base, Path.cwd())
        return "."

    def _hire(self, name: str) -> _Slot:
        import ray

        assert self._layout is not None
        options: dict[str, Any] = {
            "num_cpus": self._layout.cpus,
            "num_gpus": self._layout.gpus,
            "max_concurrency": 4,
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}},
        }
        cores = max(1, int(self._layout.cpus))
        actor: Any = ray.remote(**options)(_Worker).remote(cores, self._folder(), self._setup)
        return _Slot(name, actor, actor.wait.remote(_POLL_SECONDS))

    # -- listening ---------------------------------------------------------------------------------------------

    def _poll(self, timeout: float) -> list[Event]:
        import ray

        answered, _ = ray.wait([slot.poll for slot in self._slots], timeout=timeout)
        events: list[Event] = []
        for slot in [slot for slot in self._slots if slot.poll in answered]:
            try:
                told = ray.get(slot.poll)
            except ray.exceptions.RayError as error:
                events += [_crashed(slot, error)] if _is_bug(error) else self._replace(slot, error)
                continue
            slot.poll = slot.actor.wait.remote(_POLL_SECONDS)
            events += [self._account(slot, event) for event in told]
        return events

    def _hand_over(self) -> None:
        actors = {slot.name: slot.actor for slot in self._slots}
        for due in self._placement.due():
            actors[due.worker].submit.remote(due.key, due.plan)

    def _account(self, slot: _Slot, event: Event) -> Event:
        account(self._placement, slot.name, event)
        match event:
            case Ready(_, loaded):
                slot.ready = True
                return Ready(slot.name, loaded)
            case Done():
                self._deaths = 0
        return event

    def _replace(self, slot: _Slot, error: Exception) -> list[Event]:
        """A lost actor: its shards fail this attempt, a new one takes its place; too many in a row end the run.

        Only the attempt at the oldest counts, which was at work. That may be a mistake: then it shows, as from now on
        each of them is alone with its worker.
        """
        self._slots.remove(slot)  # one that is only out of reach ends with its last handle
        reason = f"worker {slot.name} was lost: {_first_line(error)}"
        blamed = 0 if getattr(error, "preempted", False) else 1
        lost = self._placement.leave(slot.name)
        events: list[Event] = [Failed(key, AttemptFailed(reason)) for key in lost[:blamed]]
        events += [Failed(key, Interrupted(reason)) for key in lost[blamed:]]
        self._deaths += 1
        if self._deaths > _DEATHS_IN_A_ROW * max(1, self.size) and not lost:
            return [*events, WorkerFailed(AttemptFailed(f"{reason}; {self._deaths} deaths in a row, no shard done"))]
        if not self._closed.is_set():
            self._slots.append(self._hire(slot.name))
        return events

    def _too_few(self) -> list[Event]:
        """The end of the run, when too few workers have been there for too long."""
        ready, wanted, now = self._placement.ready, self._placement.wanted, time.monotonic()
        if ready >= wanted:
            self._enough_at = now
        if now - self._enough_at <= _SCHEDULE_SECONDS:
            return []
        found = f"{ready} of {wanted}" if ready else "no"
        workers = f"{found} worker{'s' if wanted > 1 else ''} came up in {_SCHEDULE_SECONDS:.0f} s"
        return [WorkerFailed(Temporary(f"{self._where}: {workers}; {self._asked()}"))]

    def _asked(self) -> str:
        if self._layout is None:
            return "Ray did not answer; run again when it does"
        nodes = _nodes()
        there = ", ".join(f"{sum(node[kind] for node in nodes):g} {kind}s" for kind in ("CPU", "GPU"))
        return (
            f"each asks for {self._layout.cpus:g} CPUs and {self._layout.gpus:g} GPUs, the cluster has {there} on "
            f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}; run again when it is larger, or ask for less "
            "(runtime.workers, cpus_per_worker, gpus_per_worker)"
        )


class _Pulse:
    """Asks in a thread of its own whether Ray still lives: its calls may hang for ever without saying so."""

    def __init__(self) -> None:
        self._answered, self._nodes = time.monotonic(), 1
        self._stopped = threading.Event()
        threading.Thread(target=self._ask, name="ray-pulse", daemon=True).start()

    def lost(self) -> str | None:
        """What befell Ray, if something did."""
        if not self._nodes:
            return "has lost all its nodes"
        silent = time.monotonic() - self._answered
        return f"has not answered for {silent:.0f} s" if silent > _SILENT_SECONDS else None

    def stop(self) -> None:
        self._stopped.set()

    def _ask(self) -> None:
        while not self._stopped.wait(_PULSE_SECONDS):
            with suppress(Exception):  # no answer, whatever it raises
                self._nodes = len(_nodes())
                self._answered = time.monotonic()


def _nodes() -> list[Mapping[str, float]]:
    """CPUs and GPUs of each live node."""
    import ray

    return [
        {"CPU": node["Resources"].get("CPU", 0.0), "GPU": node["Resources"].get("GPU", 0.0)}
        for node in ray.nodes()
        if node["Alive"]
    ]


def _plan_layout(job: Job, nodes: list[Mapping[str, float]]) -> _Layout:
    """How many workers of what size: one a GPU where there are any, else one a node with all its cores."""
    runtime = job.runtime
    gpus = _gpus_each(job, nodes)
    hosts = [node for node in nodes if (node["GPU"] >= gpus if gpus else node["CPU"] >= 1)]
    if runtime.cpus_per_worker == "auto":
        shares = [node["CPU"] * gpus / node["GPU"] if gpus else node["CPU"] for node in hosts]
        cpus = max(1.0, float(int(min(shares, default=1.0))))
    else:
        cpus = runtime.cpus_per_worker
    fit = sum(int(node["GPU"] // gpus if gpus else node["CPU"] // cpus) for node in hosts)
    match runtime.workers:
        case "auto":
            return _Layout(max(1, fit), 1, cpus, gpus)
        case Workers(min=least, max=most):
            return _Layout(most, least, cpus, gpus)
        case count:
            return _Layout(count, 1, cpus, gpus)


def _gpus_each(job: Job, nodes: list[Mapping[str, float]]) -> float:
    """GPUs a worker asks for: one where the device is, or by `auto` may be, a GPU."""
    runtime = job.runtime
    if runtime.gpus_per_worker == "auto":
        has_gpu = any(node["GPU"] for node in nodes)
        return 1.0 if runtime.device.startswith("cuda") or (runtime.device == "auto" and has_gpu) else 0.0
    if runtime.device.startswith("cuda") and not runtime.gpus_per_worker:
        raise InvalidJob("runtime.gpus_per_worker is 0 but runtime.device asks for cuda; give gpus_per_worker: 1")
    return runtime.gpus_per_worker


def _submitted() -> bool:
    """Whether this driver is the entrypoint of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _is_bug(error: Exception) -> bool:
    """Whether the actor's own code raised, and did not die."""
    import ray

    return isinstance(error, ray.exceptions.RayTaskError) or bool(getattr(error, "actor_init_failed", False))


def _crashed(slot: _Slot, error: Exception) -> WorkerFailed:
    """A bug in an actor ends the run as one; Ray's text holds the traceback, its last line what it was."""
    text = str(error).strip()
    ours = BatchjobError(f"worker {slot.name} crashed: {text.splitlines()[-1] if text else type(error).__name__}")
    ours.add_note(text)
    return WorkerFailed(ours)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
