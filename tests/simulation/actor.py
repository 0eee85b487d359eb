"""A process that runs only when it is told to, and stops before each of its calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar, cast

from memory_store import Call, Fault, Killed, MemoryStore

__all__ = ["KILLS", "REST", "Actor", "Client"]

_LOST_RACES = (Fault.REPEATED, Fault.CONFLICT)
_CONDITIONAL = ("put_if_absent", "replace_if_match", "delete_if_match")
REST = "rest"
KILLS = (Fault.KILLED_BEFORE, Fault.KILLED_AFTER)


class Actor:
    """A thread with a clock of its own. One of them runs at a time; whoever advances it waits for it.

    Args:
        name: for people.
        work: what it does; `Killed` ends it without a word.

    Attributes:
        after: called after each of its calls, in its thread; what it raises stops it there, and is raised by `advance`.
        clock: seconds, as it sees them.
        stop: the call before which it stands; None once it has ended.
        error: what ended it, but for `Killed`.
        dead: it was killed; it makes no further call.
        stale: calls that were answered with an old listing.
    """

    running: ClassVar[Actor]
    store: Client

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self.name, self._work = name, work
        self.clock = 0.0
        self.stop: Call | None = Call("start", "")
        self.error: BaseException | None = None
        self.dead = False
        self.stale = 0
        self.after: Callable[[], object] = lambda: None
        self._calls, self._last, self._resting = 0, cast(Fault | None, None), False
        self._broken: BaseException | None = None
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def ended(self) -> bool:
        return self.stop is None

    def advance(self, calls: int = 1, fault: Fault | None = None, *, to_a_rest: bool = False) -> None:
        """Let it make so many calls, the last of which goes wrong, and go on to the next one.

        Args:
            calls: at most; it stops where it has nothing to do.
            fault: of the last one.
            to_a_rest: it stops where it waits, too.
        """
        assert self.stop is not None, f"{self.name} has ended"
        Actor.running, self._calls, self._last, self._resting = self, calls, fault, to_a_rest
        self._go.release()
        self._back.acquire()
        if self._broken is not None:
            raise self._broken

    def kill(self) -> None:
        """It makes no further call."""
        if not self.ended:
            self.advance(1, Fault.KILLED_BEFORE)

    def pause(self, call: Call) -> Fault | None:
        """In its own thread: stand before this call until told to go on; how the call goes wrong, if it does."""
        if self.dead:
            raise Killed(self.name)
        self.stop = call
        self._calls -= 1
        if not self._in_order() or self._calls <= 0 or call.method == REST or (self._resting and call.method == "wait"):
            self._back.release()
            self._go.acquire()
        return self._ordered(call)

    def wait(self, why: str) -> Fault | None:
        """In its own thread: a stop that is no call of the store. Raises Killed."""
        fault = self.pause(Call(why, ""))
        if self.dead:
            raise Killed(self.name)
        return fault

    def sleep(self, seconds: float) -> None:
        """In its own thread: its clock goes on, and others may run meanwhile."""
        self.wait("sleep")
        self.clock += seconds

    def _in_order(self) -> bool:
        try:
            self.after()
        except BaseException as error:  # noqa: BLE001 - raised by whoever advances it
            self._broken = error
        return self._broken is None

    def _ordered(self, call: Call) -> Fault | None:
        fault = self._last if self._calls == 1 else None
        if fault in KILLS:
            self.dead = True
        if fault is Fault.STALE and call.method == "list":
            self.stale += 1
        return fault

    def _run(self) -> None:
        self._go.acquire()
        try:
            if self._ordered(Call("start", "")) in KILLS:
                raise Killed(self.name)
            self._work()
        except Killed:
            self.dead = True
        except BaseException as error:  # noqa: BLE001 - looked at by whoever advances it
            self.error = error
        self._in_order()
        self.stop = None
        self._back.release()


class Client(MemoryStore):
    """One actor's client of the objects that all share: it stops before every call."""

    def __init__(self, shared: MemoryStore, actor: Actor) -> None:
        super().__init__(shared._disk)
        self._actor = actor

    def _next_fault(self, verb: str, key: str) -> Fault | None:
        fault = self._actor.pause(Call(verb, key))
        return None if fault in _LOST_RACES and verb not in _CONDITIONAL else fault
