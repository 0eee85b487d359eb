"""Loss of the Ray under a driver: the run soon ends with exit code 75, and the next one completes it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from batchjob.output import commit
from tests.support.batchjob_process import (
    Command,
    filter_alive,
    find_descendants,
    kill_on_exit,
    open_output,
    read_rows,
    run_batchjob,
    start_batchjob,
    wait_until,
    write_slow_job,
)

IMAGES = 160


def find_process(command: Command, name: str) -> int:
    """Return the id of the run's process of this name."""
    return next(
        pid for pid, _ in find_descendants(command.pid) if (Path("/proc") / f"{pid}/comm").read_text()[:-1] == name
    )


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_lost_ray_ends_the_run_as_temporary(tmp_path: Path, victim: str, ray_environment: dict[str, str]) -> None:
    write_slow_job(tmp_path, IMAGES)
    output = tmp_path / "out"
    command = ["run", str(tmp_path / "job.yaml"), "runtime.pool=ray", "--json"]
    with kill_on_exit(start_batchjob(*command, env={**ray_environment, "BATCHJOB_TEST_NAP": "2"})) as driver:
        wait_until(lambda: len(commit.list_parts(open_output(str(output)))) >= 1, command=driver)
        processes = find_descendants(driver.pid)
        os.kill(find_process(driver, victim), signal.SIGKILL)
        first = driver.wait(timeout=100)
    print(
        f"without its {victim} the driver ended with {first.exit_code} after {first.seconds:.0f} s: "
        f"{first.stderr[-300:]}"
    )
    assert first.exit_code == 75, first.stderr
    assert first.json_result["status"] == "temporary"
    assert "Ray" in first.json_result["message"]
    # Without a head, Ray's processes end by themselves after 60 s.
    wait_until(lambda: not filter_alive(processes), timeout=120)
    second = run_batchjob(*command, env={**ray_environment, "BATCHJOB_TEST_NAP": "0"})
    assert second.exit_code == 0, second.stderr
    assert sorted(read_rows(output)["position"].to_pylist()) == list(range(IMAGES))
