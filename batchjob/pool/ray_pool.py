"""The pool on Ray: one actor a worker, each holding a `LocalPool`; the only file that imports ray.

Ray carries shard keys, events and nothing else. Lost actors are replaced here; the shards they held come back to the
driver as failed attempts, of which only the one at work counts.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from typing import Any

from batchjob.errors import (
    AttemptFailed,
    AttemptInterrupted,
    BatchjobError,
    DeviceFault,
    InvalidJob,
    Temporary,
    WorkerLost,
    WorkerStalled,
    as_crash_error,
    with_traceback,
)
from batchjob.job.job import Job
from batchjob.pool.device_bans import DeviceBans
from batchjob.pool.placement import Placement, apply_event
from batchjob.pool.ray_actor import RayWorker
from batchjob.pool.ray_cluster import (
    NODE_DIGITS,
    ClusterHealth,
    Node,
    WorkerSizing,
    remote_job_dir,
    runtime_env,
    size_workers,
)
from batchjob.types import ShardKey
from batchjob.worker.messages import ShardCommitted, ShardFailed, WorkerEvent, WorkerFailed, WorkerReady, WorkerSetup

__all__ = ["RayPool"]

_POLL_SECONDS = 5.0
_POLLS_MISSED = 3  # before an actor that says nothing counts as lost, however short runtime.stall_seconds is
_DEATHS_IN_A_ROW = 3  # for each worker
_DEATHS_AT_WORK = 10  # at least: where they had shards, each may have found an image that is deadly
_SCHEDULE_SECONDS = 900.0
_START_SECONDS = 1.0  # that the end of a run waits for its beginning
_CLOSE_SECONDS = 4.0  # with the drain, the lease's farewell and the exit, a run ends within 20 s
_FAREWELL_SECONDS = 3.0  # for the actors to clear away what is theirs, before they are killed
_OBJECT_STORE_BYTES = 128 << 20  # events only; what plasma takes of /dev/shm, the loaders lack


@dataclass
class _ActorState:
    """One actor, the open question what happened there, the device it is ready on, and when it last answered."""

    name: str
    actor: Any
    poll: Any
    device: str = ""
    heard: float | None = None


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
        self._slots: list[_ActorState] = []
        self._retired: dict[str, list[Any]] = defaultdict(list)  # actors that do nothing but keep a device occupied
        self._strikes = DeviceBans()
        self._events: list[WorkerEvent] = []
        self._layout: WorkerSizing | None = None
        self._setup: WorkerSetup | None = None
        self._placement = Placement()
        self._enough_at = time.monotonic()
        self._deaths = 0
        self._pulse: ClusterHealth[Node] | None = None
        self._started = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._live, name="ray", daemon=True)

    @property
    def size(self) -> int:
        return self._layout.workers if self._layout else 0

    def start(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._thread.start()

    def free_slots(self) -> int:
        return self._placement.free_slots()

    def submit(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit(key, plan_number)
        self._hand_over()

    def idle_workers(self) -> int:
        return self._placement.idle_workers()

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit_speculative(key, plan_number)
        self._hand_over()

    def wait(self, timeout: float) -> list[WorkerEvent]:
        if not self._started.wait(timeout):
            return self._too_few()
        events, self._events = self._events, []
        if self._pulse is not None and (lost := self._pulse.find_failure()):
            return [*events, WorkerFailed(Temporary(f"{self._where} {lost}; the same command resumes"))]
        if self._slots:
            events += self._poll(0.0 if events else timeout)
        self._hand_over()
        return events + self._too_few()

    def close(self) -> None:
        self._closed.set()
        if self._started.wait(_START_SECONDS):
            self._thread.join(_CLOSE_SECONDS)  # a Ray that is gone may never answer

    def _live(self) -> None:
        """In a thread of its own: Linux ends a local Ray's processes with the thread that started them."""
        try:
            self._start()
        except Exception as error:  # noqa: BLE001 - the driver is told, not this thread's stderr
            self._events.append(WorkerFailed(as_crash_error(error)))
        self._started.set()
        self._closed.wait()
        self._leave()

    def _leave(self) -> None:
        import ray

        if self._pulse is not None:
            self._pulse.stop()
        farewells = [slot.actor.close.remote() for slot in self._slots if slot.device]
        if farewells:
            ray.wait(farewells, num_returns=len(farewells), timeout=_FAREWELL_SECONDS)
        self._dismiss(*(slot.actor for slot in self._slots), *chain(*self._retired.values()))
        self._slots.clear()
        ray.shutdown()

    @property
    def _where(self) -> str:
        return f"the cluster at {self._address}" if self._address else "a local Ray"

    # -- starting ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._usable():
            self._connect()
            self._pulse = ClusterHealth(_nodes, _nodes())
        self._layout = size_workers(self._job, self._pulse.nodes)
        self._placement = Placement(self._layout.min_workers)
        for number in range(self._layout.workers):
            self._slots.append(self._hire(f"{number}"))

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
            ray.init(address=self._address, runtime_env=runtime_env(self._job), **quiet)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)

    def _hire(self, name: str) -> _ActorState:
        import ray

        assert self._layout is not None
        options: dict[str, Any] = {"num_cpus": self._layout.cpus, "num_gpus": self._layout.gpus}
        options |= {"max_concurrency": 4, "max_restarts": 0}
        if self._address:  # a local Ray has this from us; without a word on it, its workers begin with Ray itself
            options["runtime_env"] = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}}
        cores, folder = max(1, int(self._layout.cpus)), remote_job_dir(self._job) if self._address else None
        with self._usable():
            actor: Any = ray.remote(**options)(RayWorker).remote(cores, folder, self._setup)
            return _ActorState(name, actor, actor.wait.remote(_POLL_SECONDS))

    # -- listening ---------------------------------------------------------------------------------------------

    def _poll(self, timeout: float) -> list[WorkerEvent]:
        import ray

        polls = [slot.poll for slot in self._slots]
        patience = max(self._job.runtime.stall_seconds, _POLLS_MISSED * _POLL_SECONDS)
        with self._usable():
            ray.wait(polls, timeout=timeout)
            answered, _ = ray.wait(polls, num_returns=len(polls), timeout=0)
        events: list[WorkerEvent] = []
        for slot in list(self._slots):
            if slot.poll in answered:
                try:
                    where, told = ray.get(slot.poll)
                except ray.exceptions.RayError as error:
                    events += [_crashed(slot, error)] if _is_bug(error) else self._lost(slot, error)
                    continue
                with self._usable():
                    slot.poll, slot.heard = slot.actor.wait.remote(_POLL_SECONDS), time.monotonic()
                events += self._take_in(slot, where, told)
            elif slot.heard is not None and time.monotonic() - slot.heard > patience:
                silent = f"it has not answered for {patience:g} s (runtime.stall_seconds)"
                events += self._replace(slot, f"worker {slot.name} was lost: {silent}", blamed=1)
        beside = [slot for slot in self._slots if slot.device in self._strikes.banned]
        return events + [event for slot in beside for event in self._retire(slot)]

    def _hand_over(self) -> None:
        actors = {slot.name: slot.actor for slot in self._slots}
        for due in self._placement.take_assignments():
            with self._usable():
                actors[due.worker].submit.remote(due.key, due.plan_number, due.reattempt)

    def _take_in(self, slot: _ActorState, where: str, told: list[WorkerEvent]) -> list[WorkerEvent]:
        """What an actor on that node has told; if it can do no more, that takes the place of what befell its shards."""
        events: list[WorkerEvent] = []
        for event in sorted(
            told, key=lambda event: not isinstance(event, ShardCommitted)
        ):  # what is committed comes first
            match event:
                case ShardFailed(_, WorkerLost() as lost) | WorkerFailed(WorkerLost() as lost):
                    return events + self._give_up(slot, where, lost)
                case WorkerReady(_, loaded):
                    slot.device = f"{loaded.device} on {where}"
                    if slot.device in self._strikes.banned:
                        return events + self._retire(slot)
                    events.append(WorkerReady(slot.name, loaded))
                case ShardCommitted():
                    self._deaths = 0
                    events.append(event)
                case _:
                    events.append(event)
            apply_event(self._placement, slot.name, event)
        return events

    # -- replacing ---------------------------------------------------------------------------------------------

    def _lost(self, slot: _ActorState, error: Exception) -> list[WorkerEvent]:
        """An actor that died, or cannot be reached."""
        blamed = 0 if getattr(error, "preempted", False) else 1
        return self._replace(slot, f"worker {slot.name} was lost: {_first_line(error)}", blamed)

    def _give_up(self, slot: _ActorState, where: str, lost: WorkerLost) -> list[WorkerEvent]:
        """An actor that can do no more, as it says itself."""
        device, reason = f"{lost.device} on {where}", f"worker {slot.name} on {where}: {lost.message}"
        if lost.culprit_known:
            self._strikes.clear_faults(lost.suspect_positions)
            for freed in self._retired.keys() - self._strikes.banned:
                self._dismiss(*self._retired.pop(freed))
        elif isinstance(lost, DeviceFault) and self._strikes.record_fault(device, lost.suspect_positions):
            reason += "; after two such faults this device is used no more in this run"
        blamed = isinstance(lost, WorkerStalled) and not lost.culprit_known and not lost.storage
        return self._replace(slot, reason, int(blamed)) + self._none_left()

    def _replace(self, slot: _ActorState, reason: str, blamed: int) -> list[WorkerEvent]:
        """Its shards fail this attempt, a new actor takes its place; too many lost without a shard done end the run.

        Only the attempt at the oldest counts, which was at work, where any does. That may be a mistake: then it shows,
        as from now on each of them is alone with its worker.
        """
        self._slots.remove(slot)
        self._dismiss(slot.actor)
        shards = self._placement.remove_worker(slot.name)
        events: list[WorkerEvent] = [ShardFailed(key, AttemptInterrupted(reason)) for key in reversed(shards[blamed:])]
        events += [ShardFailed(key, AttemptFailed(reason)) for key in shards[:blamed]]
        self._deaths += 1
        if self._deaths > max(_DEATHS_IN_A_ROW * self.size, _DEATHS_AT_WORK if shards else 1):
            often = f"{self._deaths} workers were lost and no shard was done meanwhile; look at device and model"
            return [*events, WorkerFailed((AttemptFailed if blamed else Temporary)(f"{reason}; {often}"))]
        if not self._closed.is_set():
            self._slots.append(self._hire(slot.name))
        return events

    def _retire(self, slot: _ActorState) -> list[WorkerEvent]:
        """An actor on a device that is used no more rests there, so that the next lands elsewhere; nobody blames it."""
        self._slots.remove(slot)
        self._retired[slot.device].append(slot.actor)
        with self._usable():
            slot.actor.close.remote()
        reason = f"worker {slot.name} was put to rest: {slot.device} is used no more in this run"
        events: list[WorkerEvent] = [
            ShardFailed(key, AttemptInterrupted(reason)) for key in reversed(self._placement.remove_worker(slot.name))
        ]
        self._slots.append(self._hire(slot.name))
        return events + self._none_left()

    def _none_left(self) -> list[WorkerEvent]:
        """The end of the run, when every device there is is used no more: another day they may be well."""
        assert self._layout is not None
        assert self._pulse is not None
        nodes = self._pulse.nodes
        banned = [device for device in sorted(self._strikes.banned) if any(node.name in device for node in nodes)]
        if not banned or len(banned) < self._layout.count_devices(nodes):
            return []
        those = f"{banned[0]}{f' and {len(banned) - 1} more' if banned[1:] else ''}"
        said = f"{self._where}: no device is left that works, {those} failed twice; look at device and model"
        return [WorkerFailed(Temporary(f"{said}, the same command resumes"))]

    def _dismiss(self, *actors: Any) -> None:
        import ray

        for actor in actors:
            with suppress(Exception):  # one that is out of reach ends with its last handle
                ray.kill(actor)

    def _too_few(self) -> list[WorkerEvent]:
        """The end of the run, when too few workers have been there for too long."""
        ready, wanted, now = self._placement.ready_workers, self._placement.required_workers, time.monotonic()
        if ready >= wanted:
            self._enough_at = now
        if now - self._enough_at <= _SCHEDULE_SECONDS:
            return []
        asked = "Ray did not answer; run again when it does"
        if self._layout is not None and self._pulse is not None:
            asked = self._layout.describe_shortage(self._pulse.nodes)
        found = f"{ready} of {wanted}" if ready else "no"
        workers = f"{found} worker{'s' if wanted > 1 else ''} came up in {_SCHEDULE_SECONDS:.0f} s"
        return [WorkerFailed(Temporary(f"{self._where}: {workers}; {asked}"))]


def _nodes() -> list[Node]:
    """Those that live."""
    import ray

    return [
        Node(node["NodeID"][:NODE_DIGITS], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _is_bug(error: Exception) -> bool:
    """Whether the actor's own code raised, and did not die."""
    import ray

    return isinstance(error, ray.exceptions.RayTaskError) or bool(getattr(error, "actor_init_failed", False))


def _crashed(slot: _ActorState, error: Exception) -> WorkerFailed:
    """A bug in an actor ends the run as one; Ray's text holds the traceback, its last line what it was."""
    text = str(error).strip()
    last = text.splitlines()[-1] if text else type(error).__name__
    return WorkerFailed(with_traceback(BatchjobError(f"worker {slot.name} crashed: {last}"), text))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
