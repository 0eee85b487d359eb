"""Pool of Ray actors, one per worker. Actors that are lost are replaced.

The shards of a lost actor come back to the driver as failed attempts, of which only the one it was working on counts.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain
from typing import Any

from batchjob.errors import (
    AttemptFailed,
    BatchjobError,
    DeviceFault,
    InvalidJob,
    Temporary,
    WorkerLost,
    WorkerStalled,
    as_crash_error,
)
from batchjob.job.job import Job
from batchjob.pool.device_bans import DeviceBans
from batchjob.pool.placement import Placement
from batchjob.pool.ray_actor import RayWorker
from batchjob.pool.ray_cluster import ClusterHealth, actor_runtime_env, connect, list_nodes, read_autoscaler
from batchjob.pool.ray_gpu_request import check_machine_gpus, find_gpus
from batchjob.pool.ray_job_folder import remote_job_dir
from batchjob.pool.ray_results import as_crash, first_line, interrupt_shards, is_bug, kill_actors, take_results
from batchjob.pool.worker_sizing import WorkerSizing, describe_cpu_run, describe_gpu_shortage, size_workers
from batchjob.text import format_count
from batchjob.types import ShardKey
from batchjob.worker.messages import (
    PoolNotice,
    ShardCommitted,
    ShardFailed,
    WorkerEvent,
    WorkerFailed,
    WorkerReady,
    WorkerSetup,
)

__all__ = ["RayPool"]

_POLL_SECONDS = 5.0
# An actor counts as lost after so many polls without an answer, even if runtime.stall_seconds is shorter.
_MAX_POLLS_MISSED = 3
# Limits for the deaths of workers in a row, with no shard committed: per worker, and for all workers that had shards.
# Each death may have found an image that kills its process.
_MAX_DEATHS_PER_WORKER = 3
_MAX_DEATHS_AT_WORK = 10
_SCHEDULING_TIMEOUT = 900.0
_NOTICE_SECONDS = 30.0  # between two lines about workers that Ray has not placed
# With the driver's drain, the release of the lease and the exit, a run that is stopped ends within 20 s.
_CLOSE_SECONDS = 4.0
_START_SECONDS = 1.0  # that `close` waits for `start` to end
_ACTOR_CLOSE_SECONDS = 3.0  # for actors to clear away temporary files and processes, before they are killed


@dataclass
class _ActorState:
    """An actor and what is known of it.

    Attributes:
        name: Name of the worker.
        actor: Ray's handle.
        poll: Pending result of `RayWorker.wait`.
        device: Device and node that it is ready on; empty before.
        last_answer: Monotonic time of its last answer; None until Ray has placed it.
        submissions: Pending results of `RayWorker.submit`.
    """

    name: str
    actor: Any
    poll: Any
    device: str = ""
    last_answer: float | None = None
    submissions: list[Any] = field(default_factory=list)


class RayPool:
    """Ray actors, on a cluster or on a Ray started for this run. See `Pool`.

    Args:
        job: The job; `runtime` limits number and size of the workers.
        address: Address of a cluster; None starts a Ray on this machine that ends with the run.

    Raises:
        InvalidJob: Ray is not installed.
    """

    def __init__(self, job: Job, address: str | None) -> None:
        if find_spec("ray") is None:
            raise InvalidJob(
                "runtime.pool: ray is not installed here; pip install 'ray[default]', or run with --pool local"
            )
        self._job, self._address = job, address
        self._actors: list[_ActorState] = []
        self._retired: dict[str, list[Any]] = defaultdict(list)  # idle actors that keep a banned device occupied
        self._bans = DeviceBans()
        self._events: deque[WorkerEvent] = deque()  # of the pool's thread; taken by the driver's
        self._closing: list[Any] = []  # pending results of `RayWorker.close`
        self._setup: WorkerSetup | None = None
        self._sizing: WorkerSizing | None = None
        self._health: ClusterHealth | None = None
        self._placement = Placement()
        self._last_enough = time.monotonic()  # when enough workers were ready
        self._last_notice = time.monotonic()
        self._deaths = 0  # since a shard was committed
        self._started = threading.Event()
        self._closed = threading.Event()
        # Linux ends the processes of a Ray on this machine together with the thread that started them.
        self._thread = threading.Thread(target=self._live, name="ray", daemon=True)

    @property
    def size(self) -> int:
        return self._sizing.workers if self._sizing else 0

    def start(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._thread.start()

    def free_slots(self) -> int:
        return self._placement.free_slots()

    def submit(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit(key, plan_number)
        self._send_assignments()

    def idle_workers(self) -> int:
        return self._placement.idle_workers()

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit_speculative(key, plan_number)
        self._send_assignments()

    def wait(self, timeout: float) -> list[WorkerEvent]:
        is_started = self._started.wait(0.0 if self._events else timeout)
        events = [self._events.popleft() for _ in range(len(self._events))]
        if self._health is not None and (failure := self._health.find_failure()):
            return [*events, WorkerFailed(Temporary(f"{self._cluster} {failure}; the same command resumes"))]
        if is_started and self._actors:
            events += self._poll_actors(0.0 if events else timeout)
        self._send_assignments()
        return events + self._notice_shortage() + self._check_enough_workers()

    def close(self) -> None:
        self._closed.set()
        if self._started.wait(_START_SECONDS):
            self._thread.join(_CLOSE_SECONDS)  # a Ray that is gone may never answer

    @property
    def _cluster(self) -> str:
        """The cluster in words."""
        return f"the cluster at {self._address}" if self._address else "a local Ray"

    @contextmanager
    def _ray_errors_as_temporary(self) -> Iterator[None]:
        """Raise Temporary in place of an error of Ray: it is not a bug of ours."""
        try:
            yield
        except BatchjobError:
            raise
        except Exception as error:
            raise Temporary(f"{self._cluster} could not be used: {first_line(error)}") from error

    # -- start and end, in the pool's thread -------------------------------------------------------------------

    def _live(self) -> None:
        try:
            self._start_actors()
        except Exception as error:  # noqa: BLE001 - an error that ends this thread reaches the driver only as event
            self._events.append(WorkerFailed(as_crash_error(error)))
        self._started.set()
        self._closed.wait()
        self._disconnect()

    def _start_actors(self) -> None:
        if not self._address:
            check_machine_gpus(self._job)  # before Ray takes seconds
        with self._ray_errors_as_temporary():
            connect(self._job, self._address)
            self._health = ClusterHealth(list_nodes, list_nodes(), read_autoscaler)
            demand = find_gpus(self._job, self._cluster, self._note, self._closed.is_set)
            nodes = list_nodes()
        if self._closed.is_set():
            return
        if self._address and (cpu_run := describe_cpu_run(self._job, demand, self._cluster)):
            self._note(cpu_run)
        self._sizing = size_workers(self._job, nodes, demand.gpus)
        if not self._address:
            self._sizing.check_machine(nodes)
        self._last_enough = time.monotonic()
        self._placement = Placement(self._sizing.min_workers)
        for number in range(self._sizing.workers):
            self._add_actor(f"{number}")

    def _note(self, text: str) -> None:
        self._events.append(PoolNotice(text))

    def _add_actor(self, name: str) -> None:
        import ray

        sizing = self._sizing
        assert self._setup is not None, "the pool is started with it"
        assert sizing is not None, "chosen before the first actor"
        options: dict[str, Any] = {"num_cpus": sizing.cpus, "num_gpus": sizing.gpus}
        # `submit` and `close` must not wait for the `wait` that is running.
        options |= {"max_concurrency": 4, "max_restarts": 0}
        if runtime_env := actor_runtime_env(self._address):
            options["runtime_env"] = runtime_env
        job_folder = remote_job_dir(self._job) if self._address else None
        with self._ray_errors_as_temporary():
            actor: Any = ray.remote(**options)(RayWorker).remote(
                name,
                replace(self._setup, reserved_gpus=sizing.gpus, pool_size=sizing.workers),
                job_folder,
                max(1, int(sizing.cpus)),
            )
            self._actors.append(_ActorState(name, actor, actor.wait.remote(_POLL_SECONDS)))

    def _disconnect(self) -> None:
        import ray

        if self._health is not None:
            self._health.stop()
        closing = self._closing + [state.actor.close.remote() for state in self._actors if state.device]
        with suppress(Exception):  # an actor that cannot close is killed
            if closing:  # without a Ray, `ray.get` would start one
                ray.get(closing, timeout=_ACTOR_CLOSE_SECONDS)
        kill_actors(*(state.actor for state in self._actors), *chain(*self._retired.values()))
        self._actors.clear()
        ray.shutdown()

    # -- assignments and events --------------------------------------------------------------------------------

    def _send_assignments(self) -> None:
        actors = {state.name: state for state in self._actors}
        for assignment in self._placement.take_assignments():
            state = actors[assignment.worker]
            with self._ray_errors_as_temporary():
                state.submissions.append(state.actor.submit.remote(assignment))

    def _poll_actors(self, timeout: float) -> list[WorkerEvent]:
        """Collect events; replace actors that are lost or silent; retire those on banned devices."""
        import ray

        polls = [state.poll for state in self._actors]
        max_silence = max(self._job.runtime.stall_seconds, _MAX_POLLS_MISSED * _POLL_SECONDS)
        with self._ray_errors_as_temporary():
            ray.wait(polls, timeout=timeout)
            answered, _ = ray.wait(polls, num_returns=len(polls), timeout=0)
        events: list[WorkerEvent] = []
        for state in list(self._actors):
            if state.poll in answered:
                events += self._take_answer(state)
            elif state.last_answer is not None and time.monotonic() - state.last_answer > max_silence:
                reason = f"it has not answered for {max_silence:g} s (runtime.stall_seconds)"
                events += self._replace(state, f"worker {state.name} was lost: {reason}", blamed_shards=1)
        for state in [state for state in self._actors if state.device in self._bans.banned]:
            events += self._retire(state)
        return events

    def _take_answer(self, state: _ActorState) -> list[WorkerEvent]:
        """Take the result of a poll and poll again; or replace an actor that has died or cannot be reached."""
        import ray

        try:
            node, answer = ray.get(state.poll)
            # A submission that failed would leave its shard with a worker that has never heard of it.
            state.submissions = take_results(state.submissions)
        except ray.exceptions.RayError as error:
            if is_bug(error):
                return [as_crash(state.name, error)]
            blamed_shards = 0 if getattr(error, "preempted", False) else 1
            return self._replace(state, f"worker {state.name} was lost: {first_line(error)}", blamed_shards)
        with self._ray_errors_as_temporary():
            state.poll, state.last_answer = state.actor.wait.remote(_POLL_SECONDS), time.monotonic()
        return self._apply_events(state, node, answer)

    def _apply_events(self, state: _ActorState, node: str, answer: list[WorkerEvent]) -> list[WorkerEvent]:
        """Apply the events of an actor; if it cannot continue, that replaces what its shards reported."""
        events: list[WorkerEvent] = []
        # Commits first: they count even if the worker is lost.
        for event in sorted(answer, key=lambda event: not isinstance(event, ShardCommitted)):
            match event:
                case ShardFailed(_, WorkerLost() as lost) | WorkerFailed(WorkerLost() as lost):
                    return events + self._give_up(state, node, lost)
                case WorkerReady(_, info):
                    state.device = f"{info.device} on {node}"
                    if state.device in self._bans.banned:
                        return events + self._retire(state)
                case ShardCommitted():
                    self._deaths = 0
            events.append(event)
            self._placement.apply(state.name, event)
        return events

    # -- replacements ------------------------------------------------------------------------------------------

    def _give_up(self, state: _ActorState, node: str, lost: WorkerLost) -> list[WorkerEvent]:
        """Replace an actor that reports itself lost; count the fault against its device, unless an image caused it."""
        device, reason = f"{lost.device} on {node}", f"worker {state.name} on {node}: {lost.message}"
        if lost.culprit_known:
            self._bans.clear_faults(lost.suspect_positions)
            for allowed in self._retired.keys() - self._bans.banned:
                kill_actors(*self._retired.pop(allowed))
        elif isinstance(lost, DeviceFault) and self._bans.record_fault(device, lost.suspect_positions):
            reason += "; after two such faults this device is used no more in this run"
        is_blamed = isinstance(lost, WorkerStalled) and not lost.culprit_known and not lost.storage
        return self._replace(state, reason, int(is_blamed)) + self._check_devices_left()

    def _replace(self, state: _ActorState, reason: str, blamed_shards: int) -> list[WorkerEvent]:
        """Start a new actor in place of a lost one, whose attempts have failed; end the run after too many deaths.

        If any attempt counts, it is the one at the oldest shard, which the worker was working on. That may be a
        mistake. It becomes apparent, because each of these shards is alone with its worker from now on.

        Args:
            state: The actor.
            reason: Error message for its shards.
            blamed_shards: 1 if the attempt at the oldest shard counts, else 0.
        """
        self._actors.remove(state)
        kill_actors(state.actor)
        shards = self._placement.remove_worker(state.name)
        events = interrupt_shards(shards[blamed_shards:], reason)
        events += [ShardFailed(key, AttemptFailed(reason)) for key in shards[:blamed_shards]]
        self._deaths += 1
        if self._deaths > max(_MAX_DEATHS_PER_WORKER * self.size, _MAX_DEATHS_AT_WORK if shards else 1):
            deaths = f"{self._deaths} workers were lost and no shard was done meanwhile; look at device and model"
            error_class = AttemptFailed if blamed_shards else Temporary
            return [*events, WorkerFailed(error_class(f"{reason}; {deaths}"))]
        if not self._closed.is_set():
            self._add_actor(state.name)
        return events

    def _retire(self, state: _ActorState) -> list[WorkerEvent]:
        """Keep an idle actor on a banned device so that Ray places its replacement elsewhere.

        Its shards are rescheduled without using up an attempt.
        """
        self._actors.remove(state)
        self._retired[state.device].append(state.actor)
        with self._ray_errors_as_temporary():
            self._closing.append(state.actor.close.remote())
        reason = f"worker {state.name} was put to rest: {state.device} is used no more in this run"
        events = interrupt_shards(self._placement.remove_worker(state.name), reason)
        self._add_actor(state.name)
        return events + self._check_devices_left()

    def _check_devices_left(self) -> list[WorkerEvent]:
        """End the run if every device is banned. Another day they may work again."""
        if self._sizing is None or self._health is None:
            return []
        nodes = self._health.nodes
        banned = [device for device in sorted(self._bans.banned) if any(node.name in device for node in nodes)]
        if not banned or len(banned) < self._sizing.count_devices(nodes):
            return []
        devices = f"{banned[0]}{f' and {len(banned) - 1} more' if banned[1:] else ''}"
        message = f"{self._cluster}: no device is left that works, {devices} failed twice; look at device and model"
        return [WorkerFailed(Temporary(f"{message}, the same command resumes"))]

    def _notice_shortage(self) -> list[WorkerEvent]:
        """Say now and then what workers wait for that Ray has not placed."""
        unplaced = sum(state.last_answer is None for state in self._actors)
        if self._sizing is None or self._health is None or not unplaced or self._placement.ready_workers:
            return []
        if time.monotonic() - max(self._last_notice, self._last_enough) < _NOTICE_SECONDS:
            return []
        self._last_notice = time.monotonic()
        demand = self._sizing.describe_demand(self._health.nodes, self._health.autoscaler)
        return [PoolNotice(f"{self._cluster}: waiting for room for {format_count(unplaced, 'worker')}; {demand}")]

    def _check_enough_workers(self) -> list[WorkerEvent]:
        """End the run if too few workers have been ready for too long."""
        ready, required, now = self._placement.ready_workers, self._placement.required_workers, time.monotonic()
        if ready >= required:
            self._last_enough = now
        if now - self._last_enough <= _SCHEDULING_TIMEOUT:
            return []
        advice = "Ray did not answer; run again when it does"
        if self._health is not None:
            describe = self._sizing.describe_shortage if self._sizing else describe_gpu_shortage
            advice = describe(self._health.nodes, self._health.autoscaler)
        found = f"{ready} of {required}" if ready else "no"
        shortage = f"{found} worker{'s' if required > 1 else ''} came up in {_SCHEDULING_TIMEOUT:.0f} s"
        return [WorkerFailed(Temporary(f"{self._cluster}: {shortage}; {advice}"))]
