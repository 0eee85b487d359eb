"""Which shard next, when to give one up, and which is late. Pure: its clock is given, no input or output."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from batchjob.types import ShardKey

__all__ = ["AbandonedShard", "Scheduler"]

_LATE = 2.0  # times as long as shards usually take
_LATE_SECONDS = 5.0  # at least: a second attempt has its own beginning to make
_REMEMBERED = 101  # shards from whose times the usual one is told


@dataclass(frozen=True)
class AbandonedShard:
    """A shard that failed as often as it may."""

    key: ShardKey
    reason: str


@dataclass(slots=True)
class _RunningShard:
    """A shard that is with one worker, or with two.

    Attributes:
        since: when it was handed out.
        attempts: under way.
        backed_up: it has had its second attempt.
    """

    key: ShardKey
    since: float
    attempts: int = 1
    speculated: bool = False


@dataclass
class Scheduler:
    """Shards waiting, running, done and given up.

    A shard is handed out in plan order; one that failed goes to the back, so that a poisoned shard holds up nobody,
    and one that was interrupted to the front.
    When nothing waits, one that takes much longer than the others may be handed out a second time; the first commit
    counts, and what becomes of the other attempt changes nothing.

    Args:
        attempts: how often a shard may fail before it is given up.
        clock: seconds, monotonic.
    """

    max_attempts: int
    clock: Callable[[], float] = time.monotonic
    _waiting: deque[ShardKey] = field(default_factory=deque)
    _running: dict[int, _RunningShard] = field(default_factory=dict)  # the one handed out first is the first
    _failures: dict[int, int] = field(default_factory=dict)
    _took: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    given_up: list[AbandonedShard] = field(default_factory=list)
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

    def is_running(self, key: ShardKey) -> bool:
        """Whether it matters what becomes of an attempt at this shard."""
        return key.index in self._running

    def take_next(self) -> ShardKey | None:
        """The next shard to hand out, now running; None when none waits."""
        if not self._waiting:
            return None
        key = self._waiting.popleft()
        self._running[key.index] = _RunningShard(key, self.clock())
        return key

    def take_straggler(self) -> ShardKey | None:
        """The shard that is late for longest, now running twice; None when none is, or others wait still.

        Late is what has been out twice as long as half of the last shards took; each has one such second attempt.
        """
        if self._waiting or not self._took:
            return None
        since = self.clock() - max(_LATE_SECONDS, _LATE * median(self._took))
        for shard in self._running.values():
            if shard.since > since:
                return None
            if not shard.speculated:
                shard.speculated, shard.attempts = True, shard.attempts + 1
                return shard.key
        return None

    def finish(self, key: ShardKey) -> bool:
        """The shard is committed. False when that was known: a late answer changes nothing."""
        shard = self._running.pop(key.index, None)
        if shard is None:
            return False
        self._took.append(self.clock() - shard.since)
        self._failures.pop(key.index, None)
        self.done += 1
        return True

    def fail(self, key: ShardKey, reason: str, uses_attempt: bool = True, to_front: bool = False) -> bool:
        """An attempt failed; True when the shard is given up with it. As long as another one is under way, it is not.

        Args:
            counts: False for faults that are nobody's (network, credentials) or another shard's: they use up no
                attempt.
            first: whether it is the next to be handed out.
        """
        shard = self._running.get(key.index)
        if shard is None:
            return False
        failures = self._failures[key.index] = self._failures.get(key.index, 0) + uses_attempt
        shard.attempts -= 1
        if shard.attempts:
            return False
        del self._running[key.index]
        if failures >= self.max_attempts:
            del self._failures[key.index]
            self.given_up.append(AbandonedShard(key, reason))
            return True
        self._waiting.appendleft(key) if to_front else self._waiting.append(key)
        return False
