"""Whole jobs over real images come out as the plain PyTorch loops that anyone would write, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batchjob_process import ROOT, cifar_arguments, count_correct_labels, read_rows, run_batchjob

from batchjob.user_code import load_target

PHOTOGRAPHS = """\
input: {type: prefix, uri: images/}
model: {type: torchvision, name: resnet18, seed: 0}
task: {type: embedding}
runtime: {pool: local, device: cpu}
output: {uri: out}
"""


def embeddings(rows: Any) -> np.ndarray[Any, Any]:
    return np.stack(rows["embedding"].to_numpy(zero_copy_only=False))


def outputs(model: Any, load: Callable[[Path], Any], paths: Iterable[Path]) -> np.ndarray[Any, Any]:
    """What the model makes of each image, one after the other."""
    import torch

    with torch.no_grad():
        found: np.ndarray[Any, Any] = torch.cat([model(load(path)[None]) for path in paths]).numpy()
    return found


def test_a_thousand_labels_are_as_right_as_published(test_data: Path, tmp_path: Path) -> None:
    ended = run_batchjob(*cifar_arguments(test_data, tmp_path / "out"))
    assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
    rows = read_rows(tmp_path / "out")
    hits = count_correct_labels(rows)
    print(f"CIFAR: {rows.num_rows} rows, {hits} right, whole process {ended.seconds:.1f} s")
    assert abs(hits - 804) <= 1
    assert rows["error_stage"].null_count == rows.num_rows == 1000
    again = run_batchjob(*cifar_arguments(test_data, tmp_path / "out"))
    print(f"the finished job again: {again.seconds:.1f} s")
    assert (again.exit_code, again.json_result["status"]) == (0, "already_complete")
    status = run_batchjob("status", str(tmp_path / "out"), "--json")
    print(f"batchjob status: {status.seconds:.2f} s")
    assert status.json_result.items() >= {"status": "complete", "planned": 1000, "rows": 1000, "parts": 10}.items()
    assert run_batchjob("errors", str(tmp_path / "out"), "--json").json_result["total"] == 0


def test_embeddings_of_a_thousand_images_are_those_of_a_plain_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from PIL import Image
    from torchvision.transforms import Compose, Normalize, ToTensor

    ended = run_batchjob(*cifar_arguments(test_data, tmp_path / "out", "task={type: embedding}"))
    assert ended.exit_code == 0, ended.stderr
    rows = read_rows(tmp_path / "out").sort_by("position")

    saved = torch.load(test_data / "cifar10/resnet20-12fca82f.th", map_location="cpu", weights_only=True)
    model = load_target("net:resnet20", ROOT / "jobs/cifar10_resnet20")()
    model.load_state_dict({name.removeprefix("module."): value for name, value in saved["state_dict"].items()})
    transform = Compose([ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    paths = sorted((test_data / "cifar10/images").rglob("*.jpg"))
    logits = outputs(model.eval(), lambda path: transform(Image.open(path).convert("RGB")), paths)

    assert rows["uri"].to_pylist() == [str(path) for path in paths]
    apart = np.abs(embeddings(rows) - logits).max()
    print(f"CIFAR: {rows.num_rows} outputs, at most {apart:.1e} from the plain loop's")
    assert rows.num_rows == 1000
    assert apart < 1e-4


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_photographs_come_out_as_in_the_documented_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.models import ResNet18_Weights, resnet18

    (tmp_path / "job.yaml").write_text(PHOTOGRAPHS)
    ended = run_batchjob("run", str(tmp_path / "job.yaml"), f"input.uri={test_data}/imagenet-sample/", "--json")
    assert ended.exit_code == 0, ended.stderr
    rows = read_rows(tmp_path / "out").sort_by("position")

    transform = ResNet18_Weights.DEFAULT.transforms()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18().eval()
    paths = sorted((test_data / "imagenet-sample").glob("*.JPEG"))
    logits = outputs(model, lambda path: transform(decode_image(str(path), mode=ImageReadMode.RGB)), paths)

    assert rows["uri"].to_pylist() == [str(path) for path in paths]
    apart = np.abs(embeddings(rows) - logits).max()
    print(f"photographs: {rows.num_rows} rows in {ended.seconds:.1f} s, at most {apart:.1e} from the loop's")
    assert rows.num_rows == 300
    assert apart < 1e-3
