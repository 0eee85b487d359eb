"""A Ray that dies under the driver ends the run with 75, in good time, and nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from batchjob_process import (
    Command,
    filter_alive,
    find_descendants,
    kill_on_exit,
    read_rows,
    run_batchjob,
    start_batchjob,
    wait_until,
    write_slow_job,
)

from batchjob.output import commit
from batchjob.storage.store import open_store

IMAGES = 160


def process_named(command: Command, name: str) -> int:
    """The process of the run's own Ray that has this name."""
    return next(
        pid for pid, _ in find_descendants(command.pid) if (Path("/proc") / f"{pid}/comm").read_text()[:-1] == name
    )


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_lost_ray_ends_the_run_as_temporary(tmp_path: Path, victim: str) -> None:
    write_slow_job(tmp_path, IMAGES)
    output = tmp_path / "out"
    job = ["run", str(tmp_path / "job.yaml"), "runtime.pool=ray", "--json"]
    with kill_on_exit(start_batchjob(*job, env={"BATCHJOB_TEST_NAP": "2"})) as first:
        wait_until(lambda: len(commit.list_parts(open_store(str(output)))) >= 1, command=first)
        family = find_descendants(first.pid)
        os.kill(process_named(first, victim), signal.SIGKILL)
        ended = first.wait(timeout=100)
    print(
        f"without its {victim} the driver ended with {ended.exit_code} after {ended.seconds:.0f} s: "
        f"{ended.stderr[-300:]}"
    )
    assert ended.exit_code == 75, ended.stderr
    assert ended.json_result["status"] == "temporary"
    assert "Ray" in ended.json_result["message"]
    wait_until(
        lambda: not filter_alive(family), timeout=120
    )  # without a head, what Ray started ends by itself after 60 s
    again = run_batchjob(*job, env={"BATCHJOB_TEST_NAP": "0"})
    assert again.exit_code == 0, again.stderr
    assert sorted(read_rows(output)["position"].to_pylist()) == list(range(IMAGES))
