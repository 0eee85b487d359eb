"""Child processes that start clean and fast: a fork server that has torch loaded, and never runs `__main__` again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any, cast

__all__ = ["end_children", "end_with_parent", "preload", "starting"]

# Imported once, before the first fork. No storage clients: their threads and connections do not survive one.
_MODULES = ["torch", "PIL.ImageFile"]

_ONE_AT_A_TIME = threading.RLock()
_START_SECONDS = 3.0  # that one start may take


def preload(*modules: str) -> None:
    """Start the fork server that loader processes come from; one that is running stays as it is.

    It imports torch and the named modules while this program goes on; this returns at once.
    """
    from multiprocessing import forkserver, resource_tracker

    multiprocessing.get_context("forkserver").set_forkserver_preload([*_MODULES, *modules])
    resource_tracker.ensure_running()  # whose start, within the other's, would let SIGINT through again
    with starting(), _unmoved_by_ctrl_c():
        forkserver.ensure_running()


@contextlib.contextmanager
def _unmoved_by_ctrl_c() -> Iterator[None]:
    """What is started meanwhile never hears SIGINT: a terminal sends it to all, but it is the driver that ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _StandIn(ModuleType):
    """`__main__` for everybody but `multiprocessing`, which finds no file in it that a new process should run."""

    def __init__(self, main: ModuleType) -> None:
        super().__init__("__main__")
        self.__dict__["_main"] = main

    def __getattr__(self, name: str) -> Any:
        if name in {"__file__", "__path__"}:
            raise AttributeError(name)
        return getattr(self.__dict__["_main"], name)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Around the start of processes: they do not import again the program that runs us.

    That may be a script without a guard, or Ray's worker. One start at a time, from any thread.
    """
    with _ONE_AT_A_TIME:
        main = sys.modules["__main__"]
        method = cast("str | None", multiprocessing.get_start_method(allow_none=True))
        sys.modules["__main__"] = _StandIn(main)
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            if method is None:  # starting a process settles it for the whole program, which is not for us to do
                multiprocessing.set_start_method(cast("str", None), force=True)


def end_children() -> None:
    """Kill all child processes; none is started any more, for this program is about to end.

    One that its starter does not live to tell what to do ends in a traceback.
    """
    _ONE_AT_A_TIME.acquire(timeout=_START_SECONDS)
    for child in multiprocessing.active_children():
        child.kill()


def end_with_parent() -> None:
    """Wait, in a thread of a child process, for the program that started it to be gone; then end it at once.

    A killed program cannot say goodbye, and the fork server, the parent by process id, lives as long as its children.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
