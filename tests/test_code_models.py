"""Models whose file is code: whole pickled modules, TorchScript, programs of torch.export and compiled packages."""

from __future__ import annotations

import io
import json
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from formats import FORMATS, NET, Built, example, net, outputs, trusted
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.inference.devices import pick_device
from batchjob.models.exported import ExportedModel
from batchjob.models.file_format import detect_format
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.pickle import PickleModel
from batchjob.models.torchscript import TorchScriptModel
from batchjob.storage.reader import Reader

READER = Reader()
EIGHT = example(8)


def pickled(file: Path, **more: Any) -> LoadedModel:
    model = PickleModel.model_validate(trusted({"weights": str(file), **more}, file))
    model.check(READER, file.parent)
    return model.load(READER, file.parent)


def scripted(file: Path, **more: Any) -> LoadedModel:
    return TorchScriptModel.model_validate(trusted({"weights": str(file), **more}, file)).load(READER, file.parent)


def exported(file: Path, **more: Any) -> LoadedModel:
    return ExportedModel.model_validate(trusted({"weights": str(file), **more}, file)).load(READER, file.parent)


def refused(load: Callable[..., LoadedModel], file: Path, **more: Any) -> str:
    with pytest.raises(InvalidJob) as caught:
        load(file, **more)
    assert str(file) in caught.value.message or caught.value.message.startswith("model.")
    return caught.value.message


# ----------------------------------------------------------------------------------------------------------- pickle


def saved(content: Any, folder: Path, **more: Any) -> Path:
    torch.save(content, folder / "net.pt", **more)
    return folder / "net.pt"


def as_saved_by(module: str, source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The names of a module that stands under that name while something is saved."""
    standing = ModuleType(module)
    monkeypatch.setitem(sys.modules, module, standing)
    exec(source, vars(standing))  # it plays the user's training script
    return standing


def test_classes_are_found_beside_the_job_file_and_no_import_changes(tmp_path: Path) -> None:
    built = FORMATS["pickle"].build(tmp_path, 1)
    assert built.file is not None
    path, modules = list(sys.path), set(sys.modules)
    module = pickled(built.file).module
    assert type(module).__module__.endswith(".net")
    assert type(module).__module__ != "net"
    assert sys.path == path
    assert "net" not in sys.modules
    assert {name for name in set(sys.modules) - modules if not name.startswith(("_batchjob_folder_", "torch"))} == set()


def test_the_digest_follows_the_class_too(tmp_path: Path) -> None:
    file = FORMATS["pickle"].build(tmp_path, 1).file
    assert file is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "net.py").write_text(NET + "\n# changed\n")
    other = (tmp_path / "other" / "net.pt").write_bytes(file.read_bytes())
    assert other
    assert pickled(file).digest != pickled(tmp_path / "other" / "net.pt").digest
    plain = saved(nn.Conv2d(3, 4, 3), tmp_path)
    assert pickled(plain).digest == trusted({}, plain)["sha256"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_module_of_torch_alone(legacy: bool, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Flatten()).train()
    found = pickled(saved(module, tmp_path, _use_new_zipfile_serialization=not legacy)).module
    torch.testing.assert_close(outputs(found, EIGHT), outputs(module.eval(), EIGHT), rtol=0, atol=0)


def test_the_wrapper_of_several_gpus_is_taken_off(tmp_path: Path) -> None:
    assert isinstance(pickled(saved(nn.DataParallel(nn.Conv2d(3, 4, 3)), tmp_path)).module, nn.Conv2d)


def test_a_model_that_a_script_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = as_saved_by("__main__", NET, monkeypatch)
    module = script.seeded(1)
    file = saved(module, tmp_path)
    monkeypatch.undo()
    said = refused(pickled, file)
    assert "names Net of the script that saved it" in said
    assert "model.main" in said
    assert "there is no module train in" in refused(pickled, file, main="train")
    (tmp_path / "train.py").write_text(NET)
    found = pickled(file, main="train").module
    torch.testing.assert_close(outputs(found, EIGHT), outputs(module, EIGHT), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (None, "names classes of the module gone_net, which is neither beside the job file nor installed"),
        ("class Other: pass", "gone_net.py: has no 'Net'"),
        ("import no_such_package", "gone_net.py:1: does not load: ModuleNotFoundError"),
    ],
)
def test_a_class_that_is_not_found(
    beside: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(as_saved_by("gone_net", NET, monkeypatch).seeded(1), tmp_path)
    monkeypatch.undo()
    if beside is not None:
        (tmp_path / "gone_net.py").write_text(beside)
    with pytest.raises(InvalidJob) as caught:
        pickled(file)
    assert said in caught.value.message


class Options:
    """Stands for what training scripts put beside weights."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": nn.Linear(2, 2).state_dict(), "args": Options()}, "holds a dict (state_dict, args) and no mod"),
        (Options(), "holds a Options and no module"),
    ],
)
def test_what_is_no_module(content: Any, said: str, tmp_path: Path) -> None:
    assert said in refused(pickled, saved(content, tmp_path))


