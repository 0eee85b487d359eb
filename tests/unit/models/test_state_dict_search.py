"""Search of a checkpoint for the weights that fit: nests and prefixes of trainers, and files in which two fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.models.checkpoint import CheckpointModel
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.timm import TimmModel
from batchjob.models.torchvision import TorchvisionModel
from batchjob.storage.reader import Reader

READER = Reader()
NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))

def branches():
    return nn.ModuleDict({"encoder": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
"""


def make_net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))


def weights(prefix: str = "", seed: int = 1) -> dict[str, Any]:
    return {prefix + key: value for key, value in make_net(seed).state_dict().items()}


def load(content: Any, folder: Path, architecture: str = "net:build", **settings: Any) -> LoadedModel:
    (folder / "net.py").write_text(NET)
    torch.save(content, folder / "w.pth")
    settings |= {"architecture": architecture, "weights": str(folder / "w.pth")}
    return CheckpointModel.model_validate(settings).load(READER, folder)


def find_seed(model: LoadedModel) -> int:
    """Return the seed of the weights that were loaded."""
    state = model.module.state_dict()
    nets = {seed: weights("", seed) for seed in (1, 2)}
    (found,) = [seed for seed, net in nets.items() if all(torch.equal(state[key], net[key]) for key in net)]
    return found


OTHERS = {"loss.weight": torch.ones(4), "optimizer.step": torch.ones(())}
# Content of a file, and the note on the place that was found.
PLACES: dict[str, tuple[Callable[[], Any], str | None]] = {
    "as it is": (weights, None),
    "state_dict": (lambda: {"state_dict": weights()}, "under state_dict"),
    "Lightning": (lambda: {"state_dict": weights("model.")}, "under state_dict, 'model.' cut off"),
    "beside a loss": (
        lambda: {"state_dict": weights("net.") | OTHERS},
        "'net.' cut off; 2 other tensors left aside (state_dict.loss.weight, state_dict.optimizer.step)",
    ),
    "compiled": (lambda: {"state_dict": weights("model._orig_mod.")}, "under state_dict, 'model.' cut off"),
    "pytorch-cifar": (lambda: {"net": weights("module."), "acc": 93.0}, "under net, 'module.' cut off"),
    "EMA alone": (lambda: {"ema_state_dict": weights()}, "under ema_state_dict"),
    "DeepSpeed": (lambda: {"module": weights(), "ds_version": "0.1"}, "under module"),
    "MoCo": (lambda: {"state_dict": weights("module.encoder_q.")}, "'module.encoder_q.' cut off"),
    "DINO": (
        lambda: {"teacher": weights("backbone.") | {"head.weight": torch.ones(2)}, "epoch": 3},
        "under teacher, 'backbone.' cut off; 1 other tensor left aside (teacher.head.weight)",
    ),
    "BYOL": (lambda: weights("online_encoder.net.") | {"step": torch.ones(1)}, "'online_encoder.net.' cut off"),
    "two deep": (lambda: {"callbacks": {"avg": {"weights": weights("m.")}}}, "under callbacks.avg.weights, 'm.' cut"),
    "BasicSR": (lambda: {"params_ema": weights()}, "under params_ema"),
    "FSDP": (
        lambda: {"model": {key.replace("0.", "_fsdp_wrapped_module.0.", 1): v for key, v in weights().items()}},
        "under model",
    ),
    "some names with module.": (
        lambda: {("module." if key.startswith("0") else "") + key: v for key, v in weights().items()},
        None,
    ),
    "module. in the middle": (
        lambda: {"state_dict": {"net." + key.replace(".", ".module.", 1): v for key, v in weights().items()}},
        "'net.' cut off",
    ),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(make_net()).state_dict(), "'module.' cut off"),
    "equal twice": (lambda: {"state_dict": weights(), "best": weights()}, "under state_dict"),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_one_place_that_fits_is_found(name: str, tmp_path: Path) -> None:
    make_content, note = PLACES[name]
    model = load(make_content(), tmp_path)
    assert find_seed(model) == 1
    if note is None:
        assert model.notes == ()
    else:
        assert model.notes[0].startswith("weights: w.pth ")
        assert note in model.notes[0]


def test_parts_of_a_module_in_dicts_of_their_own_fit_together(tmp_path: Path) -> None:
    parts = {"encoder": nn.Linear(3, 4).state_dict(), "head": nn.Linear(4, 2).state_dict()}
    state = load(parts, tmp_path, "net:branches").module.state_dict()
    assert torch.equal(state["encoder.weight"], parts["encoder"]["weight"])
    assert torch.equal(state["head.bias"], parts["head"]["bias"])


@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        (
            {"state_dict": weights(), "state_dict_ema": weights(seed=2)},
            ["{prefer: ema} for {key: state_dict_ema, strip: ''}", "{prefer: plain} for {key: state_dict, strip: ''}"],
        ),
        (
            {"state_dict": weights("encoder_q.") | weights("encoder_k.", 2)},
            ["{prefer: ema} for {key: state_dict, strip: 'encoder_k.'}"],
        ),
        (
            {"student": weights("backbone."), "teacher": weights("backbone.", 2)},
            ["fits net:build in two places", "{key: student, strip: 'backbone.'}"],
        ),
        ({"first": weights(), "second": weights(seed=2)}, ["write model.checkpoint: {key: first, strip: ''} or"]),
        (weights() | {"ema": weights(seed=2)}, ["{key: '.', strip: ''}", "{key: ema, strip: ''}"]),
        (weights() | weights("copy.", 2), ["{key: '.', strip: ''}", "{key: '.', strip: 'copy.'}"]),
    ],
)
def test_a_file_in_which_two_fit_is_refused_until_the_job_says_which(
    content: Any, phrases: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InvalidJob) as caught:
        load(content, tmp_path)
    for phrase in ("fits net:build in two places with other weights", *phrases):
        assert phrase in caught.value.message


