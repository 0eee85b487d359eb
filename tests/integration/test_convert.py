"""`batchjob convert`: converted files that run in a job, the check against the original, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import batchjob
from batchjob.cli.main import main
from batchjob.errors import InvalidJob

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    def forward(self, x):
        return self.layers(x)


class DataDependent(Net):
    '''Control flow that depends on data, which no graph can hold.'''

    def forward(self, x):
        return super().forward(x) if float(x.mean()) > 0.4 else -super().forward(x)


def net():
    return Net()


def data_dependent():
    return DataDependent()
"""
JOB = """\
input: {type: prefix, uri: images/}
model: {type: checkpoint, architecture: "net:net", weights: net.pth}
preprocess: {resize: [16, 16], crop: null, mean: [0.4, 0.4, 0.4], std: [0.2, 0.2, 0.2]}
task: {type: embedding}
runtime: {pool: local, device: cpu, batch_size: 5, loader: {processes: 0}}
output: {uri: out}
"""


@pytest.fixture(autouse=True)
def job_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("net.py").write_text(NET)
    Path("job.yaml").write_text(JOB)
    Path("images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(f"images/{number:02}.png")
    scope: dict[str, Any] = {}
    exec(NET, scope)
    torch.save(scope["net"]().state_dict(), "net.pth")


def run_convert(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["convert", "job.yaml", "--images", "8", "--json", *arguments])
    out, err = capsys.readouterr()
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert code == answer["exit_code"], err
    return answer


def embeddings(output: str) -> np.ndarray[Any, Any]:
    return np.stack(pq.read_table(f"{output}/predictions")["embedding"].to_numpy(zero_copy_only=False))


@pytest.mark.parametrize(
    ("to", "max_difference"), [("exported", 1e-5), ("onnx", 1e-5), ("torchscript", 1e-5), ("pruned", 10.0)]
)
def test_converted_file_runs_in_a_job(to: str, max_difference: float, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_convert(capsys, "--to", to, "-o", "made.bin")
    assert result["images"] == 8
    assert result["before"] > 0 < result["after"]
    job = yaml.safe_load(JOB) | {
        "model": result["model"],
        "preprocess": result["preprocess"],
        "output": {"uri": "made"},
    }
    Path("made.yaml").write_text(yaml.safe_dump(job))
    assert main(["run", "job.yaml", "--quiet"]) == 0
    assert main(["run", "made.yaml", "--quiet"]) == 0
    difference = np.abs(embeddings("out") - embeddings("made")).max()
    assert difference <= max_difference
    if to == "pruned":
        assert difference > 0
        assert "50% of the weights are zero" in result["note"]
    assert not [path.name for path in Path().iterdir() if path.name.startswith(".")], "no temporary file is left"


@pytest.mark.parametrize(("cast", "to"), [("half", "exported"), ("double", "exported"), ("half", "onnx")])
def test_file_of_a_half_or_double_module_takes_float32(cast: str, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(NET.replace("    return Net()", f"    return Net().{cast}()"))
    result = run_convert(capsys, "--to", to, "-o", "made.bin")
    job = yaml.safe_load(JOB) | {"model": result["model"], "output": {"uri": "made"}}
    Path("made.yaml").write_text(yaml.safe_dump(job))
    assert main(["run", "job.yaml", "--quiet"]) == 0
    assert main(["run", "made.yaml", "--quiet"]) == 0
    assert np.abs(embeddings("out") - embeddings("made")).max() <= 2e-3


def test_file_that_a_job_could_not_run_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(NET.replace("    return Net()", "    return Net().double()"))
    assert main(["convert", "job.yaml", "--to", "onnx", "-o", "made.onnx"]) == 2
    said = capsys.readouterr().err
    assert "--to onnx: not written, since a job could not run the file: model.weights: " in said
    assert "/made.onnx cannot be opened by onnxruntime" in said
    assert not Path("made.onnx").exists()


def test_text_output_holds_the_sections_for_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "job.yaml", "--to", "exported", "-o", "net.pt2", "--images", "4"]) == 0
    said = capsys.readouterr().err
    assert "on 4 images of the job: it deviates by" in said
    block = yaml.safe_load(said.split("in a job:\n")[1])
    assert block["model"] | {"sha256": None, "weights": None} == {
        "type": "exported",
        "trust": True,
        "sha256": None,
        "weights": None,
    }
    assert block["preprocess"]["resize"] == [16, 16]


def test_deviating_model_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_convert(capsys, "--to", "pruned", "--amount", "0.9", "--tolerance", "1e-6", "-o", "made.safetensors")
    assert (result["exit_code"], result["status"]) == (3, "over_budget")
    assert "not written: on 8 images of the job it deviates by" in result["message"]
    assert not Path("made.safetensors").exists()
    assert run_convert(capsys, "--to", "pruned", "--structured", "-o", "made.safetensors")["exit_code"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "exported", "-o", "no/folder/x.pt2"), "there is no folder"),
        (
            ("model.architecture=net:data_dependent", "--to", "exported", "-o", "x.pt2"),
            "it cannot be converted to exported",
        ),
        (("--to", "tensorrt", "-o", "x.ep"), "tensorrt needs"),
        (("input.include=[none]", "--to", "exported", "-o", "x.pt2"), "it has not an image that decodes"),
    ],
)
def test_unconvertible_model_is_reported(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_convert(capsys, *arguments)
    assert (result["exit_code"], result["status"]) == (2, "invalid")
    assert said in result["message"]
    assert not list(Path().glob("x.*"))


def test_existing_file_is_replaced_only_with_force(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("net.pth").read_bytes()
    result = run_convert(capsys, "--to", "exported", "-o", "net.pth")
    assert (result["exit_code"], Path("net.pth").read_bytes()) == (2, before)
    assert "--force" in result["message"]
    Path("old.pt2").write_bytes(b"old")
    assert run_convert(capsys, "--to", "exported", "-o", "old.pt2", "--force")["exit_code"] == 0
    assert Path("old.pt2").stat().st_size > 1000


@pytest.fixture
def classifier_job(capsys: pytest.CaptureFixture[str]) -> Path:
    """Job of a classifier whose classes are so close that pruning moves most of them; its first folder is all black."""
    text = "\nclass Classes(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    text += "        torch.manual_seed(0)\n        self.conv = torch.nn.Conv2d(3, 40, 16)\n"
    text += "    def forward(self, x):\n        return 1000 + self.conv(x).flatten(1)\n"
    text += "def classes():\n    return Classes()\n"
    Path("net.py").write_text(NET + text)
    scope: dict[str, Any] = {}
    exec(NET + text, scope)
    import torch

    torch.save(scope["classes"]().state_dict(), "net.pth")
    Path("images/0-black").mkdir()
    for number in range(40):
        Image.new("RGB", (20, 20)).save(f"images/0-black/{number:02}.png")
    job = yaml.safe_load(JOB)
    job["model"]["architecture"], job["task"] = "net:classes", {"type": "classification"}
    Path("job.yaml").write_text(yaml.safe_dump(job))
    return Path("job.yaml")


def test_agreement_counts_all_images_of_the_whole_listing(
    classifier_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_convert(capsys, "--images", "30", "--to", "pruned", "--amount", "0.9", "-o", "made.safetensors")
    agreement = result["agreement"]
    assert agreement["things"] == "image"
    assert agreement["compared"] + agreement["undecided"] == result["images"] == 30
    assert result["likeness"]["agreement"] == agreement["same"] / agreement["compared"] < 1
    # Of 52 images 12 are noise; the first 40 of the listing are black and all keep one class, or all change it.
    assert 0 < agreement["same"] < agreement["compared"]


def test_int8_is_judged_by_other_images_than_it_is_calibrated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchjob import api
    from batchjob.inference import convert
    from batchjob.inference.conversion_options import ConversionOptions

    inputs: list[Any] = []

    def export(engine: Any, options: Any, calibration: Any, path: Path) -> str:
        inputs.append(calibration)
        raise InvalidJob("far enough")

    pixels: list[Any] = []
    load = convert._load_batches

    def load_batches(*arguments: Any) -> Any:
        pixels.append(load(*arguments))
        return pixels[0]

    monkeypatch.setattr(convert, "_export", export)
    monkeypatch.setattr(convert, "_load_batches", load_batches)
    job = batchjob.Job.from_file("job.yaml")
    with pytest.raises(InvalidJob, match="far enough"):
        api.convert(job, ConversionOptions("int8", Path("made.pt2").absolute(), 8))
    judged, others = pixels[0]
    assert (len(judged), len(others), len(inputs[0])) == (6, 6, 6)
    assert not any((one == other).all() for one in judged for other in others)
