"""Hangs: an image at which the model hangs becomes an error row; a store that hangs costs a worker, but no attempt."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.batchjob_process import read_rows, run_batchjob
from tests.support.harmful_job import write_harmful_job

# The first PUT of a part into this output never returns.
HANGING_STORE = """\
import threading
from pathlib import Path

from net import Net

from batchjob.storage.disk_store import DiskStore

put_if_absent = DiskStore.put_if_absent


def hang_once(self, key, body):
    mark = Path(__file__).parent / "out" / "_batchjob" / "mark"
    if key.startswith("predictions/") and not mark.exists():
        mark.touch()
        threading.Event().wait()
    return put_if_absent(self, key, body)


def make():
    DiskStore.put_if_absent = hang_once
    return Net()
"""


def test_run_resumes_past_an_image_at_which_the_model_hangs(tmp_path: Path) -> None:
    path = write_harmful_job(tmp_path, 24, black_positions=[13])
    for attempt in range(3):
        run = run_batchjob("run", path, "--json", "runtime.stall_seconds=2", env={"BATCHJOB_TEST_HARM": "hang"})
        print(f"attempt {attempt}: {run.exit_code} after {run.seconds:.0f} s: {run.json_result.get('message')}")
        if run.exit_code == 0:
            break
        assert (run.exit_code, run.json_result["status"]) == (75, "temporary"), run.stderr
        # The time is a multiple of the setting if several batches share the cores.
        pattern = r"in the model has not ended for \d+ s \(runtime.stall_seconds\)"
        assert re.search(pattern, run.json_result["message"])
    assert (attempt, run.exit_code) == (2, 0), run.stderr
    rows = read_rows(tmp_path / "out").to_pylist()
    assert [row["position"] for row in rows] == list(range(24))
    assert {row["position"]: (row["error_stage"], row["error_type"]) for row in rows if row["error_stage"]} == {
        13: ("predict", "hang")
    }


def test_worker_whose_store_hangs_is_replaced_without_using_up_an_attempt(
    tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    path = write_harmful_job(tmp_path, 24, black_positions=[])
    (tmp_path / "hanging.py").write_text(HANGING_STORE)
    command = ["run", path, "--json", "runtime.pool=ray", "runtime.workers=1", "runtime.cpus_per_worker=1"]
    command += ["model.target=hanging:make", "runtime.stall_seconds=3", "errors.outage_seconds=0", "errors.attempts=1"]
    run = run_batchjob(*command, env=ray_environment)
    print(f"with one worker replaced: {run.seconds:.0f} s")
    assert (run.exit_code, run.json_result["status"]) == (0, "complete"), run.stderr
    assert (tmp_path / "out" / "_batchjob" / "mark").exists()
    assert "the writing of" in run.stderr
    assert "(runtime.stall_seconds and errors.outage_seconds)" in run.stderr
    assert sorted(read_rows(tmp_path / "out")["position"].to_pylist()) == list(range(24))
