"""Models: every format to a ready module, on real files; and a sentence for whatever does not fit."""

from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torchvision
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from batchjob.errors import InvalidJob, Unavailable
from batchjob.job.job import Job
from batchjob.models.architecture import build_torchvision
from batchjob.models.checkpoint import CheckpointModel
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.python import PythonModel
from batchjob.models.torchvision import TorchvisionModel
from batchjob.models.torchvision_weights import (
    PublishedWeights,
    fetch_weights,
    find_weights_by_file,
    find_weights_by_name,
)
from batchjob.preprocessing.settings import Preprocess
from batchjob.storage.reader import Reader

JOBS = Path(__file__).parents[1] / "jobs"
READER = Reader()

NET = """
import torch
from torch import nn

def tiny(num_classes=3, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.LazyLinear(num_classes))

def small(num_classes=3, width=4):
    last = nn.Linear(width * 36, num_classes)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), last)

class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)
    def forward(self, x):
        return self.module(x)

def fixed():
    return nn.Linear(2, 2)

def raises():
    return {}["no such key"]

def offline():
    raise ConnectionResetError("no route")

def nothing():
    nn.Linear(2, 2)

READY = nn.Linear(2, 2)
NUMBER = 7
"""


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A job's folder with `net.py` in it."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    return folder


def small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))


def saved(content: Any, path: Path, legacy: bool = False) -> str:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def checkpoint(weights: str, architecture: str = "net:small", **more: Any) -> CheckpointModel:
    return CheckpointModel(architecture=architecture, weights=weights, **more)


def prefixed(prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in small().state_dict().items()}


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_resnet20_from_the_real_checkpoint_is_right_as_often_as_published(test_data: Path) -> None:
    job = Job.from_file(JOBS / "cifar10_resnet20" / "job.yaml")
    weights = str(test_data / "cifar10" / "resnet20-12fca82f.th")
    model = job.model.model_copy(update={"weights": weights}).load(READER, job.folder)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    right = rows = 0
    for label, folder in enumerate(sorted((test_data / "cifar10" / "images").iterdir())):
        pixels = [
            torchvision.transforms.functional.to_tensor(Image.open(file).convert("RGB")) for file in folder.iterdir()
        ]
        with torch.inference_mode():
            found = model.module((torch.stack(pixels) - mean) / std).argmax(1)
        right, rows = right + int((found == label).sum()), rows + len(found)
    assert rows == 1000
    assert abs(right - 804) <= 1


