"""Public names of `import batchjob`. Adding or removing one is a decision and stands in CHANGELOG.md."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

import batchjob
from batchjob import api, errors
from batchjob.settings import Settings

FUNCTIONS = {"discard", "make_plan", "read_errors", "retry", "run", "status", "validate"}
RESULTS = {"RunResult", "__version__"}
SETTINGS = {
    *(
        "Job",
        "Param",
        "Runtime",
        "Workers",
        "LoaderSettings",
        "Acceleration",
        "ErrorBudget",
        "Output",
        "StorageOptions",
    ),
    *("PrefixSource", "ManifestSource", "Require", "Preprocess", "DecodeSettings", "StateDictSelection"),
    *("TorchvisionModel", "CheckpointModel", "PythonModel", "PickleModel", "TorchScriptModel", "ExportedModel"),
    *("OnnxModel", "TimmModel", "HuggingfaceModel", "TensorrtModel"),
    *("ClassificationTask", "MultilabelTask", "RegressionTask", "EmbeddingTask", "DetectionTask", "SegmentationTask"),
    *("RawTask", "PythonTask"),
}
EXCEPTIONS = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
PUBLIC_NAMES = FUNCTIONS | RESULTS | SETTINGS | EXCEPTIONS


def test_public_names_are_pinned() -> None:
    assert set(batchjob.__all__) == PUBLIC_NAMES
    assert list(batchjob.__all__) == sorted(batchjob.__all__)


def test_every_settings_class_of_a_job_is_public() -> None:
    assert {found.__name__ for found in list_settings_classes(batchjob.Job)} == SETTINGS


def list_settings_classes(annotation: Any) -> set[type[Settings]]:
    """List the settings classes that a type is made of, and those of their fields."""
    found = {inner for argument in get_args(annotation) for inner in list_settings_classes(argument)}
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        fields = annotation.model_fields.values()
        found |= {annotation, *(inner for field in fields for inner in list_settings_classes(field.annotation))}
    # `runtime` takes the fields of `Acceleration`, which stand in no section of their own.
    return found | ({batchjob.Acceleration} if batchjob.Runtime in found else set())


def test_no_public_name_is_the_name_of_a_module() -> None:
    modules = {found.name for found in pkgutil.iter_modules(batchjob.__path__)}
    assert not PUBLIC_NAMES & modules


def test_type_checkers_see_the_names_that_are_imported_lazily() -> None:
    tree = ast.parse(Path(batchjob.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert imported == batchjob._MODULES


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES - {"__version__"}))
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(batchjob, name))


def test_every_public_name_exists() -> None:
    assert [name for name in batchjob.__all__ if getattr(batchjob, name, None) is None] == []


def test_dir_lists_the_public_names_for_tab_completion() -> None:
    assert set(dir(batchjob)) == PUBLIC_NAMES


def test_star_import_loads_neither_torch_nor_ray() -> None:
    code = "import sys; from batchjob import *; sys.exit(bool({'torch', 'torchvision', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_outcome_is_a_deprecated_name_of_run_result() -> None:
    with pytest.warns(DeprecationWarning, match=r"batchjob\.Outcome is now batchjob\.RunResult") as warned:
        assert batchjob.Outcome is batchjob.RunResult
    assert Path(warned[0].filename) == Path(__file__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = batchjob.Nothing


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Changed", errors.PreconditionFailed),
        ("Denied", errors.AccessDenied),
        ("ImageFault", errors.ImageError),
        ("Interrupted", errors.AttemptInterrupted),
        ("Refused", errors.AddressRefused),
        ("Stalled", errors.WorkerStalled),
        ("TooLarge", errors.ObjectTooLarge),
        ("Unaddressable", errors.UnaddressableKey),
    ],
)
def test_renamed_exceptions_keep_a_deprecated_name(old: str, new: type[Exception]) -> None:
    with pytest.warns(DeprecationWarning, match=rf"batchjob\.errors\.{old} is now batchjob\.errors\.{new.__name__}"):
        assert getattr(errors, old) is new
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = errors.Nothing


def test_launch_is_a_deprecated_name_of_api() -> None:
    sys.modules.pop("batchjob.launch", None)
    with pytest.warns(DeprecationWarning, match=r"batchjob\.launch is now batchjob\.api"):
        launch = importlib.import_module("batchjob.launch")
    assert (launch.run, launch.retry, launch.validate) == (api.run, api.retry, api.validate)
    assert launch.plan is api.make_plan


def test_renamed_methods_of_a_result_keep_a_deprecated_name() -> None:
    result = batchjob.RunResult("complete", planned=3, predicted=3)
    with pytest.warns(DeprecationWarning, match=r"RunResult\.dump is now RunResult\.to_json"):
        assert result.dump() == result.to_json()
    with pytest.warns(DeprecationWarning, match=r"RunResult\.sentence is now RunResult\.to_text"):
        assert result.sentence() == result.to_text()
    with pytest.warns(DeprecationWarning, match=r"RunResult\.of_error is now RunResult\.from_error"):
        assert batchjob.RunResult.of_error(errors.Temporary("later")) == batchjob.RunResult.from_error(
            errors.Temporary("later")
        )
