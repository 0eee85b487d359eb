"""Placement of shards on workers, and of stragglers on a second one. Pure state: no clock, no I/O."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from batchjob.errors import Unavailable
from batchjob.types import ShardKey
from batchjob.worker.messages import Assignment, ShardCommitted, ShardFailed, WorkerEvent, WorkerReady

__all__ = ["Placement"]

# One shard in the model, one being committed, and two in line, so that the pipeline never runs empty between shards.
# If more than one waits for its commit, the store limits the throughput, and a longer line would not help.
_QUEUED_SHARDS_PER_WORKER = 4


class Placement:
    """Assigns shards to workers, each to the worker that has the fewest.

    A shard whose attempt failed is a suspect: it goes to a worker that has no other shard, and that worker gets no
    other one beside it. If the suspect takes its worker down again, it harms no other shard and is known to be the
    cause.

    The cost of an assignment does not grow with the number of workers, except for suspects.

    Example:
        >>> placement = Placement()
        >>> placement.add_worker("a")
        >>> placement.free_slots()
        4
        >>> placement.submit(key, plan_number=0)
        >>> placement.take_assignments()
        [Assignment(worker='a', key=key, plan_number=0, reattempt=False)]
        >>> placement.apply("a", ShardCommitted(result))  # of this key
        >>> placement.free_slots()
        4

    Args:
        min_workers: Number of workers that must be ready before any shard is assigned. It counts only once: a worker
            that is lost later holds up no other.
    """

    def __init__(self, min_workers: int = 1) -> None:
        self._min_workers = min_workers
        self._workers: dict[str, _WorkerQueue] = {}
        self._free = _FreeSlots()
        self._suspects: set[int] = set()  # shard indices
        self._tried: set[int] = set()  # shards with an attempt that failed, for any reason
        self._waiting_suspects: deque[tuple[ShardKey, int]] = deque()  # with their plan numbers
        self._is_draining = False
        self._assignments: list[Assignment] = []  # not yet taken

    # -- workers -----------------------------------------------------------------------------------------------

    @property
    def ready_workers(self) -> int:
        """Number of workers that are ready."""
        return len(self._workers)

    @property
    def required_workers(self) -> int:
        """Number of workers that must be ready before a shard is assigned."""
        return self._min_workers

    def add_worker(self, worker: str, images_in_flight: int = 0) -> None:
        """Add a worker that is ready.

        Args:
            worker: Name of the worker.
            images_in_flight: Images that its loader keeps in flight; 0 if unknown.
        """
        queue = self._workers[worker] = _WorkerQueue(worker, images_in_flight)
        self._free.add(queue)
        self._drain_for_suspects()
        if len(self._workers) >= self._min_workers:
            self._min_workers = 1

    def remove_worker(self, worker: str) -> list[ShardKey]:
        """Remove a worker that is lost; return its shards, the one it was working on first. All become suspects."""
        queue = self._workers.pop(worker, None)
        self._assignments = [assignment for assignment in self._assignments if assignment.worker != worker]
        if queue is None:
            return []
        self._free.remove(queue)
        self._drain_for_suspects()
        self._suspects.update(queue.shards)
        self._tried.update(queue.shards)
        return list(queue.shards.values())

    # -- shards ------------------------------------------------------------------------------------------------

    def free_slots(self) -> int:
        """Return the number of shards that can be assigned now."""
        return self._free.total if self.ready_workers >= self._min_workers else 0

    def idle_workers(self) -> int:
        """Count the workers that have no shard and could make a second attempt at a straggler."""
        return self._free.count_idle() if self.ready_workers >= self._min_workers else 0

    def submit(self, key: ShardKey, plan_number: int) -> None:
        """Assign a shard: at once, or, if it is a suspect, as soon as a worker has no other shard."""
        if key.index in self._suspects:
            self._waiting_suspects.append((key, plan_number))
            self._drain_for_suspects()
        else:
            self._assign(self._free.least_busy(), key, plan_number)

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        """Assign a shard that one worker is working on to an idle one, too."""
        is_suspect = key.index in self._suspects
        self._assign(self._free.least_busy(), key, plan_number, exclusive=is_suspect, reattempt=True)

    def take_assignments(self) -> list[Assignment]:
        """Return the assignments since the last call."""
        if self._waiting_suspects:
            for queue in [queue for queue in self._workers.values() if not queue.shards][: len(self._waiting_suspects)]:
                self._assign(queue, *self._waiting_suspects.popleft(), exclusive=True, reattempt=True)
        self._drain_for_suspects()
        assignments, self._assignments = self._assignments, []
        return assignments

    def apply(self, worker: str, event: WorkerEvent) -> None:
        """Apply an event of a worker."""
        match event:
            case WorkerReady(_, info):
                self.add_worker(worker, info.ahead)
            case ShardCommitted(result):
                self.finish(worker, result.key)
            case ShardFailed(key, error):
                self.fail(worker, key, suspect=not isinstance(error, Unavailable))

    def finish(self, worker: str, key: ShardKey) -> None:
        """Record that a worker has committed a shard."""
        self._suspects.discard(key.index)
        self._tried.discard(key.index)
        self._release(worker, key)

    def fail(self, worker: str, key: ShardKey, suspect: bool = True) -> None:
        """Record that an attempt ended without a commit.

        Args:
            worker: Name of the worker.
            key: The shard.
            suspect: The shard may be the cause; False for network and credentials.
        """
        self._tried.add(key.index)
        if suspect:
            self._suspects.add(key.index)
        self._release(worker, key)

    def _assign(
        self, queue: _WorkerQueue, key: ShardKey, plan_number: int, exclusive: bool = False, reattempt: bool = False
    ) -> None:
        self._free.remove(queue)
        queue.add(key)
        queue.exclusive, queue.draining = exclusive, False
        self._free.add(queue)
        self._assignments.append(Assignment(queue.worker, key, plan_number, reattempt or key.index in self._tried))

    def _release(self, worker: str, key: ShardKey) -> None:
        queue = self._workers.get(worker)
        if queue is not None:
            self._free.remove(queue)
            queue.remove(key)
            self._free.add(queue)

    # -- suspects: there are few, so looking at all workers costs little ----------------------------------------

    def _drain_for_suspects(self) -> None:
        """Assign nothing more to as many workers as suspects wait, those with the fewest shards."""
        if not self._waiting_suspects and not self._is_draining:
            return
        candidates = [queue for queue in self._workers.values() if not queue.exclusive]
        for rank, queue in enumerate(sorted(candidates, key=lambda queue: len(queue.shards))):
            self._free.remove(queue)
            queue.draining = rank < len(self._waiting_suspects)
            self._free.add(queue)
        self._is_draining = bool(self._waiting_suspects)


@dataclass(slots=True, eq=False)
class _WorkerQueue:
    """Shards of one worker, oldest first.

    Attributes:
        worker: Name of the worker.
        images_in_flight: Images that its loader keeps in flight; 0 if unknown.
        shards: Shards by index.
        images: Images to be read for these shards.
        exclusive: It has a suspect, and gets no other shard beside it.
        draining: It gets no more shards, so that it is idle when a suspect needs it.
    """

    worker: str
    images_in_flight: int
    shards: dict[int, ShardKey] = field(default_factory=dict)
    images: int = 0
    exclusive: bool = False
    draining: bool = False

    @property
    def free_slots(self) -> int:
        """Number of shards that it takes now: up to four; more if they are too small to keep its loader busy.

        Example:
            The loader keeps 512 images in flight. With 4 shards of 64 images each, 256 < 2 * 512: one more.
        """
        if self.exclusive or self.draining:
            return 0
        return max(_QUEUED_SHARDS_PER_WORKER - len(self.shards), int(self.images < 2 * self.images_in_flight))

    def add(self, key: ShardKey) -> None:
        self.shards[key.index] = key
        self.images += key.images_to_read

    def remove(self, key: ShardKey) -> None:
        if self.shards.pop(key.index, None) is not None:
            self.images -= key.images_to_read
            self.exclusive = False


class _FreeSlots:
    """Workers with free slots, by their number of shards; found, added and removed without looking at the others."""

    def __init__(self) -> None:
        self._by_shards: defaultdict[int, dict[str, _WorkerQueue]] = defaultdict(dict)
        self._entries: dict[str, tuple[int, int]] = {}  # shards and free slots of a worker
        self._fewest_shards = 0  # no worker with free slots has fewer
        self.total = 0

    def add(self, queue: _WorkerQueue) -> None:
        """Add a worker if it has free slots. It must not change until it is removed."""
        if not (slots := queue.free_slots):
            return
        shards = len(queue.shards)
        self._by_shards[shards][queue.worker] = queue
        self._entries[queue.worker] = shards, slots
        self._fewest_shards = min(self._fewest_shards, shards)
        self.total += slots

    def remove(self, queue: _WorkerQueue) -> None:
        """Remove a worker; does nothing if it has no free slots."""
        shards, slots = self._entries.pop(queue.worker, (0, 0))
        self._by_shards[shards].pop(queue.worker, None)
        self.total -= slots

    def least_busy(self) -> _WorkerQueue:
        """Return the worker with the fewest shards. There must be a free slot."""
        assert self._entries, "call free_slots or idle_workers first"
        while not self._by_shards[self._fewest_shards]:
            self._fewest_shards += 1
        return next(iter(self._by_shards[self._fewest_shards].values()))

    def count_idle(self) -> int:
        """Count the workers that have no shard."""
        return len(self._by_shards[0])
