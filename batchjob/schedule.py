"""Which shard next, and when to give one up. Pure: no clock, no input or output."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from batchjob.records import ShardKey

__all__ = ["GivenUp", "Schedule"]


@dataclass(frozen=True)
class GivenUp:
    """A shard that failed as often as it may."""

    key: ShardKey
    reason: str


@dataclass
class Schedule:
    """Shards waiting, running, done and given up.

    A shard is handed out in plan order; one that failed goes to the back, so that a poisoned shard holds up nobody.

    Args:
        attempts: how often a shard may fail before it is given up.
    """

    attempts: int
    _waiting: deque[ShardKey] = field(default_factory=deque)
    _running: dict[int, ShardKey] = field(default_factory=dict)
    _failures: dict[int, int] = field(default_factory=dict)
    given_up: list[GivenUp] = field(default_factory=list)
    done: int = 0

    def add(self, keys: Iterable[ShardKey]) -> None:
        """More shards to do."""
        self._waiting.extend(keys)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._running

    def take(self) -> ShardKey | None:
        """The next shard to hand out, now running; None when none waits."""
        if not self._waiting:
            return None
        key = self._waiting.popleft()
        self._running[key.index] = key
        return key

    def finish(self, key: ShardKey) -> bool:
        """The shard is committed. False when that was known: a late answer changes nothing."""
        if self._running.pop(key.index, None) is None:
            return False
        self._failures.pop(key.index, None)
        self.done += 1
        return True

    def fail(self, key: ShardKey, reason: str, counts: bool = True) -> bool:
        """An attempt failed; True when the shard is given up with it.

        Args:
            counts: False for faults that are nobody's (network, credentials) or another shard's: they use up no
                attempt.
        """
        if self._running.pop(key.index, None) is None:
            return False
        failures = self._failures.get(key.index, 0) + counts
        if failures >= self.attempts:
            self.given_up.append(GivenUp(key, reason))
            return True
        self._failures[key.index] = failures
        self._waiting.append(key)
        return False
