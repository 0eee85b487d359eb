"""Jobs on a Ray of their own: actors and drivers that are killed, what stays behind, and what the next run finds."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commands import (
    Command,
    actors,
    alive,
    descendants,
    ends,
    footers,
    forget_lease,
    kill,
    own_ray,
    plans,
    start,
    table,
    until,
    write_slow_job,
)

IMAGES, SHARD = 64, 4


def attempts(output: Path) -> dict[str, str]:
    return {key: made.attempt for key, made in footers(output).items()}


@contextmanager
def family_of(command: Command) -> Iterator[set[tuple[int, int]]]:
    """All processes seen below a command for as long as it lives; complete on leaving."""
    seen: set[tuple[int, int]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            seen.update(descendants(command.pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_killed_drivers_and_workers_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    write_slow_job(tmp_path, IMAGES)
    output = tmp_path / "out"
    command = ["run", str(tmp_path / "job.yaml"), "--json", "runtime.pool=ray", "runtime.workers=2"]
    command += ["runtime.cpus_per_worker=1"]
    with own_ray() as env:
        env |= {"BATCHJOB_TEST_NAP": "0.3"}
        with ends(start(*command, env=env)) as driver:
            until(lambda: len(attempts(output)) >= 2, command=driver)
            family = kill(driver)
        assert family
        until(lambda: not alive(family), timeout=120)  # Ray's agents need 60 s
        first = attempts(output)
        forget_lease(output)

        with ends(start(*command, env=env)) as driver, family_of(driver) as family:
            until(lambda: len(attempts(output)) >= len(first) + 2, command=driver)
            victim, _ = min(actors(driver))
            os.kill(victim, signal.SIGKILL)
            ended = driver.end()
        until(lambda: not alive(family), timeout=120)
    assert (ended.code, ended.answer["status"]) == (0, "complete"), ended.err
    assert "was lost" in ended.err
    assert victim in {pid for pid, _ in family}
    print(f"driver killed at {len(first)} of {IMAGES // SHARD} parts, then a worker; {len(family)} processes, all gone")
    assert first.items() <= attempts(output).items(), "a committed part was done again"
    assert sorted(table(output)["position"].to_pylist()) == list(range(IMAGES))
    assert len(plans(output)) == 1
