"""Activation left at auto: models that give logits, and models that end in a softmax or in sigmoids."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import batchjob
from batchjob.inference.engine import Engine
from batchjob.job.job import Job
from batchjob.models.loaded_model import LoadedModel
from batchjob.storage.reader import Reader
from batchjob.worker.plan_session import PlanSession
from tests.support.loaded_worker import load_worker, plan_shards, write_job
from tests.support.saved_models import FORMATS

CLASSES = 10


class Classifier(nn.Module):
    """Linear layer behind the mean colour of an image, and a function of its output."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor] = lambda x: x, classes: int = CLASSES) -> None:
        super().__init__()
        self.linear = nn.Linear(3, classes)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x.mean((2, 3))))


def decide(folder: Path, module: nn.Module, task: str, **facts: Any) -> str:
    """Return the activation that an engine finds for a module."""
    engine = Engine(write_job(folder, f"task.type={task}", images=1), Reader(), ())
    engine.model = LoadedModel(module.eval().requires_grad_(False), None, None, "digest", **facts)
    return engine.decided_values["task.activation"]


@pytest.mark.parametrize(
    ("function", "classification", "multilabel"),
    [
        (lambda x: x, "softmax", "sigmoid"),
        (lambda x: x.log_softmax(1), "softmax", "sigmoid"),
        (lambda x: x.softmax(1), "none", "none"),
        (lambda x: x.softmax(1)[:, 1:].half().float(), "none", "none"),  # without a class "background"
        (lambda x: (x.softmax(1) + (2 * x).softmax(1)) / 2, "none", "none"),  # an average
        (lambda x: x.exp() / x.exp().sum(1, keepdim=True), "none", "none"),
        (lambda x: x.sigmoid_(), "none", "none"),
        (lambda x: (x.sigmoid() + (2 * x).sigmoid()) / 2, "softmax", "none"),
        # Logits that lie between 0 and 1.
        (lambda x: x.abs().clamp(max=50) / 100, "softmax", "none"),
        (lambda x: (x / 100).relu(), "softmax", "sigmoid"),
    ],
)
def test_activation_follows_from_the_model(
    function: Callable[[torch.Tensor], torch.Tensor], classification: str, multilabel: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = Classifier(function)
    assert decide(tmp_path, module, "classification") == classification
    assert decide(tmp_path, module, "multilabel") == multilabel


def test_two_logits_that_look_like_sigmoids_by_chance_are_logits(tmp_path: Path) -> None:
    module = Classifier(lambda x: x * 1.0, classes=2)
    nn.init.constant_(module.linear.weight, 0.01)
    nn.init.constant_(module.linear.bias, 0.3)
    assert decide(tmp_path, module, "multilabel") == "sigmoid"
    assert decide(tmp_path, module, "classification") == "softmax"


def test_operation_that_the_file_states_decides(tmp_path: Path) -> None:
    module = Classifier(lambda x: x.softmax(1))
    assert decide(tmp_path, module, "classification", output_operation="Gemm") == "softmax"
    assert decide(tmp_path, module, "multilabel", output_operation="Sigmoid") == "none"


def test_features_are_no_class_scores(tmp_path: Path) -> None:
    headless = "ViTModel has no classification head"
    for task in ("classification", "multilabel"):
        with pytest.raises(
            batchjob.errors.InvalidJob, match=rf"{headless}; it gives features \(task.type: embedding\)"
        ):
            decide(tmp_path, Classifier(), task, gives_features=headless)


NET = """\
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), 2 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 1], 1).softmax(1)

def make():
    return Net()
"""


def write_softmax_job(folder: Path, *overrides: str) -> Job:
    job = write_job(folder, "task.type=classification", *overrides, images=2)
    (folder / "net.py").write_text(NET)
    return job


def test_scores_are_not_squeezed_a_second_time(tmp_path: Path) -> None:
    job = write_softmax_job(tmp_path)
    assert batchjob.run(job).exit_code == 0
    scores = pq.read_table(tmp_path / "out" / "predictions")["score"].to_pylist()
    expected = torch.tensor([1.0, 1.0, 0.0]).softmax(0)[0].item()
    assert scores == pytest.approx([expected] * 2)
    (worker,) = json.loads((tmp_path / "out" / "_batchjob" / "report.json").read_text())["workers"]
    reason = "the model itself ends in a softmax"
    assert worker["decisions"] == {"task.activation": {"value": "none", "reason": reason}}
    assert f"decided   task.activation: none, since {reason}" in batchjob.validate(job)


@pytest.mark.parametrize(("task", "kept"), [("classification", "softmax"), ("multilabel", "sigmoid")])
def test_plans_of_earlier_versions_keep_their_activation(task: str, kept: str, tmp_path: Path) -> None:
    job = write_job(tmp_path, f"task.type={task}")
    (tmp_path / "net.py").write_text(NET)
    for defaults in ({}, {"task": {"type": task, "allow_nan": False}}):
        earlier = job.with_defaults(defaults)
        assert getattr(earlier.task, "activation") == kept  # noqa: B009 - tasks without it are in the union
        assert Engine(earlier, Reader(), ()).decisions == {}
        assert earlier.fingerprint() == job.fingerprint()


def test_activation_of_the_plan_is_kept_by_its_workers(tmp_path: Path) -> None:
    job = write_softmax_job(tmp_path)
    plan_shards(job)
    with load_worker(job) as loaded:
        loaded.engine.adopt({"task.activation": "softmax"})
        PlanSession.join(loaded, 0)
    with load_worker(job) as loaded:
        assert loaded.engine.decided_values == {"task.activation": "none"}
        assert "the model itself ends in a softmax" in loaded.info.decision_lines[0]
        assert PlanSession.join(loaded, 0).contract.decisions == {"task.activation": "softmax"}
        output = torch.tensor([[0.2, 0.8, 0.0]])
        score = loaded.engine.postprocess.on_device(output)["score"].item()
        assert score == pytest.approx(output.softmax(1).max().item())


@pytest.mark.parametrize("name", ["onnx", "torchscript-traced", "torchscript-scripted", "exported"])
def test_saved_models_show_their_last_operation(name: str, tmp_path: Path) -> None:
    saved = FORMATS[name].save(tmp_path, 1)
    preprocess = {"resize": None, "crop": [saved.side, saved.side], "mean": None, "std": None}
    job = write_job(tmp_path, "task.type=classification", images=1)
    document = {**job.serialize(), "model": saved.settings, "preprocess": preprocess}
    engine = Engine(Job.deserialize(document, tmp_path, tmp_path), Reader(), ())
    assert "by its last operation" in engine.decisions["task.activation"].reason


def test_tracing_an_eager_module_imports_no_compiler() -> None:
    program = (
        "import sys, torch\nfrom batchjob.tasks.activation import trace_operations\n"
        "with trace_operations(python_only=True) as find:\n"
        "    print(find(torch.ones(2, 2).softmax(1)), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["softmax", "False"]
