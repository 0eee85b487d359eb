"""Functions in place of `module:attribute`: kept by the name of their module, or by value with all that they use."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models, transforms

from batchjob import EmbeddingTask, InvalidJob, Job, Output, PrefixSource, Preprocess, PythonModel, PythonTask
from batchjob.functions.function_target import FunctionTarget
from batchjob.job.fingerprint import diff_fingerprints
from batchjob.user_code import load_target, source_digest

ANY_FOLDER = Path("/")


def make_build(width: int, scale: object = 1) -> Callable[[], nn.Module]:
    """Return a function that no module holds, so that it is kept by value."""

    def build(bias: bool = True) -> nn.Module:
        return nn.Linear(width, 2, bias=bias and bool(scale))

    return build


def make_job(target: Any, **sections: Any) -> Job:
    return Job(
        **{
            "input": PrefixSource(uri="photos"),
            "model": PythonModel(target=target),
            "task": EmbeddingTask(),
            "output": Output(uri="out"),
            **sections,
        }
    )


def get_target(job: Job) -> str:
    assert isinstance(job.model, PythonModel)
    return job.model.target


def list_differences(there: Job, here: Job) -> list[str]:
    return diff_fingerprints(there.fingerprint(), here.fingerprint())


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Any]:
    """A module of the user that this process has imported from a folder of its own."""
    folder = tmp_path / "code"
    folder.mkdir()
    folder.joinpath("user_net.py").write_text(
        "import torch.nn as nn\n\ndef build():\n    return nn.Identity()\n\nclass Columns:\n    pass\n"
        "def wrap():\n    def inner():\n        return build()\n    return inner\n"
    )
    spec = importlib.util.spec_from_file_location("user_net", folder / "user_net.py")
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules["user_net"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    yield found
    del sys.modules["user_net"]


# -- by the name of a module -------------------------------------------------------------------------------------------


def test_function_of_a_module_is_kept_by_its_name_and_its_folder_becomes_the_jobs(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = make_job(module.build, task=PythonTask(target=module.Columns, fields={"x": "int64"}))
    assert job.fingerprint()["model"]["target"] == "user_net:build"
    assert job.fingerprint()["task"]["target"] == "user_net:Columns"
    assert job.folder == tmp_path / "code"
    assert job.input.uri == str(tmp_path / "photos")
    assert job.fingerprint()["input"]["uri"] == "./photos"
    assert isinstance(load_target(get_target(job), job.folder)(), nn.Identity)


def test_functions_of_modules_in_two_folders_are_refused(module: Any) -> None:
    with pytest.raises(InvalidJob, match="put these modules into one folder"):
        make_job(module.build, preprocess=Preprocess(transform=make_job))


def test_name_and_function_are_the_same_job(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "code")
    assert make_job(module.build).fingerprint() == make_job("user_net:build").fingerprint()


# -- by value ----------------------------------------------------------------------------------------------------------


def test_function_by_value_is_restored_from_a_serialized_job(tmp_path: Path) -> None:
    job = make_job(make_build(7))
    document = json.loads(json.dumps(job.serialize()))
    restored = Job.deserialize(document, tmp_path, tmp_path)
    assert load_target(get_target(restored), tmp_path)().in_features == 7
    assert restored.fingerprint() == job.fingerprint()
    assert restored.serialize() == document
    assert source_digest(get_target(restored), tmp_path) == source_digest(get_target(job), ANY_FOLDER)


def test_plan_holds_digests_and_no_function() -> None:
    described = make_job(make_build(7)).describe()
    assert described["model"]["target"]["function"].endswith(":make_build.<locals>.build")
    assert "functions" not in described
    restored = Job.deserialize(described, ANY_FOLDER, ANY_FOLDER)
    with pytest.raises(InvalidJob, match="run that script again"):
        load_target(get_target(restored), ANY_FOLDER)


def test_job_file_cannot_hold_a_function(tmp_path: Path) -> None:
    document = json.loads(json.dumps(make_job(make_build(7)).serialize()))
    tmp_path.joinpath("job.yaml").write_text(json.dumps(document))
    with pytest.raises(InvalidJob, match=r"model\.target: must be text, not a section"):
        Job.from_file(tmp_path / "job.yaml")


def test_same_function_is_the_same_job_and_another_captured_value_is_not() -> None:
    assert not list_differences(make_job(make_build(7)), make_job(make_build(7)))
    assert list_differences(make_job(make_build(7)), make_job(make_build(8))) == [
        "model.target.values.make_build.<locals>.build.width: 7 there, 8 here"
    ]


def test_texts_that_may_be_secret_are_kept_as_digests() -> None:
    (line,) = list_differences(make_job(make_build(7, "hunter2")), make_job(make_build(7, "hunter3")))
    assert "scale: str " in line
    assert "hunter" not in line
    assert "hunter" not in json.dumps(make_job(make_build(7, "hunter2")).describe())


def test_function_in_place_of_a_name_is_said_in_one_line(module: Any) -> None:
    (line,) = list_differences(make_job("net:build"), make_job(make_build(7)))
    assert line.startswith("model.target: net:build there, a script's function ")


def test_objects_like_a_compose_are_transforms() -> None:
    def make_preprocess(size: int) -> Preprocess:
        return Preprocess(transform=transforms.Compose([transforms.Resize(size), transforms.ToTensor()]))

    assert not list_differences(
        make_job("n:f", preprocess=make_preprocess(8)), make_job("n:f", preprocess=make_preprocess(8))
    )
    (line,) = list_differences(
        make_job("n:f", preprocess=make_preprocess(8)), make_job("n:f", preprocess=make_preprocess(9))
    )
    assert line.startswith("preprocess.transform.values.object: Compose ")
    weights_own = Preprocess(transform=models.ResNet18_Weights.DEFAULT.transforms())
    assert isinstance(weights_own.transform, FunctionTarget)


def test_functions_that_it_calls_belong_to_it() -> None:
    def outer(step: Callable[[], int]) -> Callable[[], int]:
        return lambda: step() + 1

    def one() -> int:
        return 1

    def two() -> int:
        return 2

    (first, second) = (PythonModel(target=outer(step)).target for step in (one, two))
    assert isinstance(first, FunctionTarget)
    assert isinstance(second, FunctionTarget)
    assert set(first.code) - set(second.code) == {f"{one.__qualname__}"}
    assert first.load()() == 2


def test_partial_of_a_function_of_a_module_covers_its_sources(module: Any) -> None:
    target = PythonModel(target=partial(module.build)).target
    assert isinstance(target, FunctionTarget)
    assert set(target.code) == {"user_net.py"}
    assert make_job(partial(module.build)).folder == Path(module.__file__).parent
    nested = PythonModel(target=module.wrap()).target
    assert isinstance(nested, FunctionTarget)
    assert set(nested.code) == {"user_net.py", "wrap.<locals>.inner"}


def test_imports_inside_a_function_cover_the_sources_of_the_module(module: Any) -> None:
    def build() -> nn.Module:
        from user_net import build as build_net  # type: ignore[import-not-found, unused-ignore]

        return build_net()  # type: ignore[no-any-return, unused-ignore]

    target = PythonModel(target=build).target
    assert isinstance(target, FunctionTarget)
    assert "user_net.py" in target.code


def test_decorators_belong_to_the_functions_that_they_wrap() -> None:
    def scale(function: Callable[..., Any]) -> Callable[..., Any]:
        def scaled(*arguments: Any) -> Any:
            return function(*arguments)

        return scaled

    class Net(nn.Module):
        @scale
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        @torch.no_grad()
        def extra_repr(self) -> str:
            return "net"

    target = PythonModel(target=Net).target
    assert isinstance(target, FunctionTarget)
    # A decorator of torch is not among them: another version of torch is no other job.
    names = {
        name.removeprefix("test_decorators_belong_to_the_functions_that_they_wrap.<locals>.") for name in target.code
    }
    assert names == {"Net", "scale.<locals>.scaled", "Net.forward", "Net.extra_repr"}


def test_dataclass_of_a_notebook_is_told_apart_by_its_fields() -> None:
    def make_target(default: int) -> FunctionTarget:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(f"from dataclasses import dataclass\n@dataclass\nclass Config:\n    width: int = {default}\n", names)
        config = names["Config"]()

        def build() -> int:
            return int(config.width)

        target = PythonModel(target=build).target
        assert isinstance(target, FunctionTarget)
        return target

    first, again, other = make_target(2), make_target(2), make_target(3)
    assert first.digest == again.digest
    assert other.digest != first.digest
    assert other.load()() == 3


# -- refused -----------------------------------------------------------------------------------------------------------


def test_captured_value_that_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"uses make_build\.<locals>\.build\.scale, a lock, of which nobody can tell"):
        PythonModel(target=make_build(7, threading.Lock()))


def test_large_values_are_refused() -> None:
    with pytest.raises(InvalidJob, match="over the limit of 16 MiB; read large values from a file"):
        PythonModel(target=make_build(7, bytes(17 << 20)))


def test_function_without_source_is_refused() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("def build():\n    return 1\n", names)
    with pytest.raises(InvalidJob, match="__main__:build cannot be kept, because build has no source"):
        PythonModel(target=names["build"])


def test_file_that_was_changed_since_it_was_loaded_is_refused(module: Any, tmp_path: Path) -> None:
    path = tmp_path / "code" / "user_net.py"
    path.write_text(path.read_text().replace("return build()", "return None"))
    with pytest.raises(InvalidJob, match=r"user_net\.py was changed since wrap\.<locals>\.inner was loaded"):
        PythonModel(target=module.wrap())


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"PythonModel\.target: must be text, not a lock"):
        PythonModel(target=threading.Lock())  # type: ignore[arg-type,unused-ignore]


# -- across processes --------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
import numpy
import torch
from torch import nn
from torchvision import transforms
from batchjob import PythonModel

LABELS = {"cat", "dog", "bird", "horse", "ship"}
MEAN = numpy.arange(3.0)
SCALE = torch.arange(4, dtype=torch.bfloat16)
OPTIONS = {"size": (8, 8), "path": os.path.join("a", "b"), "layer": nn.ReLU()}
STEPS = transforms.Compose([transforms.Resize(8), transforms.ToTensor()])

class Net(nn.Module):
    width = len(LABELS)
    def forward(self, x):
        return x * SCALE * MEAN + self.width

def build():
    STEPS, OPTIONS
    return Net()

print(json.dumps(PythonModel(target=build).target.to_document()))
"""


def test_digests_are_the_same_in_every_process(tmp_path: Path) -> None:
    tmp_path.joinpath("script.py").write_text(SCRIPT)
    documents = [
        json.loads(
            subprocess.run(
                [sys.executable, "script.py"],
                cwd=tmp_path,
                env={"PYTHONHASHSEED": seed, "HOME": str(tmp_path)},
                capture_output=True,
                check=True,
                timeout=60,
            ).stdout
        )
        for seed in ("1", "2")
    ]
    assert documents[0] == documents[1]
    assert set(documents[0]["values"]) == {"LABELS", "MEAN", "SCALE", "OPTIONS", "STEPS", "Net.width"} - {"LABELS"}
    assert documents[0]["values"]["Net.width"] == "5"


def test_target_is_pickled_for_loader_processes() -> None:
    target = PythonModel(target=make_build(7)).target
    copy = pickle.loads(pickle.dumps(target))
    assert isinstance(copy, FunctionTarget)
    assert (str(copy), copy.digest, copy.load()().in_features) == (str(target), source_digest(target, ANY_FOLDER), 7)
