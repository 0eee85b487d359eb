"""Simulated process: it runs only when it is advanced, and stops before each call of the store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar, cast

from tests.support.memory_store import Call, Fault, Killed, MemoryStore

__all__ = ["KILLS", "REST", "Actor"]

_LOST_RACE_FAULTS = (Fault.REPEATED, Fault.CONFLICT)
_CONDITIONAL_METHODS = ("put_if_absent", "replace_if_match", "delete_if_match")
REST = "rest"
KILLS = (Fault.KILLED_BEFORE, Fault.KILLED_AFTER)


class Actor:
    """Thread with a clock of its own. One actor runs at a time, and `advance` waits until it stops.

    Args:
        name: Name, for messages.
        target: Work of the actor; `Killed` ends it silently.

    Attributes:
        after: Called after each call, in the actor's thread. An error of it stops the actor, and `advance` raises it.
        clock: Time of the actor, in seconds.
        stop: Call that the actor is about to make; None once it has ended.
        error: Error that ended it, except `Killed`.
        dead: Whether it was killed; it makes no further call.
        stale: Number of its calls that were answered with an old listing.
    """

    running: ClassVar[Actor]
    store: MemoryStore

    def __init__(self, name: str, target: Callable[[], object]) -> None:
        self.name, self._target = name, target
        self.clock = 0.0
        self.stop: Call | None = Call("start", "")
        self.error: BaseException | None = None
        self.dead = False
        self.stale = 0
        self.after: Callable[[], object] = lambda: None
        self._calls_left, self._last_fault, self._stop_at_rest = 0, cast(Fault | None, None), False
        self._check_error: BaseException | None = None
        self._resume_lock, self._stopped_lock = threading.Lock(), threading.Lock()
        self._resume_lock.acquire()
        self._stopped_lock.acquire()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def ended(self) -> bool:
        return self.stop is None

    def advance(self, calls: int = 1, fault: Fault | None = None, *, stop_at_rest: bool = False) -> None:
        """Let the actor make calls, and stop before the next one.

        Args:
            calls: Largest number of calls; the actor stops earlier if it has nothing to do.
            fault: Fault of the last call.
            stop_at_rest: Stop as soon as the actor waits for something.
        """
        assert self.stop is not None, f"{self.name} has ended"
        Actor.running, self._calls_left, self._last_fault, self._stop_at_rest = self, calls, fault, stop_at_rest
        self._resume_lock.release()
        self._stopped_lock.acquire()
        if self._check_error is not None:
            raise self._check_error

    def kill(self) -> None:
        """Kill the actor: it makes no further call."""
        if not self.ended:
            self.advance(1, Fault.KILLED_BEFORE)

    def pause(self, call: Call) -> Fault | None:
        """Stop before a call until the actor is advanced, in its own thread; return the fault of the call, if any."""
        if self.dead:
            raise Killed(self.name)
        self.stop = call
        self._calls_left -= 1
        if (
            not self._run_checks()
            or self._calls_left <= 0
            or call.method == REST
            or (self._stop_at_rest and call.method == "wait")
        ):
            self._stopped_lock.release()
            self._resume_lock.acquire()
        return self._take_fault(call)

    def pause_before_call(self, call: Call) -> Fault | None:
        """Stop before a call of the store, and return a fault that this call can have: `before_call` of its store."""
        fault = self.pause(call)
        return None if fault in _LOST_RACE_FAULTS and call.method not in _CONDITIONAL_METHODS else fault

    def wait(self, reason: str) -> Fault | None:
        """Stop at a point that is no call of the store, in the actor's own thread. Raises Killed."""
        fault = self.pause(Call(reason, ""))
        if self.dead:
            raise Killed(self.name)
        return fault

    def sleep(self, seconds: float) -> None:
        """Advance the actor's clock, in its own thread; other actors may run meanwhile."""
        self.wait("sleep")
        self.clock += seconds

    def _run_checks(self) -> bool:
        try:
            self.after()
        except BaseException as error:  # noqa: BLE001 - `advance` raises it
            self._check_error = error
        return self._check_error is None

    def _take_fault(self, call: Call) -> Fault | None:
        fault = self._last_fault if self._calls_left == 1 else None
        if fault in KILLS:
            self.dead = True
        if fault is Fault.STALE and call.method == "list":
            self.stale += 1
        return fault

    def _run(self) -> None:
        self._resume_lock.acquire()
        try:
            if self._take_fault(Call("start", "")) in KILLS:
                raise Killed(self.name)
            self._target()
        except Killed:
            self.dead = True
        except BaseException as error:  # noqa: BLE001 - the test checks it
            self.error = error
        self._run_checks()
        self.stop = None
        self._stopped_lock.release()
