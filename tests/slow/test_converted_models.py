"""The CIFAR model converted to ONNX, torch.export and AOTInductor: run as jobs, with the accuracy of the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.batchjob_process import cifar_arguments, count_correct_labels, read_rows, run_batchjob


@pytest.mark.parametrize("to", ["onnx", "exported", "aoti"])
def test_converted_model_is_as_accurate_as_before(to: str, tmp_path: Path, test_data: Path) -> None:
    command = cifar_arguments(test_data, tmp_path / "out")
    conversion = run_batchjob("convert", *command[1:], "--to", to, "-o", str(tmp_path / "net.bin"))
    assert conversion.exit_code == 0, conversion.stderr
    answer = conversion.json_result
    job = {
        "input": {"type": "prefix", "uri": str(test_data / "cifar10/images")},
        "model": answer["model"],
        "preprocess": answer["preprocess"],
        "task": {"type": "classification", "labels": yaml.safe_load(Path(command[1]).read_text())["task"]["labels"]},
        "runtime": {"pool": "local", "device": "cpu"},
        "output": {"uri": str(tmp_path / "converted")},
    }
    (tmp_path / "converted.yaml").write_text(yaml.safe_dump(job))
    run_result = run_batchjob("run", str(tmp_path / "converted.yaml"), "--json")
    assert (run_result.exit_code, run_result.json_result["predicted"]) == (0, 1000), run_result.stderr
    hits = count_correct_labels(read_rows(tmp_path / "converted"))
    print(f"{to}: deviates by {answer['likeness']['deviation']:.1e} of the largest output; {hits} of 1,000 right")
    assert abs(hits - 804) <= 1