@pytest.mark.parametrize(
    ("content", "checkpoint", "seed"),
    [
        ({"state_dict": weights(), "model_ema": weights("module.", 2)}, {"prefer": "ema"}, 2),
        ({"state_dict": weights(), "model_ema": weights("module.", 2)}, {"prefer": "plain"}, 1),
        ({"state_dict": weights()}, {"prefer": "ema"}, 1),
        ({"params": weights(), "params_ema": weights(seed=2)}, {"key": "params_ema"}, 2),
        ({"a": weights(), "b": {"c": weights(seed=2)}}, {"key": "b"}, 2),
        ({"a": weights(), "b": {"c": weights(seed=2)}}, {"key": "b.c", "strip": ""}, 2),
        (weights("student.") | weights("teacher.", 2), {"strip": "teacher"}, 2),
        (weights() | {"ema": weights(seed=2)}, {"key": ".", "strip": ""}, 1),
        ({"state_dict": weights(), "model": weights(seed=2)}, {"prefer": "plain"}, 1),
    ],
)
def test_the_job_may_say_which(content: Any, checkpoint: dict[str, Any], seed: int, tmp_path: Path) -> None:
    assert find_seed(load(content, tmp_path, checkpoint=checkpoint)) == seed


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"key": "ema"}, "model.checkpoint.key: ema holds no tensors; they are under state_dict, extra"),
        ({"strip": "net."}, "model.checkpoint says strip: 'net.', where no name is one of the model's; there is model"),
        ({"key": "extra"}, "model.checkpoint says key: 'extra', where no name"),
    ],
)
def test_a_place_that_is_not_there_is_named(checkpoint: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob) as caught:
        load({"state_dict": weights("model."), "extra": {"x": torch.ones(1)}}, tmp_path, checkpoint=checkpoint)
    assert message in caught.value.message


def test_a_prefix_on_half_of_the_names_is_refused(tmp_path: Path) -> None:
    half = {("backbone." if key.startswith(("0", "1")) else "head.") + key: v for key, v in weights().items()}
    with pytest.raises(InvalidJob) as caught:
        load({"state_dict": half}, tmp_path)
    assert "(under state_dict, 'backbone.' cut off): missing in the file: 3.weight, 3.bias" in caught.value.message


def test_the_digest_covers_a_place_that_other_versions_would_not_choose(tmp_path: Path) -> None:
    both = {"state_dict": weights(), "state_dict_ema": weights(seed=2)}
    plain, ema = (load(both, tmp_path, checkpoint={"prefer": prefer}).digest for prefer in ("plain", "ema"))
    assert plain != ema


@pytest.fixture
def timm_file(tmp_path: Path) -> Path:
    """File as timm's train.py writes it, with plain and averaged weights."""
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(timm.create_model("test_resnet", num_classes=5))
    file = tmp_path / "model_best.pth.tar"
    torch.save({"epoch": 9, "state_dict": nets[0].state_dict(), "state_dict_ema": nets[1].state_dict()}, file)
    return file


def test_timm_loads_what_timm_itself_loads(timm_file: Path) -> None:
    settings = {"name": "test_resnet", "num_classes": 5, "weights": str(timm_file)}
    model = TimmModel.model_validate(settings).load(READER, timm_file.parent)
    theirs = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(timm_file)).state_dict()
    ours = model.module.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert "under state_dict_ema; it also fits model.checkpoint: {key: state_dict, strip: ''}" in model.notes[0]


def test_plans_of_earlier_versions_keep_the_plain_weights(timm_file: Path) -> None:
    document = {
        "input": {"type": "prefix", "uri": str(timm_file.parent)},
        "model": {"type": "timm", "name": "test_resnet", "num_classes": 5, "weights": str(timm_file)},
        "task": {"type": "raw"},
        "output": {"uri": str(timm_file.parent / "out")},
    }
    job = Job.model_validate(document)
    now, before = (some.model.load(READER, timm_file.parent) for some in (job, job.with_defaults({})))
    plain = torch.load(timm_file)["state_dict"]
    assert all(torch.equal(before.module.state_dict()[key], value) for key, value in plain.items())
    assert now.digest != before.digest
    assert job.with_defaults(job.resolved_settings()).model == job.model


def test_torchvision_files_have_places_too(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = TorchvisionModel(name="squeezenet1_1", seed=3).load(READER, tmp_path).module.state_dict()
    torch.save({"model_ema": {f"module.{key}": v for key, v in state.items()}, "epoch": 1}, tmp_path / "w.pth")
    model = TorchvisionModel(name="squeezenet1_1", weights=str(tmp_path / "w.pth")).load(READER, tmp_path)
    assert all(torch.equal(model.module.state_dict()[key], value) for key, value in state.items())
    assert model.notes == ("weights: w.pth under model_ema, 'module.' cut off",)


def test_random_weights_are_said() -> None:
    for model in (TorchvisionModel(name="squeezenet1_1", seed=3), TimmModel(name="test_resnet", seed=3)):
        assert model.load(READER, Path.cwd()).notes == (
            "weights: random (model.seed: 3); its predictions mean nothing",
        )
