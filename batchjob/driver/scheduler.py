"""Shard scheduler: which shard is next, when to abandon one, which one is a straggler. Pure state, no I/O."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from batchjob.types import ShardKey

__all__ = ["AbandonedShard", "Scheduler"]

# A shard is a straggler after this many times the median duration of the last shards …
_STRAGGLER_FACTOR = 2.0
# … but not before this many seconds: a second attempt has to start up, too.
_MIN_STRAGGLER_SECONDS = 5.0
# Number of durations that the median is taken over.
_DURATIONS_KEPT = 101


@dataclass(frozen=True)
class AbandonedShard:
    """A shard that used up its attempts.

    Attributes:
        key: The shard.
        reason: Message of the last error.
    """

    key: ShardKey
    reason: str


@dataclass(slots=True)
class _RunningShard:
    """A shard that one worker has, or two.

    Attributes:
        key: The shard.
        started: Time of its first attempt, by the scheduler's clock.
        attempts: Attempts that are running now.
        speculated: True if it has had its speculative attempt.
    """

    key: ShardKey
    started: float
    attempts: int = 1
    speculated: bool = False


@dataclass
class Scheduler:
    """Shards of a run: waiting, running, done or abandoned.

    Shards are handed out in plan order. One that failed goes to the back of the queue, so that a poisoned shard delays
    no other; one that was interrupted through no fault of its own goes to the front.
    When no shard waits, a straggler may get a speculative attempt on a second worker. The first commit counts; the
    result of the other attempt changes nothing.

    Args:
        max_attempts: Failed attempts after which a shard is abandoned.
        clock: Monotonic clock, in seconds.

    Attributes:
        given_up: Shards that were abandoned, in that order.
        done: Number of shards that are committed.

    Example, with `max_attempts=2`:
        add([s0, s1]); take_next() → s0; take_next() → s1; take_next() → None
        fail(s0) → False, s0 waits again; take_next() → s0; fail(s0) → True, s0 is in `given_up`
        finish(s1) → True, `done` is 1; finish(s1) → False; idle → True
    """

    max_attempts: int
    clock: Callable[[], float] = time.monotonic
    _waiting: deque[ShardKey] = field(default_factory=deque)
    _running: dict[int, _RunningShard] = field(default_factory=dict)  # by shard index, in the order of their start
    _failures: dict[int, int] = field(default_factory=dict)
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=_DURATIONS_KEPT))
    given_up: list[AbandonedShard] = field(default_factory=list)
    done: int = 0

    def add(self, keys: Iterable[ShardKey]) -> None:
        """Append shards to the queue."""
        self._waiting.extend(keys)

    @property
    def waiting(self) -> int:
        """Number of shards in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of shards that workers have."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """True if no shard is waiting or running."""
        return not self._waiting and not self._running

    def is_running(self, key: ShardKey) -> bool:
        """Return True if a shard is running. If it is not, the result of an attempt at it changes nothing."""
        return key.index in self._running

    def take_next(self) -> ShardKey | None:
        """Take the next shard from the queue and count it as running; None if the queue is empty."""
        if not self._waiting:
            return None
        key = self._waiting.popleft()
        self._running[key.index] = _RunningShard(key, self.clock())
        return key

    def take_straggler(self) -> ShardKey | None:
        """Take the oldest straggler for its one speculative attempt; None if there is none or shards are waiting.

        A straggler has been running for more than twice the median duration of the last 101 shards, 5 s at least.
        """
        if self._waiting or not self._durations:
            return None
        started_before = self.clock() - max(_MIN_STRAGGLER_SECONDS, _STRAGGLER_FACTOR * median(self._durations))
        for shard in self._running.values():
            if shard.started > started_before:
                return None
            if not shard.speculated:
                shard.speculated, shard.attempts = True, shard.attempts + 1
                return shard.key
        return None

    def finish(self, key: ShardKey) -> bool:
        """Count a shard as committed.

        Returns:
            False if another attempt at the shard came first: then nothing changes.
        """
        shard = self._running.pop(key.index, None)
        if shard is None:
            return False
        self._durations.append(self.clock() - shard.started)
        self._failures.pop(key.index, None)
        self.done += 1
        return True

    def fail(self, key: ShardKey, reason: str, uses_attempt: bool = True, to_front: bool = False) -> bool:
        """Record a failed attempt; put the shard back into the queue, or abandon it.

        While a second attempt at the shard is running, it is neither queued nor abandoned.

        Args:
            key: The shard.
            reason: Message of the error.
            uses_attempt: False for faults that are not the shard's (network, credentials, or another shard's fault):
                they use up no attempt.
            to_front: Put the shard at the front of the queue instead of the back.

        Returns:
            True if the shard is abandoned.
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
