"""Whole jobs over real images, compared with plain PyTorch loops over single images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchjob.user_code import load_target
from tests.support.batchjob_process import ROOT, cifar_arguments, count_correct_labels, read_rows, run_batchjob

PHOTOGRAPHS_JOB = """\
input: {type: prefix, uri: images/}
model: {type: torchvision, name: resnet18, seed: 0}
task: {type: embedding}
runtime: {pool: local, device: cpu}
output: {uri: out}
"""


def stack_embeddings(rows: Any) -> np.ndarray[Any, Any]:
    return np.stack(rows["embedding"].to_numpy(zero_copy_only=False))


def run_plain_loop(model: Any, load: Callable[[Path], Any], paths: Iterable[Path]) -> np.ndarray[Any, Any]:
    """Run the model on one image after the other."""
    import torch

    with torch.no_grad():
        results: np.ndarray[Any, Any] = torch.cat([model(load(path)[None]) for path in paths]).numpy()
    return results


def test_accuracy_on_a_thousand_images_is_the_published_one(test_data: Path, tmp_path: Path) -> None:
    result = run_batchjob(*cifar_arguments(test_data, tmp_path / "out"))
    assert (result.exit_code, result.json_result["status"]) == (0, "complete"), result.stderr
    rows = read_rows(tmp_path / "out")
    correct = count_correct_labels(rows)
    print(f"CIFAR: {rows.num_rows} rows, {correct} correct, whole process {result.seconds:.1f} s")
    assert abs(correct - 804) <= 1
    assert rows["error_stage"].null_count == rows.num_rows == 1000
    second = run_batchjob(*cifar_arguments(test_data, tmp_path / "out"))
    print(f"the finished job again: {second.seconds:.1f} s")
    assert (second.exit_code, second.json_result["status"]) == (0, "already_complete")
    status = run_batchjob("status", str(tmp_path / "out"), "--json")
    print(f"batchjob status: {status.seconds:.2f} s")
    assert status.json_result.items() >= {"status": "complete", "planned": 1000, "rows": 1000, "parts": 10}.items()
    assert run_batchjob("errors", str(tmp_path / "out"), "--json").json_result["total"] == 0


def test_embeddings_of_a_thousand_images_equal_a_plain_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from PIL import Image
    from torchvision.transforms import Compose, Normalize, ToTensor

    result = run_batchjob(*cifar_arguments(test_data, tmp_path / "out", "task={type: embedding}"))
    assert result.exit_code == 0, result.stderr
    rows = read_rows(tmp_path / "out").sort_by("position")

    checkpoint = torch.load(test_data / "cifar10/resnet20-12fca82f.th", map_location="cpu", weights_only=True)
    model = load_target("net:resnet20", ROOT / "jobs/cifar10_resnet20")()
    model.load_state_dict({name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()})
    transform = Compose([ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    paths = sorted((test_data / "cifar10/images").rglob("*.jpg"))
    logits = run_plain_loop(model.eval(), lambda path: transform(Image.open(path).convert("RGB")), paths)

    assert rows["uri"].to_pylist() == [str(path) for path in paths]
    difference = np.abs(stack_embeddings(rows) - logits).max()
    print(f"CIFAR: {rows.num_rows} outputs, at most {difference:.1e} from the plain loop's")
    assert rows.num_rows == 1000
    assert difference < 1e-4


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_photographs_equal_the_documented_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.models import ResNet18_Weights, resnet18

    (tmp_path / "job.yaml").write_text(PHOTOGRAPHS_JOB)
    result = run_batchjob("run", str(tmp_path / "job.yaml"), f"input.uri={test_data}/imagenet-sample/", "--json")
    assert result.exit_code == 0, result.stderr
    rows = read_rows(tmp_path / "out").sort_by("position")

    transform = ResNet18_Weights.DEFAULT.transforms()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18().eval()
    paths = sorted((test_data / "imagenet-sample").glob("*.JPEG"))
    logits = run_plain_loop(model, lambda path: transform(decode_image(str(path), mode=ImageReadMode.RGB)), paths)

    assert rows["uri"].to_pylist() == [str(path) for path in paths]
    difference = np.abs(stack_embeddings(rows) - logits).max()
    print(f"photographs: {rows.num_rows} rows in {result.seconds:.1f} s, at most {difference:.1e} from the loop's")
    assert rows.num_rows == 300
    assert difference < 1e-3
