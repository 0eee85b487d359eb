"""`type: checkpoint`: weights from real files, and a message for each that does not fit."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.models.checkpoint import CheckpointModel
from batchjob.storage.reader import Reader

JOBS = Path(__file__).parents[3] / "jobs"
READER = Reader()


NET_SOURCE = """
from torch import nn

def lazy(num_classes=3, width=4):
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

def sized(classes=2):
    return nn.Linear(2, classes)

def raises():
    return {}["no such key"]

def nothing():
    nn.Linear(2, 2)

READY = nn.Linear(2, 2)
NUMBER = 7
"""


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    """Folder of a job file, with `net.py` in it."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "net.py").write_text(NET_SOURCE)
    return folder


def make_small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))


def save(content: Any, path: Path, legacy: bool = False) -> str:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def make_settings(weights: str, architecture: str = "net:small", **settings: Any) -> CheckpointModel:
    return CheckpointModel(architecture=architecture, weights=weights, **settings)


def make_prefixed(prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in make_small().state_dict().items()}


def test_resnet20_checkpoint_reaches_the_published_accuracy(test_data: Path) -> None:
    job = Job.from_file(JOBS / "cifar10_resnet20" / "job.yaml")
    weights = str(test_data / "cifar10" / "resnet20-12fca82f.th")
    model = job.model.model_copy(update={"weights": weights}).load(READER, job.folder)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    correct = rows = 0
    for label, folder in enumerate(sorted((test_data / "cifar10" / "images").iterdir())):
        pixels = [
            torchvision.transforms.functional.to_tensor(Image.open(file).convert("RGB")) for file in folder.iterdir()
        ]
        with torch.inference_mode():
            predicted = model.module((torch.stack(pixels) - mean) / std).argmax(1)
        correct, rows = correct + int((predicted == label).sum()), rows + len(predicted)
    assert rows == 1000
    assert abs(correct - 804) <= 1


