"""`type: timm`: compared with timm's own loading and its own evaluation transform."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from timm.data import config as timm_data
from timm.data.transforms_factory import create_transform

from batchjob.errors import InvalidJob, Unavailable
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.timm import TimmModel
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import Preprocess
from batchjob.preprocessing.transforms import ResizeCrop
from batchjob.storage.reader import Reader

READER = Reader()
NAME = "test_resnet.r160_in1k"
data: Any = timm_data


def load(**settings: Any) -> LoadedModel:
    return TimmModel(**settings).load(READER, Path())


def make_module(name: str, seed: int = 3, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, **arguments).eval()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Environment of HF_HUB_OFFLINE=1 with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_random_weights_equal_those_of_timm_with_the_seed() -> None:
    before = torch.get_rng_state()
    model = load(name=NAME, seed=3)
    assert torch.get_rng_state().equal(before)
    for key, value in make_module(NAME).state_dict().items():
        assert model.module.state_dict()[key].equal(value), key
    assert model.digest == load(name=NAME, seed=3).digest
    assert model.digest != load(name=NAME, seed=4).digest
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert model.labels is not None
    assert (len(model.labels), model.labels[0], model.labels[999][:13]) == (1000, "tench, Tinca tinca", "toilet tissue")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_model_from_a_file_equals_that_of_timm(suffix: str, tmp_path: Path) -> None:
    module = make_module(NAME, num_classes=7)
    path = tmp_path / f"mine.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": module.state_dict(), "epoch": 3}, path)
    else:
        save_file(module.state_dict(), path)
    model = load(name="test_resnet", weights=str(path), num_classes=7)
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.module(x), module(x), rtol=0, atol=0)
    assert model.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.labels is None
    assert model.preprocess == Preprocess(
        resize=168, crop=160, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )


def test_features_come_from_the_same_file_without_the_last_layer(tmp_path: Path) -> None:
    for name in (NAME, "test_vit", "test_convnext"):
        module = make_module(name)
        save_file(module.state_dict(), tmp_path / "w.safetensors")
        model = load(name=name, weights=str(tmp_path / "w.safetensors"), num_classes=0)
        x = torch.rand(2, 3, 160, 160)
        with torch.inference_mode():
            expected = module.forward_head(module.forward_features(x), pre_logits=True)
            torch.testing.assert_close(model.module(x), expected)
        assert model.labels is None


def test_imagenet_labels_need_imagenet_weights(tmp_path: Path) -> None:
    save_file(make_module(NAME).state_dict(), tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    assert load(name=NAME, weights=weights).labels is not None
    assert load(name="test_resnet", weights=weights).labels is None
    assert load(name=NAME, seed=1, num_classes=5).labels is None


# timm resizes with Pillow, the loader resizes uint8 tensors with torchvision. The two round differently.
PREPROCESSING_CASES: dict[str, dict[str, Any]] = {
    "bilinear, cropped": {"name": NAME},
    "bicubic, cropped": {"name": "test_vit"},
    "nothing cropped": {"name": "test_mambaout"},
    "another size": {"name": "test_vit", "arguments": {"img_size": 96}},
}


@pytest.mark.parametrize("case", PREPROCESSING_CASES)
def test_preprocessing_equals_that_of_timm(case: str, test_data: Path) -> None:
    model = load(seed=3, **PREPROCESSING_CASES[case])
    arguments = PREPROCESSING_CASES[case].get("arguments", {})
    config = data.resolve_model_data_config(timm.create_model(PREPROCESSING_CASES[case]["name"], **arguments))
    if "img_size" in arguments:
        config["input_size"] = (3, arguments["img_size"], arguments["img_size"])
    transform = create_transform(**config, is_training=False)
    assert model.preprocess is not None
    geometry, normalize = ResizeCrop(model.preprocess), Normalizer(model.preprocess)
    photographs = sorted((test_data / "imagenet-sample").rglob("*.JPEG"))[:4]
    assert photographs
    for path in photographs:
        image = Image.open(path).convert("RGB")
        pixels = normalize(geometry(np.asarray(image).copy())[None], torch.float32)
        expected = transform(image)[None]
        assert pixels.shape == expected.shape
        grey_level = 1 / 255 / min(config["std"])
        # Bicubic interpolation overshoots at edges; uint8 pixels cut that off.
        levels = 1.01 if config["interpolation"] == "bilinear" else 16
        assert (pixels - expected).abs().max() <= levels * grey_level
        assert (pixels - expected).abs().mean() <= 0.25 * grey_level
        with torch.inference_mode():
            torch.testing.assert_close(model.module(pixels), model.module(expected), rtol=0.02, atol=0.02)


def test_squash_crop_mode_resizes_both_sides() -> None:
    name = "convnext_tiny.fb_in22k_ft_in1k_384"
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    assert config.crop_mode == "squash"
    model = TimmModel(name=name, seed=0)
    with torch.device("meta"):
        module = timm.create_model(name)
    assert model._make_preprocess(module) == Preprocess(
        resize=(384, 384), crop=384, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )


def test_transform_that_settings_cannot_express_is_left_to_the_job(caplog: pytest.LogCaptureFixture) -> None:
    assert load(name=NAME, seed=1, arguments={"in_chans": 1}).preprocess is None
    assert "with 1 channels, for which 'preprocess' has no words" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet_18"}, r"timm has no model named 'resnet_18'; did you mean .*resnet18"),
        ({"name": "resnet18.a9_in1k"}, r"resnet18 has no weights tagged 'a9_in1k'; there are .*a1_in1k"),
        ({"name": "resnet18", "arguments": {"depth": 3}}, r"unexpected keyword argument 'depth'; correct model\.arg"),
        ({"name": "resnet18", "output": "x"}, None),
    ],
)
def test_unknown_names_and_arguments_are_explained(settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        with pytest.raises(InvalidJob, match=r"leave model\.output out"):
            load(seed=1, **settings).module(torch.rand(1, 3, 64, 64))
        return
    with pytest.raises(InvalidJob, match=message):
        load(seed=1, **settings)


def test_wrong_number_of_classes_is_explained(tmp_path: Path) -> None:
    save_file(make_module(NAME, num_classes=7).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(
        InvalidJob, match=r"w\.safetensors does not fit timm's test_resnet: .*set model\.num_classes: 7"
    ):
        load(name="test_resnet", weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(InvalidJob, match=r"num_classes is 7, but the published .* knows 1000 classes"):
        load(name=NAME, pretrained=True, num_classes=7)


@pytest.mark.usefixtures("offline")
def test_published_weights_offline_are_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unavailable, match=rf"timm's {NAME} cannot be had .*set model\.weights to its path"):
        load(name=NAME, pretrained=True)
    assert not caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of weights"),
        ({"seed": 1, "pretrained": True}, "one of weights"),
        ({"seed": 1, "sha256": "0" * 64}, "name the file under weights"),
        ({"seed": 1, "arguments": {"num_classes": 3}}, r"write model\.num_classes"),
        ({"seed": 1, "arguments": {"checkpoint_path": "/x"}}, r"name a file under model\.weights"),
        ({"seed": 1, "name": "local-dir:/x"}, "the file in that folder under weights"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        TimmModel(**{"name": NAME, **settings})


def test_missing_timm_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    model = TimmModel(name=NAME, seed=1)
    for call in (model.check, model.load):
        with pytest.raises(InvalidJob, match=r"timm needs timm; .*pip install 'timm"):
            call(READER, Path())


def test_check_looks_for_the_file(tmp_path: Path) -> None:
    TimmModel(name=NAME, seed=1).check(READER, tmp_path)
    with pytest.raises(InvalidJob, match=r"there is no file .*absent\.pth"):
        TimmModel(name=NAME, weights=str(tmp_path / "absent.pth")).check(READER, tmp_path)
