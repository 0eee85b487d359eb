"""Run a vision model over every image of a dataset in object storage: one row per image in Parquet, exactly once.

The same job, run by `batchjob run job.yaml` in a shell, or built in Python:

```
import batchjob
from batchjob import ClassificationTask, Job, Output, PrefixSource, TorchvisionModel

job = Job(
    input=PrefixSource(uri="s3://bucket/photos/"),
    model=TorchvisionModel(name="resnet50", weights="DEFAULT"),
    task=ClassificationTask(),
    output=Output(uri="s3://bucket/predictions/"),
)
result = batchjob.run(job, progress=True).raise_for_status()
print(result.table().to_table(columns=["uri", "label", "score"]))
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Acceleration",
    "AccessDenied",
    "AddressRefused",
    "AlreadyExists",
    "AttemptFailed",
    "AttemptInterrupted",
    "BatchjobError",
    "CheckFailed",
    "CheckpointModel",
    "ClassificationTask",
    "DecodeSettings",
    "DetectionTask",
    "DeviceFault",
    "EmbeddingTask",
    "ErrorBudget",
    "ExportedModel",
    "HuggingfaceModel",
    "ImageError",
    "Incomplete",
    "InvalidJob",
    "Job",
    "JobError",
    "LoaderSettings",
    "ManifestSource",
    "MultilabelTask",
    "NotFound",
    "ObjectTooLarge",
    "OnnxModel",
    "Output",
    "Param",
    "PickleModel",
    "PreconditionFailed",
    "PrefixSource",
    "Preprocess",
    "PythonModel",
    "PythonTask",
    "RawTask",
    "RegressionTask",
    "Require",
    "RunResult",
    "Runtime",
    "SegmentationTask",
    "StateDictSelection",
    "StorageError",
    "StorageOptions",
    "Temporary",
    "TensorrtModel",
    "TimmModel",
    "TorchScriptModel",
    "TorchvisionModel",
    "UnaddressableKey",
    "Unavailable",
    "WorkerLost",
    "WorkerStalled",
    "Workers",
    "__version__",
    "discard",
    "make_plan",
    "read_errors",
    "retry",
    "run",
    "status",
    "validate",
]

if TYPE_CHECKING:
    from batchjob.api import discard, make_plan, read_errors, retry, run, status, validate
    from batchjob.errors import (
        AccessDenied,
        AddressRefused,
        AlreadyExists,
        AttemptFailed,
        AttemptInterrupted,
        BatchjobError,
        CheckFailed,
        DeviceFault,
        ImageError,
        Incomplete,
        InvalidJob,
        JobError,
        NotFound,
        ObjectTooLarge,
        PreconditionFailed,
        StorageError,
        Temporary,
        UnaddressableKey,
        Unavailable,
        WorkerLost,
        WorkerStalled,
    )
    from batchjob.job.acceleration import Acceleration
    from batchjob.job.job import Job
    from batchjob.job.parameters import Param
    from batchjob.job.runtime import ErrorBudget, Output, Runtime, Workers
    from batchjob.loader.settings import LoaderSettings
    from batchjob.models.checkpoint import CheckpointModel
    from batchjob.models.exported import ExportedModel
    from batchjob.models.huggingface import HuggingfaceModel
    from batchjob.models.onnx import OnnxModel
    from batchjob.models.pickle import PickleModel
    from batchjob.models.python import PythonModel
    from batchjob.models.state_dict_selection import StateDictSelection
    from batchjob.models.tensorrt import TensorrtModel
    from batchjob.models.timm import TimmModel
    from batchjob.models.torchscript import TorchScriptModel
    from batchjob.models.torchvision import TorchvisionModel
    from batchjob.preprocessing.settings import DecodeSettings, Preprocess
    from batchjob.report.run_result import RunResult
    from batchjob.sources.manifest import ManifestSource
    from batchjob.sources.prefix import PrefixSource
    from batchjob.sources.source import Require
    from batchjob.storage.options import StorageOptions
    from batchjob.tasks.classification import ClassificationTask
    from batchjob.tasks.detection import DetectionTask
    from batchjob.tasks.embedding import EmbeddingTask
    from batchjob.tasks.multilabel import MultilabelTask
    from batchjob.tasks.python import PythonTask
    from batchjob.tasks.raw import RawTask
    from batchjob.tasks.regression import RegressionTask
    from batchjob.tasks.segmentation import SegmentationTask

# Public names by the module that holds them.
_NAMES_BY_MODULE = {
    "batchjob.api": "discard make_plan read_errors retry run status validate",
    "batchjob.errors": (
        "AccessDenied AddressRefused AlreadyExists AttemptFailed AttemptInterrupted BatchjobError "
        "CheckFailed DeviceFault ImageError Incomplete InvalidJob JobError "
        "NotFound ObjectTooLarge PreconditionFailed StorageError Temporary UnaddressableKey "
        "Unavailable WorkerLost WorkerStalled"
    ),
    "batchjob.job.acceleration": "Acceleration",
    "batchjob.job.job": "Job",
    "batchjob.job.parameters": "Param",
    "batchjob.job.runtime": "ErrorBudget Output Runtime Workers",
    "batchjob.loader.settings": "LoaderSettings",
    "batchjob.models.checkpoint": "CheckpointModel",
    "batchjob.models.exported": "ExportedModel",
    "batchjob.models.huggingface": "HuggingfaceModel",
    "batchjob.models.onnx": "OnnxModel",
    "batchjob.models.pickle": "PickleModel",
    "batchjob.models.python": "PythonModel",
    "batchjob.models.state_dict_selection": "StateDictSelection",
    "batchjob.models.tensorrt": "TensorrtModel",
    "batchjob.models.timm": "TimmModel",
    "batchjob.models.torchscript": "TorchScriptModel",
    "batchjob.models.torchvision": "TorchvisionModel",
    "batchjob.preprocessing.settings": "DecodeSettings Preprocess",
    "batchjob.report.run_result": "RunResult",
    "batchjob.sources.manifest": "ManifestSource",
    "batchjob.sources.prefix": "PrefixSource",
    "batchjob.sources.source": "Require",
    "batchjob.storage.options": "StorageOptions",
    "batchjob.tasks.classification": "ClassificationTask",
    "batchjob.tasks.detection": "DetectionTask",
    "batchjob.tasks.embedding": "EmbeddingTask",
    "batchjob.tasks.multilabel": "MultilabelTask",
    "batchjob.tasks.python": "PythonTask",
    "batchjob.tasks.raw": "RawTask",
    "batchjob.tasks.regression": "RegressionTask",
    "batchjob.tasks.segmentation": "SegmentationTask",
}
_MODULES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names.split()}
# Name of an earlier version -> public name of today.
_RENAMED = {"Outcome": "RunResult"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used, so that `import batchjob` stays light."""
    if name in _RENAMED:
        import warnings

        warnings.warn(f"batchjob.{name} is now batchjob.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _MODULES:
        raise AttributeError(f"module 'batchjob' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """List the public names, which are imported only when they are used."""
    return __all__