STATE_DICT_FORMS: dict[str, Callable[[], Any]] = {
    "bare": lambda: make_small().state_dict(),
    "state_dict beside other keys": lambda: {"state_dict": make_small().state_dict(), "best_prec1": 92.6, "epoch": 3},
    "model": lambda: {"model": make_small().state_dict(), "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda: {"model_state_dict": make_small().state_dict(), "loss": torch.tensor(1.0)},
    "twice nested": lambda: {"model": {"state_dict": make_small().state_dict()}},
    "module.": lambda: {"state_dict": make_prefixed("module.")},
    "_orig_mod.": lambda: make_prefixed("_orig_mod."),
    "module._orig_mod.": lambda: make_prefixed("module._orig_mod."),
    "_orig_mod.module.": lambda: make_prefixed("_orig_mod.module."),
    "data parallel": lambda: nn.DataParallel(make_small()).state_dict(),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(make_small()).state_dict(),
    "a count beside tensors": lambda: make_small().state_dict() | {"epoch": 3},
    "half precision": lambda: {key: value.half().float() for key, value in make_small().state_dict().items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", STATE_DICT_FORMS)
def test_state_dict_is_found_in_every_form(form: str, legacy: bool, job_folder: Path, tmp_path: Path) -> None:
    model = make_settings(save(STATE_DICT_FORMS[form](), tmp_path / "w.th", legacy)).load(READER, job_folder)
    x = torch.rand(2, 3, 8, 8)
    expected = make_small().eval()
    torch.testing.assert_close(model.module(x), expected(x), rtol=0, atol=1e-3 if form == "half precision" else 0)
    assert model.preprocess is None
    assert model.labels is None


def test_safetensors_with_prefixes_load_from_any_storage(job_folder: Path, tmp_path: Path) -> None:
    save_file(make_prefixed("module."), tmp_path / "w.safetensors")
    with fsspec.open("memory://weights/w.safetensors", "wb") as file:
        file.write((tmp_path / "w.safetensors").read_bytes())
    model = make_settings("memory://weights/w.safetensors").load(READER, job_folder)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model.module(x), make_small().eval()(x), rtol=0, atol=0)


def test_child_called_module_keeps_its_name(job_folder: Path, tmp_path: Path) -> None:
    for state in (
        {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)},
        {"module.module.weight": torch.ones(2, 2), "module.module.bias": torch.ones(2)},
    ):
        model = make_settings(save(state, tmp_path / "w.pt"), "net:Wrapper").load(READER, job_folder)
        assert model.module(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]


def test_lazy_layer_takes_its_shape_from_the_file(job_folder: Path, tmp_path: Path) -> None:
    model = make_settings(save(make_small().state_dict(), tmp_path / "w.pt"), "net:lazy").load(READER, job_folder)
    assert model.module(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_torchvision_architecture_with_arguments(tmp_path: Path) -> None:
    module = torchvision.models.squeezenet1_1(num_classes=5)
    model = make_settings(
        save(module.state_dict(), tmp_path / "w.pth"), "squeezenet1_1", num_classes=5, arguments={"dropout": 0.1}
    ).load(READER, tmp_path)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.module(x), module.eval()(x), rtol=0, atol=0)


def make_changed(*removed: str, **added: torch.Tensor) -> dict[str, Any]:
    return {key: value for key, value in make_small().state_dict().items() if key not in removed} | added


@pytest.mark.parametrize(
    ("content", "settings", "phrases"),
    [
        (
            lambda: make_changed("0.weight", "3.bias"),
            {},
            ["missing in the file: 0.weight, 3.bias", "model.architecture"],
        ),
        (lambda: make_changed(head=torch.ones(1)), {}, ["unknown to the model: head", "strict: false"]),
        (
            lambda: make_small().state_dict(),
            {"num_classes": 9},
            ["3.weight [3, 144] for [9, 144]", "model.num_classes: 3"],
        ),
        (lambda: make_small().state_dict(), {"arguments": {"width": 5}}, ["of another shape", "model.arguments"]),
        (lambda: {f"layer{n}.weight": torch.ones(1) for n in range(50)}, {}, ["layer5.weight and 44 more"]),
        (
            lambda: {"other": torch.ones(1)},
            {"strict": False},
            ["no key is known to the model: the file has other, and the model 0.weight"],
        ),
        (
            lambda: make_prefixed("") | make_prefixed("_orig_mod."),
            {},
            ["holds both 0.weight and _orig_mod.0.weight"],
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(
    content: Callable[[], Any], settings: dict[str, Any], phrases: list[str], job_folder: Path, tmp_path: Path
) -> None:
    model = make_settings(save(content(), tmp_path / "w.pt"), **settings)
    with pytest.raises(InvalidJob) as caught:
        model.load(READER, job_folder)
    for phrase in ["w.pt does not fit net:small", *phrases]:
        assert phrase in caught.value.message
    assert len(caught.value.message) < 1500


def test_strict_false_accepts_other_keys_and_logs_them(
    job_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = save(make_changed("3.bias", extra=torch.ones(1)), tmp_path / "w.pt")
    make_settings(weights, strict=False).load(READER, job_folder)
    assert "missing in the file: 3.bias; unknown to the model: extra" in caplog.text


class MaliciousObject:
    """Object that prints a text when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def make_torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(make_small().eval(), torch.rand(1, 3, 8, 8)), buffer)
    return buffer.getvalue()


def save_with_torch(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save_safetensors(tmp_path: Path) -> bytes:
    save_file(make_small().state_dict(), tmp_path / "scratch.safetensors")
    return (tmp_path / "scratch.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is:FutureWarning")
@pytest.mark.parametrize(
    ("make_data", "message"),
    [
        (
            lambda tmp: save_with_torch({"state_dict": MaliciousObject()}),
            "holds code (print) beside tensors: no code is loaded",
        ),
        (lambda tmp: save_with_torch(make_small()), "holds a whole module (torch.nn.modules.container.Sequential, "),
        (lambda tmp: pickle.dumps({"weights": MaliciousObject()}), "holds Python objects beside tensors"),
        (lambda tmp: make_torchscript(), "is a TorchScript archive"),
        (lambda tmp: b"", "is empty"),
        (lambda tmp: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (lambda tmp: b"<!DOCTYPE html><html><title>Not found</title></html>", "is a web page (Not found) and not a st"),
        (lambda tmp: save_with_torch(make_small().state_dict())[:900], "is a zip archive that is not whole"),
        (lambda tmp: save_safetensors(tmp)[:-100], "is no whole safetensors file"),
        (lambda tmp: save_with_torch(torch.ones(3)), "holds a Tensor and no state dict"),
        (lambda tmp: save_with_torch([torch.ones(3)]), "holds a list and no state dict"),
        (
            lambda tmp: save_with_torch({"epoch": 3, "net": {"lr": 0.1}}),
            "at no depth; its keys are epoch (int), net (dict); save",
        ),
        (lambda tmp: save_with_torch({"epoch": 3, "net": {"weight": torch.ones(1)}}), "file has net.weight, and"),
        (lambda tmp: save_with_torch({"0.weight": "tensor([1.])"}), "0.weight (str); save tensors: torch.save("),
        (lambda tmp: save_with_torch({"0.weight": np.ones(3)}), "0.weight (no tensor); save tensors: torch.save("),
    ],
)
def test_file_without_weights_is_explained(
    make_data: Callable[[Path], bytes],
    message: str,
    job_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "w.pt").write_bytes(make_data(tmp_path))
    with pytest.raises(InvalidJob) as caught:
        make_settings(str(tmp_path / "w.pt")).load(READER, job_folder)
    assert message in caught.value.message
    assert caught.value.message.startswith(f"model.weights: {tmp_path / 'w.pt'}")
    assert "code ran" not in capsys.readouterr().out


def test_check_finds_missing_weights_and_modules(job_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"model\.weights: there is no file .*absent\.pt"):
        make_settings(str(tmp_path / "absent.pt")).check(READER, job_folder)
    with pytest.raises(InvalidJob, match=r"model\.weights: there is no file .*absent\.pt"):
        make_settings(str(tmp_path / "absent.pt")).load(READER, job_folder)
    weights = save(make_small().state_dict(), tmp_path / "w.pt")
    make_settings(weights).check(READER, job_folder)
    with pytest.raises(InvalidJob, match=r"nest\.py: not there, for 'nest:small'; did you mean 'net'"):
        make_settings(weights, "nest:small").check(READER, job_folder)


def test_target_must_be_a_dotted_name() -> None:
    with pytest.raises(InvalidJob, match="module:attribute"):
        CheckpointModel(architecture="net.py:small()", weights="w.pt")


def test_digest_covers_the_weights_and_the_source(job_folder: Path, tmp_path: Path) -> None:
    weights = save(make_small().state_dict(), tmp_path / "w.pt")
    first = make_settings(weights).load(READER, job_folder).digest
    assert make_settings(weights).load(READER, job_folder).digest == first
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "net.py").write_text(NET_SOURCE + "\n# changed\n")
    assert make_settings(weights).load(READER, tmp_path / "other").digest != first
    save({"state_dict": make_small().state_dict()}, tmp_path / "w.pt")
    assert make_settings(weights).load(READER, job_folder).digest != first
    plain = save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "s.pt")
    digest = make_settings(plain, "squeezenet1_1").load(READER, job_folder).digest
    assert digest == hashlib.sha256(Path(plain).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("resnet49", {}, "did you mean resnet"),
        ("zzz", {}, "it has alexnet"),
        ("raft_small", {}, "no float model for classification, detection or segmentation"),
        ("quantized_resnet50", {}, "no float model for classification, detection or segmentation"),
        ("resnet18", {"arguments": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ("net:NUMBER", {}, "is an int; name a function"),
        ("net:small", {"arguments": {"depth": 3}}, "it takes (num_classes=3, width=4)"),
        ("net:small", {"arguments": {"num_classes": 3}, "num_classes": 3}, "keep one"),
        ("net:READY", {"arguments": {"depth": 3}}, "takes no model.arguments"),
        ("net:raises", {}, "raised KeyError: 'no such key'"),
        ("net:nothing", {}, "returned a NoneType; it must return a torch.nn.Module"),
    ],
)
def test_unknown_architecture_is_explained(
    architecture: str, settings: dict[str, Any], message: str, job_folder: Path, tmp_path: Path
) -> None:
    weights = save(make_small().state_dict(), tmp_path / "w.pt")
    with pytest.raises(InvalidJob) as caught:
        make_settings(weights, architecture, **settings).load(READER, job_folder)
    assert message in caught.value.message
    assert caught.value.message.startswith("model.architecture")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("net:fixed", "takes no num_classes; it takes (nothing); leave model.num_classes out"),
        ("net:sized", "takes no num_classes; it takes (classes=2); leave model.num_classes out"),
        ("net:READY", "is a module and takes no model.num_classes"),
    ],
)
def test_num_classes_that_the_architecture_does_not_take_is_refused(
    architecture: str, message: str, job_folder: Path, tmp_path: Path
) -> None:
    weights = save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InvalidJob) as caught:
        make_settings(weights, architecture, num_classes=2).load(READER, job_folder)
    assert message in caught.value.message


def test_head_of_another_size_names_what_the_function_takes(job_folder: Path, tmp_path: Path) -> None:
    weights = save(nn.Linear(2, 7).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InvalidJob, match=r"build it with 7 classes: by model\.arguments"):
        make_settings(weights, architecture="net:sized").load(READER, job_folder)


def test_a_folder_in_place_of_the_file_lists_its_files(job_folder: Path, tmp_path: Path) -> None:
    save(make_small().state_dict(), tmp_path / "model.pt")
    with pytest.raises(InvalidJob, match=r"is a folder; name a file; it holds model\.pt"):
        make_settings(str(tmp_path)).check(READER, job_folder)


def test_class_layer_of_a_torchvision_architecture_is_known(job_folder: Path, tmp_path: Path) -> None:
    module = torchvision.models.resnet18(num_classes=7)
    weights = save(module.state_dict(), tmp_path / "w.pt")
    model = make_settings(weights, architecture="resnet18", num_classes=7)
    assert model.load(READER, job_folder).class_layers == ("fc",)
