"""Actor of the simulation: it stops before each call of its store, and has the fault that it is advanced with."""

from __future__ import annotations

from batchjob.errors import Unavailable
from tests.simulation.actor import Actor
from tests.support.memory_store import Call, Fault, MemoryStore


def test_actor_stops_before_each_call_of_its_store() -> None:
    shared = MemoryStore()

    def write() -> None:
        for key in ("a", "b"):
            store.put_if_absent(key, b"")

    actor = Actor("writer", write)
    store = MemoryStore(shared.state, actor.pause_before_call)
    actor.advance()
    assert (actor.stop, shared.stored_keys()) == (Call("put_if_absent", "a"), [])
    actor.advance()
    assert (actor.stop, shared.stored_keys()) == (Call("put_if_absent", "b"), ["a"])
    actor.advance(fault=Fault.LOST)
    assert (actor.stop, shared.stored_keys()) == (None, ["a", "b"])
    assert isinstance(actor.error, Unavailable)