NESTED: dict[str, Callable[[], Any]] = {
    "bare": lambda: small().state_dict(),
    "state_dict beside other keys": lambda: {"state_dict": small().state_dict(), "best_prec1": 92.6, "epoch": 3},
    "model": lambda: {"model": small().state_dict(), "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda: {"model_state_dict": small().state_dict(), "loss": torch.tensor(1.0)},
    "twice nested": lambda: {"model": {"state_dict": small().state_dict()}},
    "module.": lambda: {"state_dict": prefixed("module.")},
    "_orig_mod.": lambda: prefixed("_orig_mod."),
    "module._orig_mod.": lambda: prefixed("module._orig_mod."),
    "_orig_mod.module.": lambda: prefixed("_orig_mod.module."),
    "data parallel": lambda: nn.DataParallel(small()).state_dict(),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(small()).state_dict(),
    "a count beside tensors": lambda: small().state_dict() | {"epoch": 3},
    "half precision": lambda: {key: value.half().float() for key, value in small().state_dict().items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", NESTED)
def test_a_state_dict_is_found_where_people_put_it(form: str, legacy: bool, beside: Path, tmp_path: Path) -> None:
    model = checkpoint(saved(NESTED[form](), tmp_path / "w.th", legacy)).load(READER, beside)
    x = torch.rand(2, 3, 8, 8)
    want = small().eval()
    torch.testing.assert_close(model.module(x), want(x), rtol=0, atol=1e-3 if form == "half precision" else 0)
    assert model.preprocess is None
    assert model.labels is None


def test_safetensors_with_prefixes_from_any_storage(beside: Path, tmp_path: Path) -> None:
    save_file(prefixed("module."), tmp_path / "w.safetensors")
    with fsspec.open("memory://weights/w.safetensors", "wb") as there:
        there.write((tmp_path / "w.safetensors").read_bytes())
    model = checkpoint("memory://weights/w.safetensors").load(READER, beside)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model.module(x), small().eval()(x), rtol=0, atol=0)


def test_a_child_that_is_really_called_module_keeps_its_name(beside: Path, tmp_path: Path) -> None:
    for state in (
        {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)},
        {"module.module.weight": torch.ones(2, 2), "module.module.bias": torch.ones(2)},
    ):
        model = checkpoint(saved(state, tmp_path / "w.pt"), "net:Wrapper").load(READER, beside)
        assert model.module(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]


def test_a_lazy_layer_takes_its_shape_from_the_file(beside: Path, tmp_path: Path) -> None:
    model = checkpoint(saved(small().state_dict(), tmp_path / "w.pt"), "net:tiny").load(READER, beside)
    assert model.module(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_torchvision_architecture_with_arguments(tmp_path: Path) -> None:
    net = torchvision.models.squeezenet1_1(num_classes=5)
    model = checkpoint(
        saved(net.state_dict(), tmp_path / "w.pth"), "squeezenet1_1", num_classes=5, arguments={"dropout": 0.1}
    ).load(READER, tmp_path)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.module(x), net.eval()(x), rtol=0, atol=0)


def without(*keys: str, **more: torch.Tensor) -> dict[str, Any]:
    return {key: value for key, value in small().state_dict().items() if key not in keys} | more


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (lambda: without("0.weight", "3.bias"), {}, ["missing in the file: 0.weight, 3.bias", "model.architecture"]),
        (lambda: without(head=torch.ones(1)), {}, ["unknown to the model: head", "strict: false"]),
        (lambda: small().state_dict(), {"num_classes": 9}, ["3.weight [3, 144] for [9, 144]", "model.num_classes: 3"]),
        (lambda: small().state_dict(), {"arguments": {"width": 5}}, ["of another shape", "model.arguments"]),
        (lambda: {f"layer{n}.weight": torch.ones(1) for n in range(50)}, {}, ["layer5.weight and 44 more"]),
        (lambda: {"other": torch.ones(1)}, {"strict": False}, ["unknown to the model: other"]),
        (lambda: prefixed("") | prefixed("module."), {}, ["holds both 0.weight and module.0.weight"]),
    ],
)
def test_keys_that_do_not_fit_are_named(
    content: Callable[[], Any], more: dict[str, Any], said: list[str], beside: Path, tmp_path: Path
) -> None:
    model = checkpoint(saved(content(), tmp_path / "w.pt"), **more)
    with pytest.raises(InvalidJob) as caught:
        model.load(READER, beside)
    for words in ["w.pt does not fit net:small", *said]:
        assert words in caught.value.message
    assert len(caught.value.message) < 1500


def test_not_strict_lets_keys_pass_and_says_so(beside: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = saved(without("3.bias", extra=torch.ones(1)), tmp_path / "w.pt")
    checkpoint(weights, strict=False).load(READER, beside)
    assert "missing in the file: 3.bias; unknown to the model: extra" in caplog.text


class Sneaky:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(small().eval(), torch.rand(1, 3, 8, 8)), buffer)
    return buffer.getvalue()


def torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def safetensors_bytes(tmp_path: Path) -> bytes:
    save_file(small().state_dict(), tmp_path / "scratch.safetensors")
    return (tmp_path / "scratch.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is:FutureWarning")
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda tmp: torch_bytes({"state_dict": Sneaky()}), "holds code (print) beside tensors: no code is loaded"),
        (lambda tmp: torch_bytes(small()), "holds code (torch.nn.modules.container.Sequential)"),
        (lambda tmp: pickle.dumps({"weights": Sneaky()}), "holds Python objects beside tensors"),
        (lambda tmp: script(), "is a TorchScript archive"),
        (lambda tmp: b"", "is empty"),
        (lambda tmp: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (lambda tmp: b"<!DOCTYPE html><html><title>Not found</title></html>", "is not a weight file"),
        (lambda tmp: torch_bytes(small().state_dict())[:900], "is not a weight file"),
        (lambda tmp: safetensors_bytes(tmp)[:-100], "is no whole safetensors file"),
        (lambda tmp: torch_bytes(torch.ones(3)), "holds a Tensor and no state dict"),
        (lambda tmp: torch_bytes([torch.ones(3)]), "holds a list and no state dict"),
        (lambda tmp: torch_bytes({"epoch": 3, "net": {"weight": torch.ones(1)}}), "its keys are epoch, net"),
    ],
)
def test_what_is_no_weight_file_is_said_plainly(
    data: Callable[[Path], bytes], said: str, beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.pt").write_bytes(data(tmp_path))
    with pytest.raises(InvalidJob) as caught:
        checkpoint(str(tmp_path / "w.pt")).load(READER, beside)
    assert said in caught.value.message
    assert caught.value.message.startswith(f"model.weights: {tmp_path / 'w.pt'}")
    assert "code ran" not in capsys.readouterr().out


def test_absent_weights_and_modules_are_found_by_the_cheap_check(beside: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"model\.weights: there is no file .*absent\.pt"):
        checkpoint(str(tmp_path / "absent.pt")).check(READER, beside)
    with pytest.raises(InvalidJob, match=r"model\.weights: there is no file .*absent\.pt"):
        checkpoint(str(tmp_path / "absent.pt")).load(READER, beside)
    weights = saved(small().state_dict(), tmp_path / "w.pt")
    checkpoint(weights).check(READER, beside)
    with pytest.raises(InvalidJob, match=r"nest\.py: not there, for 'nest:small'; did you mean 'net'"):
        checkpoint(weights, "nest:small").check(READER, beside)
    with pytest.raises(InvalidJob, match=r"nest\.py: not there, for 'nest:small'; did you mean 'net'"):
        PythonModel(target="nest:small").check(READER, beside)
    PythonModel(target="net:small").check(READER, beside)


def test_digest_follows_the_weights_and_the_source(beside: Path, tmp_path: Path) -> None:
    weights = saved(small().state_dict(), tmp_path / "w.pt")
    first = checkpoint(weights).load(READER, beside).digest
    assert checkpoint(weights).load(READER, beside).digest == first
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "net.py").write_text(NET + "\n# changed\n")
    assert checkpoint(weights).load(READER, tmp_path / "other").digest != first
    saved({"state_dict": small().state_dict()}, tmp_path / "w.pt")
    assert checkpoint(weights).load(READER, beside).digest != first
    plain = saved(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "s.pt")
    digest = checkpoint(plain, "squeezenet1_1").load(READER, beside).digest
    assert digest == hashlib.sha256(Path(plain).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("architecture", "more", "said"),
    [
        ("resnet49", {}, "did you mean resnet"),
        ("zzz", {}, "it has alexnet"),
        ("raft_small", {}, "no float model for classification, detection or segmentation"),
        ("quantized_resnet50", {}, "no float model for classification, detection or segmentation"),
        ("resnet18", {"arguments": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ("net:NUMBER", {}, "is a int; name a function"),
        ("net:small", {"arguments": {"depth": 3}}, "it takes (num_classes=3, width=4)"),
        ("net:small", {"arguments": {"num_classes": 3}, "num_classes": 3}, "keep one"),
        ("net:READY", {"arguments": {"depth": 3}}, "takes no model.arguments"),
        ("net:raises", {}, "raised KeyError: 'no such key'"),
        ("net:nothing", {}, "returned a NoneType; it must return a torch.nn.Module"),
    ],
)
def test_an_architecture_that_is_none(
    architecture: str, more: dict[str, Any], said: str, beside: Path, tmp_path: Path
) -> None:
    weights = saved(small().state_dict(), tmp_path / "w.pt")
    with pytest.raises(InvalidJob) as caught:
        checkpoint(weights, architecture, **more).load(READER, beside)
    assert said in caught.value.message
    assert caught.value.message.startswith("model.architecture")


def test_num_classes_is_not_forced_on_a_function_that_takes_none(beside: Path, tmp_path: Path) -> None:
    weights = saved(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    checkpoint(weights, "net:fixed", num_classes=2).load(READER, beside)


# ---------------------------------------------------------------------------------------------------------- python

PYTHON = """
import torch, torchvision
from torch import nn

def flip(pixels):
    return pixels.flip(-1).float()

def bare():
    return nn.Linear(2, 2)

def given():
    return nn.Linear(2, 2), {"resize": [8, 8], "crop": None, "mean": [0, 0, 0], "std": [1, 1, 1], "channels": "bgr"}

def wrong():
    return nn.Linear(2, 2), {"resise": 8, "scale": "percent"}

def preset():
    return nn.Linear(2, 2), torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()

def function():
    return nn.Linear(2, 2), flip

def closure():
    return nn.Linear(2, 2), lambda pixels: pixels

def three():
    return nn.Linear(2, 2), {}, {}

def meta():
    return nn.Linear(2, 2, device="meta")

def rude():
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return nn.Sequential(nn.Linear(2, 2, dtype=torch.float32), nn.Dropout())
"""


@pytest.fixture
def user(tmp_path: Path) -> Callable[[str], LoadedModel]:
    (tmp_path / "user.py").write_text(PYTHON)
    return lambda name: PythonModel(target=f"user:{name}").load(READER, tmp_path)


def test_python_models_bring_their_preprocessing_in_any_of_four_ways(user: Callable[[str], LoadedModel]) -> None:
    assert user("bare").preprocess is None
    given = user("given").preprocess
    assert given is not None
    assert given.resize == (8, 8)
    assert given.channels == "bgr"
    assert "scale" not in given.model_fields_set
    assert user("preset").preprocess == Preprocess(
        resize=232, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    assert user("function").preprocess == Preprocess(transform="user:flip")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrong", "resise: Extra inputs are not permitted"),
        ("closure", "returned a function as preprocessing"),
        ("three", "returned a tuple; it must return a torch.nn.Module, or a pair"),
        ("flip", "it takes (pixels)"),
        ("meta", "cannot be brought to the CPU"),
        ("absent", "absent"),
    ],
)
def test_python_models_that_are_none(name: str, said: str, user: Callable[[str], LoadedModel]) -> None:
    with pytest.raises(InvalidJob) as caught:
        user(name)
    assert said in caught.value.message


def test_python_faults_of_the_network_are_temporary(beside: Path) -> None:
    with pytest.raises(Unavailable, match="no route"):
        PythonModel(target="net:offline").load(READER, beside)
    with pytest.raises(InvalidJob, match=r"returned None \(no return\?\)"):
        PythonModel(target="net:nothing").load(READER, beside)


def test_random_layers_come_out_alike_in_every_worker(user: Callable[[str], LoadedModel]) -> None:
    torch.manual_seed(1)
    first = user("bare")
    torch.manual_seed(2)
    assert user("bare").digest == first.digest


def test_models_are_ready_and_torch_is_left_as_it_was(user: Callable[[str], LoadedModel]) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        module = user("rude").module
        assert torch.is_inference_mode_enabled()
    assert torch.get_rng_state().equal(before)
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad or parameter.is_inference() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------------- torchvision


def test_random_weights_are_those_of_torchvision_under_the_seed() -> None:
    before = torch.get_rng_state()
    model = TorchvisionModel(name="resnet18", seed=7).load(READER, Path())
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(7)
    want = torchvision.models.resnet18()
    for key, value in want.state_dict().items():
        assert model.module.state_dict()[key].equal(value), key
    assert model.preprocess == Preprocess(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert model.labels is not None
    assert (len(model.labels), model.labels[0]) == (1000, "tench")
    assert model.digest == TorchvisionModel(name="resnet18", seed=7).load(READER, Path()).digest
    other = TorchvisionModel(name="resnet18", seed=8, num_classes=4).load(READER, Path())
    assert other.digest != model.digest
    assert other.labels is None


def test_a_file_of_ones_own_brings_neither_labels_nor_preprocessing(tmp_path: Path) -> None:
    net = torchvision.models.squeezenet1_1(num_classes=3)
    weights = saved({"model": net.state_dict()}, tmp_path / "mine.pth")
    model = TorchvisionModel(name="squeezenet1_1", weights=weights, num_classes=3).load(READER, Path())
    assert (model.preprocess, model.labels) == (None, None)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.module(x), net.eval()(x), rtol=0, atol=0)
    with pytest.raises(InvalidJob, match=r"set model\.num_classes: 3"):
        TorchvisionModel(name="squeezenet1_1", weights=weights).load(READER, Path())


def test_a_file_under_its_published_name_brings_both(tmp_path: Path) -> None:
    net = torchvision.models.squeezenet1_1()
    file = find_weights_by_name("squeezenet1_1", "IMAGENET1K_V1").file_name
    weights = saved(net.state_dict(), tmp_path / file)
    model = TorchvisionModel(name="squeezenet1_1", weights=weights).load(READER, Path())
    assert model.preprocess is not None
    assert model.labels is not None
    with pytest.raises(InvalidJob, match=r"num_classes is 5, but SqueezeNet1_1_Weights\.IMAGENET1K_V1 knows 1000"):
        TorchvisionModel(name="squeezenet1_1", weights=weights, num_classes=5).load(READER, Path())


def test_the_old_names_in_published_densenets_are_understood(tmp_path: Path) -> None:
    net = torchvision.models.densenet121()
    old = {
        key.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.")
        if "denselayer" in key
        else key: value
        for key, value in net.state_dict().items()
    }
    weights = saved(old, tmp_path / "densenet.pth")
    model = TorchvisionModel(name="densenet121", weights=weights).load(READER, Path())
    for key, value in net.state_dict().items():
        assert model.module.state_dict()[key].equal(value), key


def test_auxiliary_heads_are_only_for_training(tmp_path: Path) -> None:
    net = torchvision.models.googlenet(transform_input=True, aux_logits=True, init_weights=False)
    weights = saved(net.state_dict(), tmp_path / find_weights_by_name("googlenet", "DEFAULT").file_name)
    model = TorchvisionModel(name="googlenet", weights=weights).load(READER, Path())
    assert not [key for key in model.module.state_dict() if key.startswith("aux")]
    x = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(model.module(x), net.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet50", "DEFAULT"),
        ("googlenet", "IMAGENET1K_V1"),
        ("inception_v3", "IMAGENET1K_V1"),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
        ("maxvit_t", "IMAGENET1K_V1"),
        ("vgg16", "IMAGENET1K_FEATURES"),
        ("swin_v2_t", "Swin_V2_T_Weights.IMAGENET1K_V1"),
    ],
)
def test_architectures_are_built_as_their_published_weights_want_them(name: str, weights: str) -> None:
    published = find_weights_by_name(name, weights)
    with torch.device("meta"):
        module = build_torchvision(name, "model.name", published.arguments)
    counted = sum(part.numel() for key, part in module.named_parameters() if not (name == "googlenet" and "aux" in key))
    member = torchvision.models.get_model_weights(name)[weights.rpartition(".")[2]]
    assert counted == member.meta["num_params"]
    assert published.preprocess is not None
    assert find_weights_by_file(name, published.file_name) == published


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("IMAGENET1K_V3", "did you mean IMAGENET1K_V"),
        ("imagenet1k_v1", "did you mean IMAGENET1K_V1"),
        ("ResNet18_Weights.DEFAULT", "there are|did you mean"),
        ("nonsense", "there are IMAGENET1K_V1"),
    ],
)
def test_weights_that_torchvision_does_not_publish(weights: str, said: str) -> None:
    with pytest.raises(InvalidJob, match=said):
        TorchvisionModel(name="resnet50", weights=weights).load(READER, Path())
    with pytest.raises(InvalidJob, match=r"did you mean resnet"):
        TorchvisionModel(name="resnet51", weights=weights).load(READER, Path())


