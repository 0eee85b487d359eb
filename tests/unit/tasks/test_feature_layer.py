"""Layer of embeddings left at auto: the features of a classifier, before its class scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from batchjob.inference.engine import Engine
from batchjob.models.class_layers import find_huggingface_layers, find_timm_layers, find_torchvision_layers
from batchjob.models.loaded_model import LoadedModel
from batchjob.storage.reader import Reader
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.feature_layer import parse_left_out, remove_layers
from tests.support.loaded_worker import write_job


class OwnNet(nn.Module):
    """A user's network of 8 features with a last layer of any size and name."""

    def __init__(self, outputs: int, name: str = "fc", num_classes: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        setattr(self, name, nn.Linear(8, outputs))
        self.last = name
        if num_classes is not None:
            self.num_classes = num_classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(self, self.last)(self.conv(x).mean((2, 3)))
        return result


def make_engine(folder: Path, module: nn.Module, side: int = 32, **facts: Any) -> Engine:
    engine = Engine(write_job(folder, f"preprocess.crop=[{side}, {side}]", images=1), Reader(), ())
    facts = {"labels": None, **facts}
    engine.model = LoadedModel(module.eval().requires_grad_(False), preprocess=None, digest="digest", **facts)
    return engine


@pytest.mark.parametrize(
    ("name", "side", "layer", "length"),
    [
        ("resnet18", 32, "fc", 512),
        ("mobilenet_v3_small", 32, "classifier.3", 1024),
        ("vit_b_32", 224, "heads.head", 768),
        ("squeezenet1_1", 32, None, 1000),
    ],
)
def test_torchvision_classifiers_give_their_features(
    name: str, side: int, layer: str | None, length: int, tmp_path: Path
) -> None:
    module: nn.Module = torchvision.models.get_model(name, weights=None)
    engine = make_engine(tmp_path, module, side, class_layers=find_torchvision_layers(module))
    decision = engine.decisions["task.layer"]
    assert decision.value == (f"before:{layer}" if layer else "output")
    assert f"{length:,} numbers" in decision.reason
    (field,) = engine.postprocess.fields
    assert field.type.list_size == length
    assert not engine.is_stateful()


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 32), ("deit_tiny_distilled_patch16_224", 224), ("convnext_atto", 32), ("levit_128s", 224)],
)
def test_timm_classifiers_give_what_reset_classifier_gives(name: str, side: int, tmp_path: Path) -> None:
    module: Any = timm.create_model(name).eval()
    engine = make_engine(tmp_path, module, side, class_layers=find_timm_layers(module))
    left_out = parse_left_out(engine.decided_values["task.layer"])
    pixels = torch.rand(2, 3, side, side)
    features = remove_layers(module, left_out)(pixels)
    module.reset_classifier(0)
    torch.testing.assert_close(features, module(pixels))


def test_projections_of_timm_are_kept(tmp_path: Path) -> None:
    module: Any = timm.create_model("resnet18", num_classes=512)
    module.pretrained_cfg = {**module.pretrained_cfg, "num_classes": 512}
    engine = make_engine(tmp_path, module, class_layers=find_timm_layers(module))
    assert engine.decided_values == {"task.layer": "output"}


def test_classifier_of_transformers_gives_its_features(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    model = transformers.ResNetForImageClassification(config)
    assert find_huggingface_layers(model) == ("classifier",)
    assert find_huggingface_layers(transformers.ResNetModel(config)) == ()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> Any:
            return self.model(pixel_values=x).logits

    engine = make_engine(tmp_path, Logits(), class_layers=("model.classifier",))
    assert engine.decided_values == {"task.layer": "before:model.classifier"}
    assert engine.postprocess.fields[0].type.list_size == 8


@pytest.mark.parametrize(
    ("module", "labels", "length"),
    [
        (OwnNet(1000), None, 8),  # the classes of ImageNet
        (OwnNet(5), ("a", "b", "c", "d", "e"), 8),
        (OwnNet(5, num_classes=5), None, 8),
        (OwnNet(5, name="classifier"), None, 8),
        (OwnNet(128), None, 128),  # perhaps an embedding: not sure, so it stays
        (OwnNet(128, num_classes=5), None, 128),
        (nn.Sequential(OwnNet(1000), nn.Softmax(1)), None, 1000),
    ],
)
def test_own_model_gives_features_only_where_it_is_sure(
    module: nn.Module, labels: tuple[str, ...] | None, length: int, tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, module, labels=labels)
    assert engine.postprocess.fields[0].type.list_size == length


def test_layer_that_is_not_the_last_is_not_left_out(tmp_path: Path) -> None:
    """The format names a layer whose input is not what the model would give without it."""
    engine = make_engine(tmp_path, nn.Sequential(OwnNet(8), nn.ReLU()), class_layers=("0.fc",))
    assert engine.decided_values == {"task.layer": "output"}
    assert "0.fc cannot be left out" in engine.decisions["task.layer"].reason


def test_explicit_values() -> None:
    net = OwnNet(5).eval()
    pixels = torch.rand(2, 3, 32, 32)
    assert EmbeddingTask(layer="output").adapt(net) is net
    assert EmbeddingTask(layer=None).adapt(net) is net
    assert EmbeddingTask(layer="before:fc").adapt(net)(pixels).shape == (2, 8)
    assert net(pixels).shape == (2, 5)
    named = OwnNet(5, name="output").eval()  # a layer of the model goes before the word
    assert EmbeddingTask(layer="output").adapt(named) is not named


def test_plans_of_earlier_versions_keep_the_output_of_the_model(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    for defaults in ({}, {"task": {"type": "embedding", "layer": None}}):
        earlier = job.with_defaults(defaults)
        assert isinstance(earlier.task, EmbeddingTask)
        assert earlier.task.layer is None
        assert Engine(earlier, Reader(), ()).decisions == {}
