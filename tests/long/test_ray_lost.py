"""A Ray that dies under the driver ends the run with 75, in good time, and nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from commands import Command, alive, descendants, ends, run, start, table, until, write_slow_job

from batchjob.output import commit
from batchjob.storage.store import open_store

IMAGES = 160


def process_named(command: Command, name: str) -> int:
    """The process of the run's own Ray that has this name."""
    return next(pid for pid, _ in descendants(command.pid) if (Path("/proc") / f"{pid}/comm").read_text()[:-1] == name)


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_lost_ray_ends_the_run_as_temporary(tmp_path: Path, victim: str) -> None:
    write_slow_job(tmp_path, IMAGES)
    output = tmp_path / "out"
    job = ["run", str(tmp_path / "job.yaml"), "runtime.pool=ray", "--json"]
    with ends(start(*job, env={"BATCHJOB_TEST_NAP": "2"})) as first:
        until(lambda: len(commit.list_parts(open_store(str(output)))) >= 1, command=first)
        family = descendants(first.pid)
        os.kill(process_named(first, victim), signal.SIGKILL)
        ended = first.end(timeout=100)
    print(f"without its {victim} the driver ended with {ended.code} after {ended.seconds:.0f} s: {ended.err[-300:]}")
    assert ended.code == 75, ended.err
    assert ended.answer["status"] == "temporary"
    assert "Ray" in ended.answer["message"]
    until(lambda: not alive(family), timeout=120)  # without a head, what Ray started ends by itself after 60 s
    again = run(*job, env={"BATCHJOB_TEST_NAP": "0"})
    assert again.code == 0, again.err
    assert sorted(table(output)["position"].to_pylist()) == list(range(IMAGES))
