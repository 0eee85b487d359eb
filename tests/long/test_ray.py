"""Jobs on a Ray of their own: actors and drivers that are killed, what stays behind, and what the next run finds."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchjob_process import (
    Command,
    delete_lease,
    filter_alive,
    find_actors,
    find_descendants,
    kill,
    kill_on_exit,
    list_plan_heads,
    ray_environment,
    read_all_footers,
    read_rows,
    start_batchjob,
    wait_until,
    write_slow_job,
)

IMAGES, SHARD = 64, 4


def attempts(output: Path) -> dict[str, str]:
    return {key: made.attempt for key, made in read_all_footers(output).items()}


@contextmanager
def family_of(command: Command) -> Iterator[set[tuple[int, int]]]:
    """All processes seen below a command for as long as it lives; complete on leaving."""
    seen: set[tuple[int, int]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            seen.update(find_descendants(command.pid))

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
    with ray_environment() as env:
        env |= {"BATCHJOB_TEST_NAP": "0.3"}
        with kill_on_exit(start_batchjob(*command, env=env)) as driver:
            wait_until(lambda: len(attempts(output)) >= 2, command=driver)
            family = kill(driver)
        assert family
        wait_until(lambda: not filter_alive(family), timeout=120)  # Ray's agents need 60 s
        first = attempts(output)
        delete_lease(output)

        with kill_on_exit(start_batchjob(*command, env=env)) as driver, family_of(driver) as family:
            wait_until(lambda: len(attempts(output)) >= len(first) + 2, command=driver)
            victim, _ = min(find_actors(driver))
            os.kill(victim, signal.SIGKILL)
            ended = driver.wait()
        wait_until(lambda: not filter_alive(family), timeout=120)
    assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
    assert "was lost" in ended.stderr
    assert victim in {pid for pid, _ in family}
    print(f"driver killed at {len(first)} of {IMAGES // SHARD} parts, then a worker; {len(family)} processes, all gone")
    assert first.items() <= attempts(output).items(), "a committed part was done again"
    assert sorted(read_rows(output)["position"].to_pylist()) == list(range(IMAGES))
    assert len(list_plan_heads(output)) == 1
