"""The CIFAR model as ONNX and as a program of torch.export: converted by the command, run as jobs, as right as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from batchjob_process import cifar_arguments, count_correct_labels, read_rows, run_batchjob


@pytest.mark.parametrize("to", ["onnx", "exported", "aoti"])
def test_a_converted_model_is_as_right_as_before(to: str, tmp_path: Path, test_data: Path) -> None:
    command = cifar_arguments(test_data, tmp_path / "out")
    made = run_batchjob("convert", *command[1:], "--to", to, "-o", str(tmp_path / "net.bin"))
    assert made.exit_code == 0, made.stderr
    found = made.json_result
    job = {
        "input": {"type": "prefix", "uri": str(test_data / "cifar10/images")},
        "model": found["model"],
        "preprocess": found["preprocess"],
        "task": {"type": "classification", "labels": yaml.safe_load(Path(command[1]).read_text())["task"]["labels"]},
        "runtime": {"pool": "local", "device": "cpu"},
        "output": {"uri": str(tmp_path / "converted")},
    }
    (tmp_path / "converted.yaml").write_text(yaml.safe_dump(job))
    ended = run_batchjob("run", str(tmp_path / "converted.yaml"), "--json")
    assert (ended.exit_code, ended.json_result["predicted"]) == (0, 1000), ended.stderr
    hits = count_correct_labels(read_rows(tmp_path / "converted"))
    print(f"{to}: deviates by {found['likeness']['deviation']:.1e} of the largest output; {hits} of 1,000 right")
    assert abs(hits - 804) <= 1
