"""`type: huggingface`: compared with transformers itself, from every storage, and a message for each broken folder."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from batchjob.errors import InvalidJob, Unavailable
from batchjob.models.huggingface import HuggingfaceModel
from batchjob.models.huggingface_hub import silence_hub_libraries
from batchjob.models.loaded_model import LoadedModel
from batchjob.preprocessing.settings import Preprocess
from batchjob.storage.reader import Reader

READER = Reader()
LABELS = {0: "cat", 1: "dog", 2: "tree"}
VIT_CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="session", autouse=True)
def import_transformers() -> None:
    """Import parts of transformers that it imports on first use, because some of their imports emit warnings."""
    with silence_hub_libraries():
        make_vit()
        transformers.AutoImageProcessor, transformers.AutoModel  # noqa: B018 - the attribute access imports them


def make_vit(class_name: str = "ViTForImageClassification", **config: Any) -> Any:
    torch.manual_seed(1)
    return getattr(transformers, class_name)(transformers.ViTConfig(**VIT_CONFIG, id2label=LABELS, **config)).eval()


def make_resnet(class_name: str = "ResNetForImageClassification") -> Any:
    torch.manual_seed(1)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=LABELS
    )
    return getattr(transformers, class_name)(config).eval()


def make_yolos() -> Any:
    torch.manual_seed(1)
    config = transformers.YolosConfig(
        **{**VIT_CONFIG, "image_size": [32, 48]},
        num_detection_tokens=5,
        id2label=LABELS,
        use_mid_position_embeddings=False,
    )
    net: Any = transformers.YolosForObjectDetection(config)
    return net.eval()


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def load(model: str, **settings: Any) -> LoadedModel:
    return HuggingfaceModel(model=model, **settings).load(READER, Path())


def make_pixels(n: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(3))


# ----------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("make_model", [make_vit, make_resnet])
def test_classification_returns_logits(make_model: Callable[[], Any], tmp_path: Path) -> None:
    net = make_model()
    model = load(save(net, tmp_path))
    with torch.inference_mode():
        torch.testing.assert_close(model.module(make_pixels()), net(pixel_values=make_pixels()).logits, rtol=0, atol=0)
    assert model.labels == ("cat", "dog", "tree")
    assert (model.input_kind, model.eager, model.batch_size) == ("batch", True, None)
    assert not any(layer.training for layer in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_detection_returns_logits_and_boxes(tmp_path: Path) -> None:
    net = make_yolos()
    model = load(save(net, tmp_path))
    with torch.inference_mode():
        outputs, expected = model.module(make_pixels(2, 32, 48)), net(pixel_values=make_pixels(2, 32, 48))
    assert list(outputs) == ["logits", "pred_boxes"]
    assert outputs["logits"].shape == (2, 5, 4)
    torch.testing.assert_close(outputs["logits"], expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(outputs["pred_boxes"], expected.pred_boxes, rtol=0, atol=0)
    assert model.labels == ("cat", "dog", "tree")
    boxes = load(str(tmp_path), output="pred_boxes").module(make_pixels(2, 32, 48))
    assert boxes.equal(outputs["pred_boxes"])


def test_features_are_the_pooled_output_if_it_was_trained(tmp_path: Path) -> None:
    for number, net in enumerate((make_vit("ViTModel"), make_resnet("ResNetModel"))):
        model = load(save(net, tmp_path / str(number)))
        with torch.inference_mode():
            torch.testing.assert_close(
                model.module(make_pixels()), net(pixel_values=make_pixels()).pooler_output.flatten(1)
            )
        assert model.labels is None


def test_features_of_a_classifier_are_its_class_token(tmp_path: Path) -> None:
    net = make_vit()
    folder = save(net, tmp_path)
    features = load(folder, kind="features").module(make_pixels())
    with torch.inference_mode():
        expected = net.vit(pixel_values=make_pixels()).last_hidden_state[:, 0]
        torch.testing.assert_close(features, expected)


def test_features_of_a_model_of_images_and_text_are_those_of_the_image(tmp_path: Path) -> None:
    torch.manual_seed(1)
    text_config = {**VIT_CONFIG, "vocab_size": 20, "eos_token_id": 2, "bos_token_id": 1}
    net: Any = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text_config, vision_config=VIT_CONFIG, projection_dim=12)
    )
    net.eval()
    model = load(save(net, tmp_path))
    with torch.inference_mode():
        torch.testing.assert_close(
            model.module(make_pixels()), net.get_image_features(pixel_values=make_pixels()).pooler_output
        )
    assert model.module(make_pixels()).shape == (2, 12)


def test_half_precision_weights_are_converted_to_float32(tmp_path: Path) -> None:
    model = load(save(make_vit().half(), tmp_path))
    assert {value.dtype for value in model.module.state_dict().values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------- preprocessing


def test_folder_brings_its_preprocessing_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(save(make_vit(), tmp_path)).preprocess == Preprocess(
        resize=(32, 32), crop=None, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    assert load(str(tmp_path)).preprocess is None
    assert "its image processor cannot be loaded" in caplog.text
    (tmp_path / "preprocessor_config.json").unlink()
    assert load(str(tmp_path)).preprocess is None


# ---------------------------------------------------------------------------------------------- folders and the Hub


def test_folder_loads_from_any_storage(tmp_path: Path) -> None:
    net = make_vit()
    folder = Path(save(net, tmp_path / "vit"))
    for path in folder.iterdir():
        with fsspec.open(f"memory://huggingface/vit/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    expected = net(pixel_values=make_pixels()).logits
    digests = set()
    for uri in (str(folder), f"{folder}/", f"file://{folder}", "memory://huggingface/vit"):
        HuggingfaceModel(model=uri).check(READER, Path())
        model = load(uri)
        torch.testing.assert_close(model.module(make_pixels()), expected, rtol=0, atol=0)
        digests.add(model.digest)
        assert HuggingfaceModel(model=uri).title == "vit"
    assert len(digests) == 1


def test_weights_in_several_files_have_one_digest(tmp_path: Path) -> None:
    net = make_vit()
    net.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()
    torch.testing.assert_close(
        load(str(tmp_path), sha256=digest).module(make_pixels()), net(pixel_values=make_pixels()).logits
    )
    with pytest.raises(InvalidJob, match=rf"has the sha256 {digest}, but model\.sha256 is 0000"):
        load(str(tmp_path), sha256="0" * 64)
    digest_before = load(str(tmp_path)).digest
    shards[0].rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidJob, match=rf"lacks {shards[0].name}, which model\.safetensors\.index\.json names"):
        load(str(tmp_path))
    (tmp_path / "elsewhere").rename(shards[0])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    assert load(str(tmp_path)).digest != digest_before


def test_folder_beside_the_job_has_precedence_over_a_name_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "models" / "vit").mkdir(parents=True)

    def parse_model(text: str) -> HuggingfaceModel:
        document = {"type": "huggingface", "model": text}
        return HuggingfaceModel.model_validate(document, context={"base": tmp_path})

    assert parse_model("models/vit").model == str(tmp_path / "models" / "vit")
    assert parse_model("./vit").model == str(tmp_path / "vit")
    assert parse_model("google/vit-base-patch16-224").model == "google/vit-base-patch16-224"
    assert parse_model("google/vit-base-patch16-224").title == "google/vit-base-patch16-224"
    assert parse_model("s3://models/vit").model == "s3://models/vit"
    with pytest.raises(ValidationError, match="credentials"):
        parse_model("https://me:secret@example.org/vit")


def test_hub_model_offline_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    HuggingfaceModel(model="google/vit").check(READER, Path())
    with pytest.raises(Unavailable, match=r"google/vit cannot be had .*set model\.model to the folder that holds it"):
        load("google/vit")


def test_cached_hub_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--vit" / "snapshots" / ("0" * 40)
    net = make_vit()
    save(net, snapshot)
    (tmp_path / "models--me--vit" / "refs").mkdir()
    (tmp_path / "models--me--vit" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    torch.testing.assert_close(
        load("me/vit").module(make_pixels()), net(pixel_values=make_pixels()).logits, rtol=0, atol=0
    )


# --------------------------------------------------------------------------------------------------------- bad input


class MaliciousObject:
    """Object that prints a text when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_pickled_weights_load_unless_they_hold_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = make_vit()
    save(net, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(load(str(tmp_path)).module(make_pixels()), net(pixel_values=make_pixels()).logits)
    torch.save(net.state_dict() | {"malicious": MaliciousObject()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidJob, match="cannot be loaded"):
        load(str(tmp_path))
    assert "code ran" not in capsys.readouterr().out


def test_code_in_the_folder_never_runs(tmp_path: Path) -> None:
    save(make_vit(), tmp_path)
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "modeling.C", "AutoModel": "modeling.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidJob, match=r"needs code of its own, which is never run; .*model\.type: python"):
        load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    save(make_vit("ViTModel"), tmp_path)
    with pytest.raises(
        InvalidJob, match=r"saved as ViTModel and has no weights for classifier\.bias, .*correct model\.kind"
    ):
        load(str(tmp_path), kind="classification")
    state = load_file(tmp_path / "model.safetensors")
    save_file({key: state[key] for key in list(state)[2:]}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidJob, match="has no weights for"):
        load(str(tmp_path))


def test_number_of_classes_unlike_the_config_is_refused(tmp_path: Path) -> None:
    save(make_vit(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}, "label2id": None}))
    with pytest.raises(InvalidJob, match="cannot be loaded"):
        load(str(tmp_path))


