"""Steps that are under way: the longest is told, with its thread."""

from __future__ import annotations

import threading

from batchjob.stopwatch import Step, Stopwatch


def test_the_longest_of_all_threads_is_told_and_none_when_all_have_ended() -> None:
    now, begun, over = [0.0], threading.Event(), threading.Event()
    stopwatch = Stopwatch(lambda: now[0])

    def other() -> None:
        with stopwatch.step("first"):
            begun.set()
            over.wait()

    thread = threading.Thread(target=other)
    assert stopwatch.longest() is None
    thread.start()
    begun.wait()
    now[0] = 5.0
    with stopwatch.step("second"):
        now[0] = 6.0
        assert stopwatch.longest() == Step("first", thread.ident or 0, 6.0)
        over.set()
        thread.join()
        assert stopwatch.longest() == Step("second", threading.get_ident(), 1.0)
    assert stopwatch.longest() is None
