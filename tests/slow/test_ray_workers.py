"""Workers on Ray: killed by a poison image, ended by a bug, or never started; their temporary files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.batchjob_process import (
    ROOT,
    CompletedCommand,
    read_rows,
    run_batchjob,
    write_slow_job,
)

IMAGES, SHARD, POISON = 40, 4, 17

# A model that ends its process at a black picture if BATCHJOB_TEST_POISON is set.
DEADLY_NET = """\
import os

from torch import nn


class Deadly(nn.Module):
    def forward(self, x):
        if os.environ.get("BATCHJOB_TEST_POISON") and (x.flatten(1).amax(1) == 0).any():
            os._exit(9)
        return x.mean(dim=(2, 3))


def make():
    return Deadly()
"""

BUGGY_NET = """\
from slow import Slow

from batchjob.worker.plan_session import PlanSession


def fail(*_):
    raise RuntimeError("a bug in begin")


def make():
    PlanSession.join = fail
    return Slow()
"""

SHORT_SCHEDULING_TIMEOUT = """\
import sys

from batchjob.cli import main
from batchjob.pool import ray_pool

ray_pool._SCHEDULING_TIMEOUT = 25.0  # on a busy machine, a Ray may take that long to start
sys.exit(main.main(sys.argv[1:]))
"""


def run_arguments(folder: Path, *more: str) -> list[str]:
    return ["run", str(folder / "job.yaml"), "--json", "runtime.pool=ray", "runtime.cpus_per_worker=1", *more]


def write_deadly_job(folder: Path) -> None:
    from PIL import Image

    write_slow_job(folder, IMAGES)
    (folder / "deadly.py").write_text(DEADLY_NET)
    names = ["black.png" if position == POISON else "tiny.png" for position in range(IMAGES)]
    (folder / "manifest.csv").write_text("\n".join(["file", *names, ""]))
    Image.new("RGB", (8, 8), (0, 0, 0)).save(folder / "black.png")


def list_scratch_folders(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("batchjob-*")}


def test_only_the_poisoned_shard_is_given_up_and_workers_delete_their_scratch_folders(
    tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    write_deadly_job(tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    arguments = run_arguments(tmp_path, "runtime.workers=2", "model.target=deadly:make")
    env = {**ray_environment, "TMPDIR": str(temporary)}
    poisoned = run_batchjob(*arguments, env={**env, "BATCHJOB_TEST_POISON": "1"})
    print(poisoned.stderr[-2000:])
    assert (poisoned.exit_code, poisoned.json_result["status"]) == (4, "incomplete"), poisoned.stderr
    shard = range(POISON // SHARD * SHARD, POISON // SHARD * SHARD + SHARD)
    positions = read_rows(tmp_path / "out")["position"].to_pylist()
    assert sorted(positions) == [position for position in range(IMAGES) if position not in shard]

    left = list_scratch_folders(temporary)
    healed = run_batchjob(*arguments, env=env)
    assert healed.exit_code == 0, healed.stderr
    assert sorted(read_rows(tmp_path / "out")["position"].to_pylist()) == list(range(IMAGES))
    assert list_scratch_folders(temporary) <= left
    print(f"{len(left)} workers died, {len(list_scratch_folders(temporary))} scratch folders left by them")


@pytest.mark.parametrize("pool", ["ray", "local"])
def test_bug_in_a_worker_is_exit_code_1_with_its_traceback(
    tmp_path: Path, pool: str, ray_environment: dict[str, str]
) -> None:
    write_slow_job(tmp_path, IMAGES)
    (tmp_path / "buggy.py").write_text(BUGGY_NET)
    run = run_batchjob(
        *run_arguments(tmp_path, f"runtime.pool={pool}", "model.target=buggy:make", "runtime.workers=1"),
        env=ray_environment,
    )
    assert (run.exit_code, run.json_result["status"]) == (1, "crashed"), run.stderr
    assert run.json_result["message"] == "a worker crashed: RuntimeError: a bug in begin"
    assert "Traceback" in run.stderr
    assert "buggy.py" in run.stderr


def test_too_few_workers_end_as_temporary_with_what_is_missing(tmp_path: Path, ray_environment: dict[str, str]) -> None:
    write_slow_job(tmp_path, IMAGES)
    cores = len(os.sched_getaffinity(0))
    workers = "runtime.workers={min: 2, max: 2}"
    arguments = run_arguments(tmp_path, workers, f"runtime.cpus_per_worker={cores // 2 + 1}")
    process = subprocess.run(
        [sys.executable, "-c", SHORT_SCHEDULING_TIMEOUT, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **ray_environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    run = CompletedCommand(process.returncode, process.stdout, process.stderr, 0.0)
    print(run.stderr[-500:])
    assert (run.exit_code, run.json_result["status"]) == (75, "temporary"), run.stderr
    assert f"asks for {cores // 2 + 1} CPUs and 0 GPUs, the cluster has {cores} CPUs" in run.json_result["message"]