# ------------------------------------------------------------------------------------------------------ TorchScript


def script_file(module: nn.Module, file: Path, *, freeze: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        made = (
            torch.jit.freeze(torch.jit.script(module)) if freeze else torch.jit.trace(module, EIGHT, check_trace=False)
        )
        torch.jit.save(made, file)
    return file


def test_it_is_said_that_torchscript_is_deprecated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = scripted(script_file(net(tmp_path, 1), tmp_path / "net.pt"))
    assert "torch.export replaces it" in caplog.text
    assert not loaded.eager


def test_a_frozen_archive(tmp_path: Path) -> None:
    module = net(tmp_path, 1)
    found = scripted(script_file(module, tmp_path / "net.pt", freeze=True)).module
    torch.testing.assert_close(outputs(found, EIGHT), outputs(module, EIGHT), rtol=0, atol=1e-6)


def test_a_trace_in_training_mode_is_refused(tmp_path: Path) -> None:
    file = script_file(nn.Sequential(nn.Flatten(), nn.Dropout()).train(), tmp_path / "net.pt")
    assert "was traced in training mode (dropout is at work); call model.eval()" in refused(scripted, file)


def test_an_archive_that_is_broken(tmp_path: Path) -> None:
    whole = script_file(net(tmp_path, 1), tmp_path / "net.pt")
    broken = repacked(whole, tmp_path / "broken.pt", "/data.pkl", lambda data: data[:20])
    assert "that this torch does not load" in refused(scripted, broken)


def repacked(source: Path, file: Path, ending: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of an archive in which the entries with that ending are changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith(ending) else data)
    return file


# --------------------------------------------------------------------------------------------------------- programs


class Several(nn.Module):
    """Returns more than one thing, or takes more than one."""

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        mean = pixel_values.mean((2, 3))
        return {"mean": mean if mask is None else mean * mask, "peak": pixel_values.amax((2, 3))}


class Half(nn.Module):
    """Takes half precision only."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))


class Ruler(nn.Module):
    """Makes a tensor of its own on a device that the graph remembers."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3)) + torch.arange(3, device=pixels.device)


def program_file(module: nn.Module, file: Path, *inputs: Any, shapes: Any = None, **keywords: Any) -> Path:
    torch.export.save(torch.export.export(module, inputs, keywords, dynamic_shapes=shapes), file)
    return file


def test_a_program_of_a_fixed_batch_says_so(tmp_path: Path) -> None:
    loaded = exported(program_file(net(tmp_path, 1), tmp_path / "net.pt2", example(6)))
    assert loaded.batch_size == 6
    free = exported(program_file(Half(), tmp_path / "free.pt2", example(6), shapes=({0: torch.export.Dim.AUTO},)))
    assert free.batch_size is None


def test_images_of_another_size_are_told_from_those_it_takes(tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim.AUTO},)
    module = exported(program_file(net(tmp_path, 1), tmp_path / "net.pt2", EIGHT, shapes=shapes)).module
    with pytest.raises(InvalidJob, match=r"takes \[any, 3, 16, 16\] and got \[2, 3, 20, 16\]; correct preprocess"):
        module(torch.zeros(2, 3, 20, 16))


def test_an_input_by_keyword_and_an_output_by_name(tmp_path: Path) -> None:
    file = program_file(Several(), tmp_path / "net.pt2", pixel_values=EIGHT)
    torch.testing.assert_close(exported(file, output="peak").module(EIGHT), EIGHT.amax((2, 3)))
    with pytest.raises(InvalidJob, match="a dict with the keys 'mean', 'peak'"):
        exported(file, output="logits").module(EIGHT)


