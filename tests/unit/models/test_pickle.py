"""`type: pickle`: whole modules saved by `torch.save`, with classes beside the job file."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.pickle import PickleModel
from batchjob.storage.reader import Reader
from tests.support.saved_models import FORMATS, NET_SOURCE, catch_load_error, make_pixels, run_in_batches, with_trust

READER = Reader()
PIXELS = make_pixels(8)


def load(file: Path, **settings: Any) -> LoadedModel:
    model = PickleModel.model_validate(with_trust({"weights": str(file), **settings}, file))
    model.check(READER, file.parent)
    return model.load(READER, file.parent)


def save(content: Any, folder: Path, **options: Any) -> Path:
    torch.save(content, folder / "net.pt", **options)
    return folder / "net.pt"


def import_source(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import source code as a module of that name, as the user's training script has it when it saves a model."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(source, vars(module))
    return module


def test_classes_are_found_beside_the_job_file_without_side_effects_on_imports(tmp_path: Path) -> None:
    saved = FORMATS["pickle"].save(tmp_path, 1)
    assert saved.file is not None
    path, modules = list(sys.path), set(sys.modules)
    module = load(saved.file).module
    assert type(module).__module__.endswith(".net")
    assert type(module).__module__ != "net"
    assert sys.path == path
    assert "net" not in sys.modules
    assert {name for name in set(sys.modules) - modules if not name.startswith(("_batchjob_folder_", "torch"))} == set()


def test_digest_covers_the_source_of_the_class(tmp_path: Path) -> None:
    file = FORMATS["pickle"].save(tmp_path, 1).file
    assert file is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "net.py").write_text(NET_SOURCE + "\n# changed\n")
    shutil.copy(file, tmp_path / "other" / "net.pt")
    assert load(file).digest != load(tmp_path / "other" / "net.pt").digest
    plain = save(nn.Conv2d(3, 4, 3), tmp_path)
    assert load(plain).digest == with_trust({}, plain)["sha256"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_module_without_user_classes_loads(legacy: bool, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Flatten()).train()
    loaded = load(save(module, tmp_path, _use_new_zipfile_serialization=not legacy)).module
    torch.testing.assert_close(run_in_batches(loaded, PIXELS), run_in_batches(module.eval(), PIXELS), rtol=0, atol=0)


def test_data_parallel_wrapper_is_removed(tmp_path: Path) -> None:
    assert isinstance(load(save(nn.DataParallel(nn.Conv2d(3, 4, 3)), tmp_path)).module, nn.Conv2d)


def test_model_saved_by_a_script_needs_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = import_source("__main__", NET_SOURCE, monkeypatch)
    module = script.seeded_net(1)
    file = save(module, tmp_path)
    monkeypatch.undo()
    message = catch_load_error(load, file)
    assert "names Net of the script that saved it" in message
    assert "model.main" in message
    assert "there is no module train in" in catch_load_error(load, file, main="train")
    (tmp_path / "train.py").write_text(NET_SOURCE)
    loaded = load(file, main="train").module
    torch.testing.assert_close(run_in_batches(loaded, PIXELS), run_in_batches(module, PIXELS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "names classes of the module gone_net, which is neither beside the job file nor installed"),
        ("class Other: pass", "gone_net.py: has no 'Net'"),
        ("import no_such_package", "gone_net.py:1: does not load: ModuleNotFoundError"),
    ],
)
def test_class_that_is_not_found_is_refused(
    source: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(import_source("gone_net", NET_SOURCE, monkeypatch).seeded_net(1), tmp_path)
    monkeypatch.undo()
    if source is not None:
        (tmp_path / "gone_net.py").write_text(source)
    with pytest.raises(InvalidJob) as caught:
        load(file)
    assert message in caught.value.message


class TrainingOptions:
    """Object that training scripts save beside weights."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict": nn.Linear(2, 2).state_dict(), "args": TrainingOptions()},
            "holds a dict (state_dict, args) and no mod",
        ),
        (TrainingOptions(), "holds a TrainingOptions and no module"),
    ],
)
def test_file_without_a_module_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    assert message in catch_load_error(load, save(content, tmp_path))
