"""A model that hangs at an image ends a run on the local pool as temporary; in the end that image is an error row."""

from __future__ import annotations

from pathlib import Path

from commands import run, table
from lost import write_harmful_job


def test_what_hangs_in_the_model_ends_the_run_and_the_same_command_goes_on_past_it(tmp_path: Path) -> None:
    path = write_harmful_job(tmp_path, 24, black=[13])
    for attempt in range(3):
        ended = run("run", path, "--json", "runtime.stall_seconds=2", env={"BATCHJOB_TEST_HARM": "hang"})
        print(f"attempt {attempt}: {ended.code} after {ended.seconds:.0f} s: {ended.answer.get('message')}")
        if ended.code == 0:
            break
        assert (ended.code, ended.answer["status"]) == (75, "temporary"), ended.err
        assert "in the model has not ended for 2 s (runtime.stall_seconds)" in ended.answer["message"]
    assert (attempt, ended.code) == (2, 0), ended.err
    rows = table(tmp_path / "out").to_pylist()
    assert [row["position"] for row in rows] == list(range(24))
    assert {row["position"]: (row["error_stage"], row["error_type"]) for row in rows if row["error_stage"]} == {
        13: ("predict", "hang")
    }
