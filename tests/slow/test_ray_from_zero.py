"""Runs on a Ray cluster that scales from zero: a head without CPUs, and GPU nodes that its autoscaler starts.

The autoscaler is Ray's own, with its provider of nodes on this machine. Their GPUs are numbers: torch sees none.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.batchjob_process import ROOT, CompletedCommand, read_rows, start_program, wait_until, write_slow_job
from tests.support.loopback import find_free_port, is_listening

pytestmark = pytest.mark.ray

RAY = Path(sys.executable).with_name("ray")
IMAGES = 8
GPU_NODES = 2

# A command with other limits, which would take a quarter of an hour or half a gigabyte to reach.
WITH_LIMITS = """\
import os
import sys

import ray._private.runtime_env.packaging

from batchjob.cli import main
from batchjob.pool import ray_pool

ray_pool._SCHEDULING_TIMEOUT = float(os.environ.get("BATCHJOB_TEST_SCHEDULING_TIMEOUT", "180"))
ray._private.runtime_env.packaging.GCS_STORAGE_MAX_SIZE = 1 << 20
sys.exit(main.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Cluster:
    """A head that is running.

    Attributes:
        address: Its address.
        environment: Environment of a client that has the token.
    """

    address: str
    environment: dict[str, str]


def write_autoscaling_config(path: Path, port: int) -> None:
    """Write the configuration of an autoscaler that starts nodes of 2 CPUs and 1 GPU, 2 at most."""
    empty_lists = (
        "setup_commands head_setup_commands worker_setup_commands head_start_ray_commands worker_start_ray_commands "
        "cluster_synced_files rsync_exclude rsync_filter initialization_commands"
    )
    config = {
        "cluster_name": "from-zero",
        "max_workers": GPU_NODES,
        "upscaling_speed": 100,
        "idle_timeout_minutes": 0.2,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": "f" * 51 + "00000",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 2, "GPU": 1, "object_store_memory": 100 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": GPU_NODES,
            },
        },
        "head_node_type": "ray.head.default",  # the provider knows the head by this name
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in empty_lists.split()},
    }
    path.write_text(json.dumps(config))  # JSON is YAML


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    port, sockets = find_free_port(), tempfile.mkdtemp(prefix="r-", dir="/tmp")
    write_autoscaling_config(folder / "config.yaml", port)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PYTHONPATH": str(ROOT),
    }
    options = ["--num-cpus=0", f"--port={port}", f"--temp-dir={sockets}", "--include-dashboard=false"]
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--autoscaling-config={folder / 'config.yaml'}", *options],
        env={**environment, "RAY_FAKE_CLUSTER": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: is_listening(port), timeout=90)
        yield Cluster(f"127.0.0.1:{port}", environment)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(sockets, ignore_errors=True)


def run(folder: Path, cluster: Cluster, *more: str, **environment: str) -> CompletedCommand:
    """Run the job in a folder on the cluster, as a process whose variables are the client's and `environment`."""
    command = [sys.executable, "-c", WITH_LIMITS, "run", str(folder / "job.yaml"), "--json", "runtime.pool=ray"]
    names = [name for name in os.environ if name.startswith("RAY_")]
    variables = {**dict.fromkeys(names, ""), **cluster.environment, **environment}
    done = start_program([*command, "--address", cluster.address, *more], env=variables).wait(200)
    print(done.seconds, done.stderr[-3000:])
    return done


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_slow_job(tmp_path, IMAGES)
    return tmp_path


def test_auto_waits_for_a_gpu_and_never_computes_on_a_cpu_instead(cluster: Cluster, job: Path) -> None:
    done = run(job, cluster, "runtime.device=auto")
    assert done.exit_code == 2
    assert "has 0 CPUs, 0 GPUs on 1 node: asking for a node with a GPU; its autoscaler is" in done.stderr
    assert done.json_result["message"].startswith(f"Ray has reserved 1 GPU on {socket.gethostname()}, but torch sees")
    assert not (job / "out/predictions").exists()


def test_job_runs_on_the_gpu_nodes_that_come(cluster: Cluster, job: Path) -> None:
    """The GPU is reserved; the model, which needs none, computes on the CPU of its node."""
    done = run(job, cluster, "runtime.device=cpu", "runtime.gpus_per_worker=1", "runtime.workers=2")
    assert done.exit_code == 0
    assert read_rows(job / "out").num_rows == IMAGES


def test_gpu_that_does_not_come_is_temporary_with_the_arithmetic(cluster: Cluster, job: Path) -> None:
    done = run(job, cluster, "runtime.device=cpu", "runtime.gpus_per_worker=3", BATCHJOB_TEST_SCHEDULING_TIMEOUT="20")
    assert done.exit_code == 75
    message = done.json_result["message"]
    assert "no worker came up in 20 s; a node with a GPU was asked for, the cluster has" in message
    assert "does not tell which nodes may come; run again later, or write runtime.device=cpu" in message


def test_run_on_cpus_says_so_in_its_first_line(cluster: Cluster, job: Path) -> None:
    done = run(job, cluster, "runtime.device=cpu")
    assert done.exit_code == 0
    assert done.stderr.splitlines()[0].startswith(f"computing on CPUs: on the cluster at {cluster.address}, as")


@pytest.mark.parametrize(
    "environment",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"},
    ],
    ids=["none", "wrong", "gone"],
)
def test_token_that_is_missing_or_refused_is_one_sentence(
    cluster: Cluster, job: Path, environment: dict[str, str]
) -> None:
    done = run(job, cluster, "runtime.device=cpu", **environment)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"the cluster at {cluster.address} refuses the token of this process, or there is")
    assert len(done.stderr.splitlines()) == 1
    assert done.seconds < 20


def test_folder_over_the_limit_names_its_largest_file_and_the_way_out(cluster: Cluster, job: Path) -> None:
    (job / "weights.bin").write_bytes(os.urandom(2 << 20))
    done = run(job, cluster, "runtime.device=cpu")
    assert done.exit_code == 2
    assert "over Ray's limit of 1 MiB; largest: weights.bin (2 MiB), " in done.json_result["message"]
    (job / ".rayignore").write_text("weights.bin\n")
    assert run(job, cluster, "runtime.device=cpu").exit_code == 0