def make_config_change(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), {}, r"but no config\.json; name a folder"),
        (lambda folder: (folder / "config.json").write_text("{"), {}, r"config\.json is no JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), {}, "holds no JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, r"holds neither model\.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"rubbish"), {}, "cannot be loaded"),
        (
            make_config_change("model_type", "nonesuch"),
            {},
            "nonesuch, which this version of transformers does not know",
        ),
        (make_config_change("architectures", None), {}, r"write model\.kind: classification, detection or features"),
        (make_config_change("architectures", ["ViTForMaskedImageModeling"]), {}, r"write model\.kind: features"),
        (
            make_config_change("id2label", LABELS),
            {"kind": "detection"},
            "is a vit, which transformers has not for detection",
        ),
    ],
)
def test_damaged_folder_is_explained(
    damage: Callable[[Path], Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(make_vit(), tmp_path)
    damage(tmp_path)
    with pytest.raises(InvalidJob, match=message):
        load(folder, **settings)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    model = HuggingfaceModel(model=str(tmp_path / "absent"))
    for call in (model.check, model.load):
        with pytest.raises(InvalidJob, match=r"absent/ holds nothing, but no config\.json"):
            call(READER, Path())


def test_missing_transformers_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = HuggingfaceModel(model="google/vit")
    for call in (model.check, model.load):
        with pytest.raises(InvalidJob, match=r"huggingface needs transformers; .*pip install 'transformers"):
            call(READER, Path())


def test_transformers_is_silent_and_its_settings_are_restored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save(make_vit(), tmp_path)
    logger = logging.getLogger("transformers")
    before = logger.level, are_progress_bars_disabled(), constants.HF_HUB_OFFLINE, torch.get_rng_state()
    capfd.readouterr()
    load(folder)
    load(folder, kind="features")
    assert capfd.readouterr() == ("", "")
    assert (logger.level, are_progress_bars_disabled(), constants.HF_HUB_OFFLINE) == before[:3]
    assert torch.get_rng_state().equal(before[3])
    assert torch.get_default_dtype() is torch.float32


VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def projection_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a vision tower of CLIP with its projection to 12 numbers."""
    torch.manual_seed(4)
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=12)
    folder = tmp_path_factory.mktemp("projection")
    net: Any = transformers.CLIPVisionModelWithProjection(config)
    net.save_pretrained(folder)
    return folder


def test_features_of_a_vision_tower_with_projection_are_projected(projection_folder: Path) -> None:
    model = load(str(projection_folder))
    theirs: Any = transformers.CLIPVisionModelWithProjection.from_pretrained(projection_folder)
    theirs.eval()
    pixels = make_pixels()
    with torch.inference_mode():
        expected = theirs(pixel_values=pixels).image_embeds
        torch.testing.assert_close(model.module(pixels), expected)
    assert expected.shape == (2, 12)


def change_architecture(folder: Path, architecture: str) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    return str(folder)


def test_weights_that_the_class_does_not_use_are_refused(projection_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(projection_folder, tmp_path / "net")
    with pytest.raises(InvalidJob, match=r"that CLIPVisionModel does not use: visual_projection\.weight"):
        load(change_architecture(tmp_path / "net", "CLIPVisionModel"))


def test_a_projection_that_is_missing_is_refused(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=12)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "net")
    with pytest.raises(InvalidJob, match=r"has no weights for visual_projection\.weight"):
        load(change_architecture(tmp_path / "net", "CLIPVisionModelWithProjection"))


def test_a_text_tower_is_let_pass_as_unused(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(vision_config=VISION, text_config=text | {"vocab_size": 50})
    transformers.SiglipForImageClassification(config).save_pretrained(tmp_path / "net")
    assert load(str(tmp_path / "net"), kind="features").module(make_pixels()).shape == (2, 16)


def test_a_body_with_a_pooler_is_no_classifier(tmp_path: Path) -> None:
    folder = save(make_vit("ViTModel"), tmp_path / "net")
    with pytest.raises(InvalidJob, match=r"was saved as ViTModel and has no weights for classifier\.bias"):
        load(folder, kind="classification")
