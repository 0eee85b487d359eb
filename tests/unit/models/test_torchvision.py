"""`type: torchvision`: random weights, files of the user's own, and published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from pydantic import ValidationError

from batchjob.errors import InvalidJob
from batchjob.models.torchvision import TorchvisionModel
from batchjob.models.torchvision_weights import find_weights_by_name
from batchjob.preprocessing.settings import Preprocess
from batchjob.storage.reader import Reader

READER = Reader()


def save(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def test_random_weights_equal_those_of_torchvision_with_the_seed() -> None:
    before = torch.get_rng_state()
    model = TorchvisionModel(name="resnet18", seed=7).load(READER, Path())
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(7)
    expected = torchvision.models.resnet18()
    for key, value in expected.state_dict().items():
        assert model.module.state_dict()[key].equal(value), key
    assert model.preprocess == Preprocess(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert model.labels is not None
    assert (len(model.labels), model.labels[0]) == (1000, "tench")
    assert model.digest == TorchvisionModel(name="resnet18", seed=7).load(READER, Path()).digest
    other = TorchvisionModel(name="resnet18", seed=8, num_classes=4).load(READER, Path())
    assert other.digest != model.digest
    assert other.labels is None


def test_own_file_brings_neither_labels_nor_preprocessing(tmp_path: Path) -> None:
    module = torchvision.models.squeezenet1_1(num_classes=3)
    weights = save({"model": module.state_dict()}, tmp_path / "mine.pth")
    model = TorchvisionModel(name="squeezenet1_1", weights=weights, num_classes=3).load(READER, Path())
    assert (model.preprocess, model.labels) == (None, None)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.module(x), module.eval()(x), rtol=0, atol=0)
    with pytest.raises(InvalidJob, match=r"set model\.num_classes: 3"):
        TorchvisionModel(name="squeezenet1_1", weights=weights).load(READER, Path())


def test_file_under_its_published_name_brings_labels_and_preprocessing(tmp_path: Path) -> None:
    module = torchvision.models.squeezenet1_1()
    file_name = find_weights_by_name("squeezenet1_1", "IMAGENET1K_V1").file_name
    weights = save(module.state_dict(), tmp_path / file_name)
    model = TorchvisionModel(name="squeezenet1_1", weights=weights).load(READER, Path())
    assert model.preprocess is not None
    assert model.labels is not None
    with pytest.raises(InvalidJob, match=r"num_classes is 5, but SqueezeNet1_1_Weights\.IMAGENET1K_V1 knows 1000"):
        TorchvisionModel(name="squeezenet1_1", weights=weights, num_classes=5).load(READER, Path())


def test_old_keys_of_published_densenets_are_converted(tmp_path: Path) -> None:
    module = torchvision.models.densenet121()
    old_state = {
        key.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.")
        if "denselayer" in key
        else key: value
        for key, value in module.state_dict().items()
    }
    weights = save(old_state, tmp_path / "densenet.pth")
    model = TorchvisionModel(name="densenet121", weights=weights).load(READER, Path())
    for key, value in module.state_dict().items():
        assert model.module.state_dict()[key].equal(value), key


def test_auxiliary_heads_are_removed(tmp_path: Path) -> None:
    module = torchvision.models.googlenet(transform_input=True, aux_logits=True, init_weights=False)
    weights = save(module.state_dict(), tmp_path / find_weights_by_name("googlenet", "DEFAULT").file_name)
    model = TorchvisionModel(name="googlenet", weights=weights).load(READER, Path())
    assert not [key for key in model.module.state_dict() if key.startswith("aux")]
    x = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(model.module(x), module.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("IMAGENET1K_V3", "did you mean IMAGENET1K_V"),
        ("imagenet1k_v1", "did you mean IMAGENET1K_V1"),
        ("ResNet18_Weights.DEFAULT", "there are|did you mean"),
        ("nonsense", "there are IMAGENET1K_V1"),
    ],
)
def test_unknown_weights_and_names_are_explained(weights: str, message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        TorchvisionModel(name="resnet50", weights=weights).load(READER, Path())
    with pytest.raises(InvalidJob, match=r"did you mean resnet"):
        TorchvisionModel(name="resnet51", weights=weights).load(READER, Path())


def test_weights_are_a_name_or_a_path_relative_to_the_job_file(tmp_path: Path) -> None:
    def parse_weights(text: str) -> str | None:
        document = {"name": "resnet50", "weights": text}
        return TorchvisionModel.model_validate(document, context={"base": tmp_path}).weights

    assert parse_weights("IMAGENET1K_V2") == "IMAGENET1K_V2"
    assert parse_weights("ResNet50_Weights.DEFAULT") == "ResNet50_Weights.DEFAULT"
    assert parse_weights("mine.pth") == str(tmp_path / "mine.pth")
    assert parse_weights("models/mine") == str(tmp_path / "models" / "mine")
    assert parse_weights("s3://models/mine.safetensors") == "s3://models/mine.safetensors"
    with pytest.raises(ValidationError, match="credentials"):
        parse_weights("https://me:secret@example.org/mine.pth")
    with pytest.raises(InvalidJob, match="weights must be given"):
        TorchvisionModel(name="resnet50")
    with pytest.raises(InvalidJob, match="exclude each other"):
        TorchvisionModel(name="resnet50", weights="DEFAULT", seed=1)


def test_check_looks_for_files_and_mirrors(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"model\.weights: there is no file"):
        TorchvisionModel(name="resnet50", weights=str(tmp_path / "absent.pth")).check(READER, tmp_path)
    with pytest.raises(InvalidJob, match=r"model\.mirror: .*absent"):
        TorchvisionModel(name="resnet50", weights="DEFAULT", mirror=str(tmp_path / "absent/")).check(READER, tmp_path)
    (tmp_path / "some.pth").touch()
    TorchvisionModel(name="resnet50", weights="DEFAULT", mirror=str(tmp_path)).check(READER, tmp_path)
    TorchvisionModel(name="resnet50", weights="DEFAULT").check(READER, tmp_path)
