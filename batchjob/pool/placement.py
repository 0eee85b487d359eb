"""Which worker gets which shard, and which shards travel alone. Pure: no clock, no input or output."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from batchjob.errors import Unavailable
from batchjob.types import ShardKey
from batchjob.worker.messages import ShardCommitted, ShardFailed, WorkerEvent, WorkerReady

__all__ = ["Assignment", "Placement", "apply_event"]

# One at work, one on its way into the output, and two queued, so that the pipeline never runs dry between shards. Where
# more than one waits for the store, the store sets the pace and not the queue.
_SHARDS = 4


@dataclass(frozen=True)
class Assignment:
    """A shard of plan number `plan` for a worker; `again` where it has been tried before, or is tried elsewhere."""

    worker: str
    key: ShardKey
    plan_number: int
    reattempt: bool = False


@dataclass(slots=True, eq=False)
class _WorkerQueue:
    """What one worker has in hand, oldest first.

    Attributes:
        worker: whose it is.
        ahead: images that its loader keeps under way, 0 where that is not known.
        rows: images that are to be read for its shards.
        alone: it has a suspect, and gets nothing beside it.
        cleared: it gets nothing more, so that it comes to have nothing else when a suspect waits.
    """

    worker: str
    ahead: int
    shards: dict[int, ShardKey] = field(default_factory=dict)
    rows: int = 0
    alone: bool = False
    cleared: bool = False

    @property
    def room(self) -> int:
        """How many more it takes: four in all, of small shards as many as keep its loader busy."""
        if self.alone or self.cleared:
            return 0
        return max(_SHARDS - len(self.shards), int(self.rows < 2 * self.ahead))

    def take(self, key: ShardKey) -> None:
        self.shards[key.index] = key
        self.rows += key.images_to_read

    def put_down(self, key: ShardKey) -> None:
        if self.shards.pop(key.index, None) is not None:
            self.rows -= key.images_to_read
            self.alone = False


class _FreeSlots:
    """Desks with room, by the shards they have in hand; found, entered and left without a look at the others."""

    def __init__(self) -> None:
        self._by_load: defaultdict[int, dict[str, _WorkerQueue]] = defaultdict(dict)
        self._where: dict[str, tuple[int, int]] = {}
        self._least = 0
        self.room = 0

    def enter(self, desk: _WorkerQueue) -> None:
        """As it is now; it stays unchanged until it leaves."""
        if not (room := desk.room):
            return
        load = len(desk.shards)
        self._by_load[load][desk.worker] = desk
        self._where[desk.worker] = load, room
        self._least = min(self._least, load)
        self.room += room

    def leave(self, desk: _WorkerQueue) -> None:
        load, room = self._where.pop(desk.worker, (0, 0))
        self._by_load[load].pop(desk.worker, None)
        self.room -= room

    def least_busy(self) -> _WorkerQueue:
        """The one with the fewest shards. There must be one."""
        assert self._where, "room is asked for first"
        while not self._by_load[self._least]:
            self._least += 1
        return next(iter(self._by_load[self._least].values()))

    def idle(self) -> int:
        """How many have nothing in hand."""
        return len(self._by_load[0])


class Placement:
    """Shards in the hands of workers.

    A shard whose attempt failed is a suspect: it goes to a worker that has nothing else, which gets nothing beside it,
    so that what takes its worker down again takes no neighbour with it and is known for certain.

    What it costs to place a shard does not grow with the number of workers, but for suspects.

    Args:
        least: workers that must be there before work begins. Once they were, a lost one holds up nobody.
    """

    def __init__(self, min_workers: int = 1) -> None:
        self._least = min_workers
        self._desks: dict[str, _WorkerQueue] = {}
        self._openings = _FreeSlots()
        self._suspects: set[int] = set()
        self._tried: set[int] = set()  # in vain, whatever the reason
        self._held: deque[tuple[ShardKey, int]] = deque()
        self._clearing = False
        self._due: list[Assignment] = []

    # -- workers -----------------------------------------------------------------------------------------------

    @property
    def ready_workers(self) -> int:
        """Workers that are there."""
        return len(self._desks)

    @property
    def required_workers(self) -> int:
        """Workers without which nothing is handed out."""
        return self._least

    def add_worker(self, worker: str, images_in_flight: int = 0) -> None:
        """A worker is ready, whose loader keeps so many images under way."""
        desk = self._desks[worker] = _WorkerQueue(worker, images_in_flight)
        self._openings.enter(desk)
        self._clear_for_suspects()
        if len(self._desks) >= self._least:
            self._least = 1

    def remove_worker(self, worker: str) -> list[ShardKey]:
        """A worker is gone; returns what it had in hand, the one at work first. All of them are suspects now."""
        desk = self._desks.pop(worker, None)
        self._due = [due for due in self._due if due.worker != worker]
        if desk is None:
            return []
        self._openings.leave(desk)
        self._clear_for_suspects()
        self._suspects.update(desk.shards)
        self._tried.update(desk.shards)
        return list(desk.shards.values())

    # -- shards ------------------------------------------------------------------------------------------------

    def free_slots(self) -> int:
        """Shards that would be taken on now."""
        return self._openings.room if self.ready_workers >= self._least else 0

    def idle_workers(self) -> int:
        """Workers that have nothing in hand, and could make a second attempt at what another one is late with."""
        return self._openings.idle() if self.ready_workers >= self._least else 0

    def submit(self, key: ShardKey, plan_number: int, reattempt: bool = False) -> None:
        """Find a worker for a shard, at once or, for a suspect, when one has nothing else; `again` as others know."""
        if key.index in self._suspects:
            self._held.append((key, plan_number))
            self._clear_for_suspects()
        else:
            self._assign(self._openings.least_busy(), key, plan_number, again=reattempt)

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        """Give a shard that another worker has in hand to one that has nothing; see `idle`."""
        self._assign(self._openings.least_busy(), key, plan_number, alone=key.index in self._suspects, again=True)

    def take_assignments(self) -> list[Assignment]:
        """What is to be handed over now, told once."""
        while self._held and (desk := self._idle_desk()) is not None:
            self._assign(desk, *self._held.popleft(), alone=True, again=True)
        self._clear_for_suspects()
        due, self._due = self._due, []
        return due

    def finish(self, worker: str, key: ShardKey) -> None:
        """The shard is committed, says this worker."""
        self._suspects.discard(key.index)
        self._tried.discard(key.index)
        self._put_down(worker, key)

    def fail(self, worker: str, key: ShardKey, suspect: bool = True) -> None:
        """The attempt there ended without a commit; `suspect` unless that was the fault of network or credentials."""
        self._tried.add(key.index)
        if suspect:
            self._suspects.add(key.index)
        self._put_down(worker, key)

    def _assign(self, desk: _WorkerQueue, key: ShardKey, plan: int, alone: bool = False, again: bool = False) -> None:
        self._openings.leave(desk)
        desk.take(key)
        desk.alone, desk.cleared = alone, False
        self._openings.enter(desk)
        self._due.append(Assignment(desk.worker, key, plan, again or key.index in self._tried))

    def _put_down(self, worker: str, key: ShardKey) -> None:
        desk = self._desks.get(worker)
        if desk is not None:
            self._openings.leave(desk)
            desk.put_down(key)
            self._openings.enter(desk)

    # -- suspects: few, so that a look at all workers costs little ----------------------------------------------

    def _idle_desk(self) -> _WorkerQueue | None:
        return next((desk for desk in self._desks.values() if not desk.shards), None)

    def _clear_for_suspects(self) -> None:
        """As many desks as suspects are held get nothing more, those with the fewest shards."""
        if not self._held and not self._clearing:
            return
        able = sorted((desk for desk in self._desks.values() if not desk.alone), key=lambda desk: len(desk.shards))
        for place, desk in enumerate(able):
            self._openings.leave(desk)
            desk.cleared = place < len(self._held)
            self._openings.enter(desk)
        self._clearing = bool(self._held)


def apply_event(placement: Placement, worker: str, event: WorkerEvent) -> None:
    """Enter into the placement what a worker told."""
    match event:
        case WorkerReady(_, loaded):
            placement.add_worker(worker, loaded.ahead)
        case ShardCommitted(result):
            placement.finish(worker, result.key)
        case ShardFailed(key, error):
            placement.fail(worker, key, suspect=not isinstance(error, Unavailable))
