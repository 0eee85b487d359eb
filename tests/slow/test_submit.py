"""A job submitted to a Ray head with token authentication, as docs/guides/cluster.md describes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.batchjob_process import ROOT, count_correct_labels, read_rows, wait_until
from tests.support.loopback import find_free_port, is_listening

pytestmark = pytest.mark.ray

RAY = Path(sys.executable).with_name("ray")
BATCHJOB = Path(sys.executable).with_name("batchjob")


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray head on loopback; yields the environment that its clients need."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # paths of sockets must be short
    port, dashboard = find_free_port(), find_free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    process = subprocess.Popen(
        [
            RAY,
            "start",
            "--head",
            "--block",
            "--dashboard-host=127.0.0.1",
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            f"--temp-dir={folder}",
            "--node-ip-address=127.0.0.1",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: is_listening(dashboard), timeout=90)
        yield environment
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def submit_job(environment: Mapping[str, str], data: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            RAY,
            "job",
            "submit",
            "--working-dir",
            ".",
            "--",
            BATCHJOB,
            "run",
            "jobs/cifar10_resnet20/job.yaml",
            f"input.uri={data}/cifar10/images/",
            f"model.weights={data}/cifar10/resnet20-12fca82f.th",
            f"output.uri={output}",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_submitted_job_needs_the_token(head: dict[str, str], test_data: Path, tmp_path: Path) -> None:
    refused = submit_job({**head, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, test_data, tmp_path / "out")
    assert refused.returncode != 0
    assert not (tmp_path / "out").exists()
    done = submit_job(head, test_data, tmp_path / "out")
    print(done.stdout[-600:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in (done.stdout + done.stderr).lower()
    assert abs(count_correct_labels(read_rows(tmp_path / "out")) - 804) <= 1
