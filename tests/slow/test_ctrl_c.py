"""Ctrl-C, and the end of a terminal, as it signals them: to the driver and all its processes, at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.batchjob_process import read_rows, write_slow_job


@pytest.mark.parametrize("moment", ["while it loads", "once a worker is there"])
@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_terminal_ends_a_run_with_75_and_no_traceback(
    number: signal.Signals, processes: int, moment: str, tmp_path: Path
) -> None:
    write_slow_job(tmp_path, 40)
    command = [sys.executable, "-m", "batchjob", "run", "job.yaml", f"runtime.loader.processes={processes}"]
    env = {**os.environ, "BATCHJOB_TEST_NAP": "0.5"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        assert driver.stderr is not None
        output = ""
        for line in driver.stderr:
            output += line
            if moment == "while it loads" or "worker local" in line:
                break
        time.sleep(1.0)
        os.killpg(driver.pid, number)
        output += driver.stderr.read()
        code = driver.wait(60)
    assert code == 75, output
    assert "Traceback" not in output
    env["BATCHJOB_TEST_NAP"] = "0"
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert sorted(read_rows(tmp_path / "out")["position"].to_pylist()) == list(range(40))
