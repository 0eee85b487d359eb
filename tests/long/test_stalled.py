"""What hangs: a model at an image, which is an error row in the end; a store, which costs a worker and no attempt."""

from __future__ import annotations

import re
from pathlib import Path

from batchjob_process import ray_environment, read_rows, run_batchjob
from harmful_job import write_harmful_job

# The first part that is written to this output never arrives, nor does its writer ever hear of it.
STUCK = """\
import threading
from pathlib import Path

from net import Net

from batchjob.storage.disk_store import DiskStore

put_if_absent = DiskStore.put_if_absent


def put(self, key, body):
    met = Path(__file__).parent / "out" / "_batchjob" / "met"
    if key.startswith("predictions/") and not met.exists():
        met.touch()
        threading.Event().wait()
    return put_if_absent(self, key, body)


def make():
    DiskStore.put_if_absent = put
    return Net()
"""


def test_what_hangs_in_the_model_ends_the_run_and_the_same_command_goes_on_past_it(tmp_path: Path) -> None:
    path = write_harmful_job(tmp_path, 24, black_positions=[13])
    for attempt in range(3):
        ended = run_batchjob("run", path, "--json", "runtime.stall_seconds=2", env={"BATCHJOB_TEST_HARM": "hang"})
        print(f"attempt {attempt}: {ended.exit_code} after {ended.seconds:.0f} s: {ended.json_result.get('message')}")
        if ended.exit_code == 0:
            break
        assert (ended.exit_code, ended.json_result["status"]) == (75, "temporary"), ended.stderr
        said = (
            r"in the model has not ended for \d+ s \(runtime.stall_seconds\)"  # longer where several lanes share cores
        )
        assert re.search(said, ended.json_result["message"])
    assert (attempt, ended.exit_code) == (2, 0), ended.stderr
    rows = read_rows(tmp_path / "out").to_pylist()
    assert [row["position"] for row in rows] == list(range(24))
    assert {row["position"]: (row["error_stage"], row["error_type"]) for row in rows if row["error_stage"]} == {
        13: ("predict", "hang")
    }


def test_a_worker_whose_store_never_answers_is_replaced_and_no_attempt_is_used_up(tmp_path: Path) -> None:
    path = write_harmful_job(tmp_path, 24, black_positions=[])
    (tmp_path / "stuck.py").write_text(STUCK)
    command = ["run", path, "--json", "runtime.pool=ray", "runtime.workers=1", "runtime.cpus_per_worker=1"]
    command += ["model.target=stuck:make", "runtime.stall_seconds=3", "errors.outage_seconds=0", "errors.attempts=1"]
    with ray_environment() as env:
        ended = run_batchjob(*command, env=env)
    print(f"with one worker replaced: {ended.seconds:.0f} s")
    assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
    assert (tmp_path / "out" / "_batchjob" / "met").exists()
    assert "the writing of" in ended.stderr
    assert "(runtime.stall_seconds and errors.outage_seconds)" in ended.stderr
    assert sorted(read_rows(tmp_path / "out")["position"].to_pylist()) == list(range(24))