@pytest.mark.parametrize(
    ("module", "inputs", "said"),
    [
        (Several(), (EIGHT, torch.ones(8, 1)), "takes 2 inputs (pixel_values, mask), not one batch of images"),
        (Half(), (EIGHT.half(),), "takes torch.float16 pixels; export it with"),
        (nn.Linear(3, 2), (torch.ones(8, 3),), "takes [8, 3], not images [n, c, h, w]"),
        (nn.Sequential(nn.Dropout()).train(), (EIGHT,), "was exported in training mode (dropout is at work)"),
    ],
)
def test_programs_that_do_not_take_images(
    module: nn.Module, inputs: tuple[Any, ...], said: str, tmp_path: Path
) -> None:
    assert said in refused(exported, program_file(module, tmp_path / "net.pt2", *inputs))


def test_a_program_that_is_broken(tmp_path: Path) -> None:
    whole = program_file(Half(), tmp_path / "net.pt2", EIGHT)
    broken = repacked(whole, tmp_path / "broken.pt2", "models/model.json", lambda data: data[:50])
    assert "that this torch does not load" in refused(exported, broken)


def test_a_program_moves_with_the_tensors_it_makes(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    module = exported(program_file(Ruler(), tmp_path / "net.pt2", EIGHT)).module.to("cuda")
    torch.testing.assert_close(module(EIGHT.cuda()).cpu(), Ruler()(EIGHT), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- packages


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if FORMATS["exported-aoti"].missing():
        pytest.skip(FORMATS["exported-aoti"].missing())
    return FORMATS["exported-aoti"].build(tmp_path_factory.mktemp("aoti"), 1)


def for_machine(package: Built, file: Path, **metadata: str) -> Path:
    assert package.file is not None
    return repacked(
        package.file, file, "metadata.json", lambda data: json.dumps({**json.loads(data), **metadata}).encode()
    )


def test_a_package_runs_on_the_device_it_was_compiled_for(package: Built) -> None:
    assert package.file is not None
    loaded = exported(package.file)
    assert (loaded.devices, loaded.eager, loaded.batch_size) == (("cpu",), False, None)
    with pytest.raises(InvalidJob, match=r"takes \[any, 3, 16, 16\] and got \[2, 3, 16, 20\]"):
        loaded.module(torch.zeros(2, 3, 16, 20))
    turned = EIGHT.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loaded.module(turned), loaded.module(EIGHT), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"AOTI_MACHINE": "riscv64"}, "was compiled for riscv64, not "),
        ({"AOTI_PLATFORM": "plan9"}, "was compiled for plan9, not "),
    ],
)
def test_a_package_for_another_machine(metadata: dict[str, str], said: str, package: Built, tmp_path: Path) -> None:
    assert said in refused(exported, for_machine(package, tmp_path / "net.pt2", **metadata))


def test_a_package_for_a_processor_with_more_instructions(
    package: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": False})
    file = for_machine(package, tmp_path / "net.pt2", AOTI_CPU_ISA="AVX512")
    assert "was compiled for AVX512, which this processor lacks" in refused(exported, file)


def test_a_package_for_a_gpu_that_is_not_there(package: Built, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    loaded = exported(for_machine(package, tmp_path / "net.pt2", AOTI_DEVICE_KEY="cuda"))
    assert loaded.devices == ("cuda",)
    with pytest.raises(InvalidJob, match="it runs on cuda only, which is not there"):
        pick_device("auto", loaded.devices)
    with pytest.raises(InvalidJob, match="was compiled for cuda and cannot run on cpu"):
        loaded.module(EIGHT)


def test_a_package_that_is_broken(package: Built, tmp_path: Path) -> None:
    assert package.file is not None
    for ending, said in (
        ("metadata.json", "is no whole AOTInductor package"),
        (".so", "that this torch does not load"),
    ):
        broken = repacked(package.file, tmp_path / "net.pt2", ending, lambda data: data[:40])
        assert said in refused(exported, broken)


def test_a_package_without_its_source_is_refused(package: Built, tmp_path: Path) -> None:
    assert package.file is not None
    bare = repacked(package.file, tmp_path / "net.pt2", ".wrapper.cpp", lambda data: b"")
    assert "brings no generated source that tells its inputs" in refused(exported, bare)


# ------------------------------------------------------------------------------------------------------------ kinds


def test_old_and_new_files_of_tensors_are_told_from_modules() -> None:
    for legacy in (False, True):
        for content, kind in ((nn.Linear(2, 2).state_dict(), "state_dict"), (nn.Linear(2, 2), "pickled_module")):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
            assert detect_format(buffer.getvalue()) == kind