def test_weights_are_a_name_or_a_path_beside_the_job_file(tmp_path: Path) -> None:
    def weights(text: str) -> str | None:
        document = {"name": "resnet50", "weights": text}
        return TorchvisionModel.model_validate(document, context={"base": tmp_path}).weights

    assert weights("IMAGENET1K_V2") == "IMAGENET1K_V2"
    assert weights("ResNet50_Weights.DEFAULT") == "ResNet50_Weights.DEFAULT"
    assert weights("mine.pth") == str(tmp_path / "mine.pth")
    assert weights("models/mine") == str(tmp_path / "models" / "mine")
    assert weights("s3://models/mine.safetensors") == "s3://models/mine.safetensors"
    with pytest.raises(ValidationError, match="credentials"):
        weights("https://me:secret@example.org/mine.pth")
    with pytest.raises(ValidationError, match="weights must be given"):
        TorchvisionModel(name="resnet50")
    with pytest.raises(ValidationError, match="exclude each other"):
        TorchvisionModel(name="resnet50", weights="DEFAULT", seed=1)
    with pytest.raises(ValidationError, match="module:attribute"):
        CheckpointModel(architecture="net.py:small()", weights="w.pt")


def test_the_cheap_check_looks_for_files_and_mirrors(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"model\.weights: there is no file"):
        TorchvisionModel(name="resnet50", weights=str(tmp_path / "absent.pth")).check(READER, tmp_path)
    with pytest.raises(InvalidJob, match=r"model\.mirror: .*absent"):
        TorchvisionModel(name="resnet50", weights="DEFAULT", mirror=str(tmp_path / "absent/")).check(READER, tmp_path)
    (tmp_path / "some.pth").touch()
    TorchvisionModel(name="resnet50", weights="DEFAULT", mirror=str(tmp_path)).check(READER, tmp_path)
    TorchvisionModel(name="resnet50", weights="DEFAULT").check(READER, tmp_path)


