"""Which worker gets which shard, and which shards travel alone. Pure: no clock, no input or output."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from batchjob.records import ShardKey

__all__ = ["Assignment", "Placement"]

# One at work, one on its way into the output, and two queued, so that the pipeline never runs dry between shards. Where
# more than one waits for the store, the store sets the pace and not the queue.
_SHARDS = 4


@dataclass(frozen=True)
class Assignment:
    """A shard of plan number `plan` for a worker."""

    worker: str
    key: ShardKey
    plan: int


@dataclass
class _Desk:
    """What one worker has in hand, oldest first.

    Attributes:
        ahead: images that its loader keeps under way, 0 where that is not known.
        alone: it has a suspect, and gets nothing beside it.
    """

    ahead: int
    shards: dict[int, ShardKey] = field(default_factory=dict)
    alone: bool = False

    @property
    def room(self) -> int:
        """How many more it takes: four in all, of small shards as many as keep its loader busy."""
        if self.alone:
            return 0
        short = sum(key.rows for key in self.shards.values()) < 2 * self.ahead
        return max(_SHARDS - len(self.shards), int(short))


class Placement:
    """Shards in the hands of workers.

    A shard whose attempt failed is a suspect: it goes to a worker that has nothing else, which gets nothing beside it,
    so that what takes its worker down again takes no neighbour with it and is known for certain.

    Args:
        least: workers that must be there before work begins. Once they were, a lost one holds up nobody.
    """

    def __init__(self, least: int = 1) -> None:
        self._least = least
        self._desks: dict[str, _Desk] = {}
        self._suspects: set[int] = set()
        self._held: deque[tuple[ShardKey, int]] = deque()
        self._due: list[Assignment] = []

    # -- workers -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """Workers that are there."""
        return len(self._desks)

    @property
    def wanted(self) -> int:
        """Workers without which nothing is handed out."""
        return self._least

    def enter(self, worker: str, ahead: int = 0) -> None:
        """A worker is ready, whose loader keeps so many images under way."""
        self._desks[worker] = _Desk(ahead)
        if len(self._desks) >= self._least:
            self._least = 1

    def leave(self, worker: str) -> list[ShardKey]:
        """A worker is gone; returns what it had in hand, the one at work first. All of them are suspects now."""
        desk = self._desks.pop(worker, None)
        self._due = [due for due in self._due if due.worker != worker]
        lost = list(desk.shards.values()) if desk else []
        self._suspects.update(key.index for key in lost)
        return lost

    # -- shards ------------------------------------------------------------------------------------------------

    def free(self) -> int:
        """Shards that would be taken on now."""
        return sum(desk.room for _, desk in self._open()) if self.ready >= self._least else 0

    def submit(self, key: ShardKey, plan: int) -> None:
        """Find a worker for a shard, at once or, for a suspect, when one has nothing else."""
        if key.index in self._suspects:
            self._held.append((key, plan))
        else:
            worker, _ = max(self._open(), key=lambda at: at[1].room)
            self._assign(worker, key, plan)

    def due(self) -> list[Assignment]:
        """What is to be handed over now, told once."""
        idle = (worker for worker, desk in self._desks.items() if not desk.shards)
        for worker, (key, plan) in zip(list(idle), list(self._held), strict=False):
            self._held.popleft()
            self._assign(worker, key, plan)
            self._desks[worker].alone = True
        due, self._due = self._due, []
        return due

    def finish(self, key: ShardKey) -> None:
        """The shard is committed."""
        self._suspects.discard(key.index)
        self._put_down(key)

    def fail(self, key: ShardKey, suspect: bool = True) -> None:
        """The attempt ended without a commit; `suspect` unless that was the fault of network or credentials."""
        if suspect:
            self._suspects.add(key.index)
        self._put_down(key)

    def _open(self) -> list[tuple[str, _Desk]]:
        """Workers that may get more. As many as suspects are held get none, so that they come to have nothing else."""
        found = [(worker, desk) for worker, desk in self._desks.items() if not desk.alone]
        found.sort(key=lambda at: len(at[1].shards))
        return found[len(self._held) :]

    def _assign(self, worker: str, key: ShardKey, plan: int) -> None:
        self._desks[worker].shards[key.index] = key
        self._due.append(Assignment(worker, key, plan))

    def _put_down(self, key: ShardKey) -> None:
        for desk in self._desks.values():
            if desk.shards.pop(key.index, None) is not None:
                desk.alone = False
