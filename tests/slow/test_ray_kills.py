"""Runs that start a Ray of their own: killed drivers and actors lose no row, and leave no process behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.batchjob_process import (
    Command,
    delete_lease,
    filter_alive,
    find_actors,
    find_descendants,
    kill,
    kill_on_exit,
    list_plan_heads,
    read_all_footers,
    read_rows,
    start_batchjob,
    wait_until,
    write_slow_job,
)

IMAGES, SHARD = 64, 4


def read_attempts(output: Path) -> dict[str, str]:
    """Return the attempt that made each committed part."""
    return {key: footer.attempt for key, footer in read_all_footers(output).items()}


@contextmanager
def collect_descendants(command: Command) -> Iterator[set[tuple[int, int]]]:
    """Collect all processes that a command starts; the set is complete on exit."""
    processes: set[tuple[int, int]] = set()
    over = threading.Event()

    def poll() -> None:
        while not over.wait(0.2):
            processes.update(find_descendants(command.pid))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield processes
    finally:
        over.set()
        thread.join()


def test_killed_driver_and_worker_lose_no_row_and_leave_no_process(
    tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    write_slow_job(tmp_path, IMAGES)
    output = tmp_path / "out"
    command = ["run", str(tmp_path / "job.yaml"), "--json", "runtime.pool=ray", "runtime.workers=2"]
    command += ["runtime.cpus_per_worker=1"]
    env = {**ray_environment, "BATCHJOB_TEST_NAP": "0.3"}
    with kill_on_exit(start_batchjob(*command, env=env)) as driver:
        wait_until(lambda: len(read_attempts(output)) >= 2, command=driver)
        processes = kill(driver)
    assert processes
    wait_until(lambda: not filter_alive(processes), timeout=120)  # Ray's agents take 60 s
    committed = read_attempts(output)
    delete_lease(output)

    with kill_on_exit(start_batchjob(*command, env=env)) as driver, collect_descendants(driver) as processes:
        wait_until(lambda: len(read_attempts(output)) >= len(committed) + 2, command=driver)
        victim, _ = min(find_actors(driver))
        os.kill(victim, signal.SIGKILL)
        run = driver.wait()
    wait_until(lambda: not filter_alive(processes), timeout=120)
    assert (run.exit_code, run.json_result["status"]) == (0, "complete"), run.stderr
    assert "was lost" in run.stderr
    assert victim in {pid for pid, _ in processes}
    print(
        f"driver killed after {len(committed)} of {IMAGES // SHARD} parts, then a worker; "
        f"{len(processes)} processes, all gone"
    )
    assert committed.items() <= read_attempts(output).items(), "a committed part was made again"
    assert sorted(read_rows(output)["position"].to_pylist()) == list(range(IMAGES))
    assert len(list_plan_heads(output)) == 1
