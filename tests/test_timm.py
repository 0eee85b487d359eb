"""timm's models: held against timm's own loading and its own evaluation transform."""

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
from pydantic import ValidationError
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


def seeded(name: str, seed: int = 3, **more: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, **more).eval()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As HF_HUB_OFFLINE=1 with an empty cache has it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_random_weights_are_those_of_timm_under_the_seed() -> None:
    before = torch.get_rng_state()
    model = load(name=NAME, seed=3)
    assert torch.get_rng_state().equal(before)
    for key, value in seeded(NAME).state_dict().items():
        assert model.module.state_dict()[key].equal(value), key
    assert model.digest == load(name=NAME, seed=3).digest
    assert model.digest != load(name=NAME, seed=4).digest
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert model.labels is not None
    assert (len(model.labels), model.labels[0], model.labels[999][:13]) == (1000, "tench, Tinca tinca", "toilet tissue")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_gives_what_timm_gives(suffix: str, tmp_path: Path) -> None:
    net = seeded(NAME, num_classes=7)
    path = tmp_path / f"mine.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": net.state_dict(), "epoch": 3}, path)
    else:
        save_file(net.state_dict(), path)
    model = load(name="test_resnet", weights=str(path), num_classes=7)
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.module(x), net(x), rtol=0, atol=0)
    assert model.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.labels is None
    assert model.preprocess == Preprocess(
        resize=168, crop=160, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )


def test_features_come_from_the_same_file_without_its_last_layer(tmp_path: Path) -> None:
    for name in (NAME, "test_vit", "test_convnext"):
        net = seeded(name)
        save_file(net.state_dict(), tmp_path / "w.safetensors")
        model = load(name=name, weights=str(tmp_path / "w.safetensors"), num_classes=0)
        x = torch.rand(2, 3, 160, 160)
        with torch.inference_mode():
            want = net.forward_head(net.forward_features(x), pre_logits=True)
            torch.testing.assert_close(model.module(x), want)
        assert model.labels is None


def test_labels_are_imagenets_only_where_the_weights_are(tmp_path: Path) -> None:
    save_file(seeded(NAME).state_dict(), tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    assert load(name=NAME, weights=weights).labels is not None
    assert load(name="test_resnet", weights=weights).labels is None
    assert load(name=NAME, seed=1, num_classes=5).labels is None


# Photographs: timm resizes with Pillow, the loader uint8 tensors with torchvision, which round differently.
MODELS: dict[str, dict[str, Any]] = {
    "bilinear, cropped": {"name": NAME},
    "bicubic, cropped": {"name": "test_vit"},
    "nothing cropped": {"name": "test_mambaout"},
    "another size": {"name": "test_vit", "arguments": {"img_size": 96}},
}


@pytest.mark.parametrize("which", MODELS)
def test_images_are_prepared_as_timm_prepares_them(which: str, test_data: Path) -> None:
    model = load(seed=3, **MODELS[which])
    more = MODELS[which].get("arguments", {})
    config = data.resolve_model_data_config(timm.create_model(MODELS[which]["name"], **more))
    if "img_size" in more:
        config["input_size"] = (3, more["img_size"], more["img_size"])
    transform = create_transform(**config, is_training=False)
    assert model.preprocess is not None
    geometry, normalize = ResizeCrop(model.preprocess), Normalizer(model.preprocess)
    photographs = sorted((test_data / "imagenet-sample").rglob("*.JPEG"))[:4]
    assert photographs
    for path in photographs:
        image = Image.open(path).convert("RGB")
        ours = normalize(geometry(np.asarray(image).copy())[None], torch.float32)
        theirs = transform(image)[None]
        assert ours.shape == theirs.shape
        step = 1 / 255 / min(config["std"])  # one grey level
        steep = 1.01 if config["interpolation"] == "bilinear" else 16  # bicubic overshoots at edges, and is cut off
        assert (ours - theirs).abs().max() <= steep * step
        assert (ours - theirs).abs().mean() <= 0.25 * step
        with torch.inference_mode():
            torch.testing.assert_close(model.module(ours), model.module(theirs), rtol=0.02, atol=0.02)


def test_squashed_images() -> None:
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


def test_what_cannot_be_said_in_settings_is_left_to_the_job(caplog: pytest.LogCaptureFixture) -> None:
    assert load(name=NAME, seed=1, arguments={"in_chans": 1}).preprocess is None
    assert "with 1 channels, for which 'preprocess' has no words" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "resnet_18"}, r"timm has no model named 'resnet_18'; did you mean .*resnet18"),
        ({"name": "resnet18.a9_in1k"}, r"resnet18 has no weights tagged 'a9_in1k'; there are .*a1_in1k"),
        ({"name": "resnet18", "arguments": {"depth": 3}}, r"unexpected keyword argument 'depth'; correct model\.arg"),
        ({"name": "resnet18", "output": "x"}, None),
    ],
)
def test_names_and_arguments_that_timm_does_not_know(settings: dict[str, Any], said: str | None) -> None:
    if said is None:
        with pytest.raises(InvalidJob, match=r"leave model\.output out"):
            load(seed=1, **settings).module(torch.rand(1, 3, 64, 64))
        return
    with pytest.raises(InvalidJob, match=said):
        load(seed=1, **settings)


def test_weights_of_another_number_of_classes(tmp_path: Path) -> None:
    save_file(seeded(NAME, num_classes=7).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(
        InvalidJob, match=r"w\.safetensors does not fit timm's test_resnet: .*set model\.num_classes: 7"
    ):
        load(name="test_resnet", weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(InvalidJob, match=r"num_classes is 7, but the published .* knows 1000 classes"):
        load(name=NAME, pretrained=True, num_classes=7)


@pytest.mark.usefixtures("offline")
def test_published_weights_without_a_way_out(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unavailable, match=rf"timm's {NAME} cannot be had .*set model\.weights to its path"):
        load(name=NAME, pretrained=True)
    assert not caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "one of weights"),
        ({"seed": 1, "pretrained": True}, "one of weights"),
        ({"seed": 1, "sha256": "0" * 64}, "name the file under weights"),
        ({"seed": 1, "arguments": {"num_classes": 3}}, r"write model\.num_classes"),
        ({"seed": 1, "arguments": {"checkpoint_path": "/x"}}, r"name a file under model\.weights"),
        ({"seed": 1, "name": "local-dir:/x"}, "the file in that folder under weights"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TimmModel(**{"name": NAME, **settings})


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    model = TimmModel(name=NAME, seed=1)
    for call in (model.check, model.load):
        with pytest.raises(InvalidJob, match=r"timm needs timm; pip install 'batchjob\[timm\]'"):
            call(READER, Path())


def test_the_cheap_check_looks_for_the_file(tmp_path: Path) -> None:
    TimmModel(name=NAME, seed=1).check(READER, tmp_path)
    with pytest.raises(InvalidJob, match=r"there is no file .*absent\.pth"):
        TimmModel(name=NAME, weights=str(tmp_path / "absent.pth")).check(READER, tmp_path)