# ---------------------------------------------------------------------------------------- where published files lie

DATA = b"weights as published"
FILE = f"tiny-{hashlib.sha256(DATA).hexdigest()[:8]}.pth"


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        code = {"/503/": 503, "/404/": 404}.get(self.path.removesuffix(FILE), 200)
        body = b"something else" if self.path.startswith("/wrong/") else DATA
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) + (5 if self.path.startswith("/cut/") else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], PublishedWeights]]:
    """torchvision's weight server, played on this machine; torch's cache in a folder of the test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        port = server.server_address[1]
        yield lambda way: PublishedWeights("Tiny_Weights.V1", f"http://127.0.0.1:{port}/{way}/{FILE}", None, None, {})
        server.shutdown()
        thread.join()


def test_published_files_come_from_the_web_once_and_from_the_cache_then(
    web: Callable[[str], PublishedWeights], tmp_path: Path
) -> None:
    weights = web("well")
    assert fetch_weights(weights, READER, None) == (DATA, weights.url)
    cached = tmp_path / "torch" / "hub" / "checkpoints" / FILE
    assert [file.name for file in cached.parent.iterdir()] == [FILE]
    assert fetch_weights(web("404"), READER, None) == (DATA, str(cached))
    cached.write_bytes(b"damaged")
    with pytest.raises(InvalidJob, match="is not what torchvision published"):
        fetch_weights(weights, READER, None)


@pytest.mark.parametrize(
    ("way", "kind"), [("503", Unavailable), ("404", InvalidJob), ("wrong", InvalidJob), ("cut", Unavailable)]
)
def test_what_the_web_may_answer(
    way: str, kind: type[Exception], web: Callable[[str], PublishedWeights], tmp_path: Path
) -> None:
    with pytest.raises(kind):
        fetch_weights(web(way), READER, None)
    assert not (tmp_path / "torch").exists()


def test_a_mirror_holds_files_under_their_own_names(web: Callable[[str], PublishedWeights], tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with pytest.raises(InvalidJob, match=rf"model\.mirror, for Tiny_Weights.V1 .*there is no file .*{FILE}"):
        fetch_weights(web("well"), READER, str(mirror))
    (mirror / FILE).write_bytes(DATA)
    assert fetch_weights(web("well"), READER, f"{mirror}/") == (DATA, str(mirror / FILE))
    (mirror / FILE).write_bytes(b"something else")
    with pytest.raises(InvalidJob, match="copy it again from"):
        fetch_weights(web("well"), READER, str(mirror))


def test_a_machine_with_no_way_out_is_told_how_to_bring_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(Unavailable) as caught:
        TorchvisionModel(name="resnet18", weights="DEFAULT").load(READER, tmp_path)
    for words in (
        find_weights_by_name("resnet18", "DEFAULT").file_name,
        "model.mirror",
        "model.weights",
        "ResNet18_Weights.IMAGENET1K_V1",
    ):
        assert words in caught.value.message


@pytest.mark.parametrize("file", ["cifar10_resnet20/job.yaml", "imagenet_resnet50.yaml", "embed_resnet50.yaml"])
def test_the_jobs_that_come_along_are_valid(file: str) -> None:
    Job.from_file(JOBS / file)
