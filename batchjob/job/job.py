"""`Job`: everything a run needs to know, as one frozen model made of the settings of the rooms below.

Read from a job file with every fault named at its line, or built in Python. Its fingerprint decides whether an output
belongs to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError

from batchjob.errors import InvalidJob
from batchjob.job import job_file
from batchjob.job.parameters import Param
from batchjob.job.runtime import ErrorBudget, Output, Runtime
from batchjob.job.serialization import fill_unset_fields, serialize_all_fields, serialize_set_fields
from batchjob.job.validation_errors import add_validation_errors
from batchjob.models.checkpoint import CheckpointModel
from batchjob.models.exported import ExportedModel
from batchjob.models.huggingface import HuggingfaceModel
from batchjob.models.onnx import OnnxModel
from batchjob.models.pickle import PickleModel
from batchjob.models.python import PythonModel
from batchjob.models.tensorrt import TensorrtModel
from batchjob.models.timm import TimmModel
from batchjob.models.torchscript import TorchScriptModel
from batchjob.models.torchvision import TorchvisionModel
from batchjob.preprocessing.settings import DecodeSettings, Preprocess
from batchjob.settings import Settings
from batchjob.sources.manifest import ManifestSource
from batchjob.sources.prefix import PrefixSource
from batchjob.storage.options import StorageOptions
from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.detection import DetectionTask
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.multilabel import MultilabelTask
from batchjob.tasks.python import PythonTask
from batchjob.tasks.raw import RawTask
from batchjob.tasks.regression import RegressionTask
from batchjob.tasks.segmentation import SegmentationTask

__all__ = ["Job"]

# The extension points: a new kind of source, model or task is one file in its folder, and its name here.
AnySource = Annotated[PrefixSource | ManifestSource, Field(discriminator="type")]
AnyModel = Annotated[
    TorchvisionModel
    | CheckpointModel
    | PythonModel
    | PickleModel
    | TorchScriptModel
    | ExportedModel
    | OnnxModel
    | TimmModel
    | HuggingfaceModel
    | TensorrtModel,
    Field(discriminator="type"),
]
AnyTask = Annotated[
    ClassificationTask
    | MultilabelTask
    | RegressionTask
    | EmbeddingTask
    | DetectionTask
    | SegmentationTask
    | RawTask
    | PythonTask,
    Field(discriminator="type"),
]
_ALTERING = ("precision", "half_weights", "quantize")  # of `runtime`: what may alter a prediction by more than rounding
_DECIDING = ("input", "model", "preprocess", "task", "runtime", "decode")
_UNDECIDING = {"input": ("require",), "model": ("trust", "sha256")}
_TAKEN = "defaults"


def _check_name(value: str) -> str:
    if not re.fullmatch(r"\w[\w .=-]{0,127}", value):
        raise ValueError("must be letters, digits, '.', '=', '-' and '_', 128 at most")
    return value


class Job(Settings):
    """One run of a model over a dataset.

    Attributes:
        name: what people call it.
        params: values given at run time with `-p name=value`, put in place of `${name}` in any text.
        input: where the images are listed.
        model: the model, by the format of its weights.
        preprocess: keys that are given override the weights' own; null switches a step off.
        task: how the model's output becomes columns.
        runtime: where and how the job runs.
        errors: how much may go wrong.
        output: where the rows go.
        storage: options by URI prefix, such as `s3://` or `s3://bucket`; the longest that fits counts. No credentials.
            Web hosts are read only where they stand here, such as `https://images.example.com`.
        decode: limits on the images that are decoded.
    """

    name: Annotated[str, AfterValidator(_check_name)] = "job"
    params: dict[str, Param] = Field(default={})
    input: AnySource
    model: AnyModel
    preprocess: Preprocess | None = None
    task: AnyTask
    runtime: Runtime = Runtime()
    errors: ErrorBudget = ErrorBudget()
    output: Output
    storage: dict[str, StorageOptions] = Field(default={})
    decode: DecodeSettings = DecodeSettings()

    _base: Path = PrivateAttr(default_factory=Path.cwd)
    _data_base: Path | None = PrivateAttr(default=None)
    _taken: Mapping[str, Any] = PrivateAttr(default={})

    @property
    def folder(self) -> Path:
        """The job's folder: the one its file lies in, or the working directory it was built in."""
        return self._base

    @classmethod
    def from_file(cls, path: str | Path, params: Mapping[str, str] = {}, overrides: Sequence[str] = ()) -> Job:
        """Reads a job file.

        Args:
            path: of the YAML file; relative paths in it resolve beside it.
            params: values of the job's parameters, as typed.
            overrides: `section.key=value`, the value as YAML writes it; paths resolve against the working directory.

        Raises:
            InvalidJob: with every fault of the file, a line each, such as
                `job.yaml:7:3: model.nmae: not a field of this model; did you mean 'name'?`.
        """
        base = Path(os.path.normpath(Path.cwd() / path)).parent
        text = job_file.read_job_file(Path(path), params, overrides)
        job: Job | None = None
        try:
            job = cls._built(text.tree, base)
        except ValidationError as error:
            add_validation_errors(error, cls, text)
        text.raise_if_invalid()
        assert job is not None
        return job

    @classmethod
    def deserialize(cls, doc: Mapping[str, Any], folder: Path, data_folder: Path) -> Job:
        """The job that `portable` wrote, in another place.

        Args:
            doc: what `portable` returned.
            base: this machine's copy of the job's folder, for model, preprocess and task.
            data_base: the folder the job was started from, for input and output.

        Raises:
            InvalidJob: the document is none of this version's.
        """
        given, taken = {key: value for key, value in doc.items() if key != _TAKEN}, doc.get(_TAKEN, {})
        try:
            job, there = cls._built(given, folder), cls._built(given, data_folder)
        except ValidationError as error:
            raise InvalidJob(f"this job was written by another version of batchjob: {error}") from None
        moved = job.model_copy(update={"input": there.input, "output": there.output})
        moved._data_base = data_folder
        return moved._with(taken)

    def serialize(self) -> dict[str, Any]:
        """All that was explicitly set, as JSON holds it, with `./` before paths inside the job's folder.

        Beside it, where `completed` found any, the defaults that are not this version's.
        """
        doc = serialize_set_fields(self, self.folder)
        data = serialize_set_fields(self, self._data_base or self.folder)
        taken = {_TAKEN: dict(self._taken)} if self._taken else {}
        return doc | {name: data[name] for name in ("input", "output")} | taken

    def fingerprint(self) -> dict[str, Any]:
        """What decides the predictions: the explicitly set fields of input, model, preprocess, task, decode, precision.

        Not in it: what says when, where or how fast (`input.require`, workers, batches, output), what is only checked
        (`model.sha256`), and versions. The same job in another folder has the same fingerprint.
        """
        given = self.serialize()
        for section, keys in _UNDECIDING.items():
            for key in keys:
                given[section].pop(key, None)
        given["runtime"] = {key: value for key, value in given.get("runtime", {}).items() if key in _ALTERING}
        return {name: given[name] for name in _DECIDING if given.get(name)}

    def resolved_settings(self) -> dict[str, Any]:
        """All fields of what decides the predictions, set or not, by section: what `completed` goes by."""
        found = {}
        for name, settings in self._deciding():
            fields = serialize_all_fields(
                settings, (self._data_base or self.folder) if name == "input" else self.folder
            )
            found[name] = {key: value for key, value in fields.items() if key not in _UNDECIDING.get(name, ())}
        return found | {"runtime": {key: getattr(self.runtime, key) for key in _ALTERING}}

    def with_defaults(self, defaults: Mapping[str, Any]) -> Job:
        """The job as it was planned: what it does not set itself is what `resolved` said then, not today's default.

        Fields that this version no longer knows are passed over. The fingerprint stays the same.

        Raises:
            InvalidJob: a value is none that this version takes.
        """
        now, taken = self.resolved_settings(), {}
        for name, settings in self._deciding():
            then = {key: value for key, value in defaults.get(name, {}).items() if key in now[name]}
            other = {key: value for key, value in then.items() if value != now[name][key]}
            if more := {key: value for key, value in other.items() if key not in settings.model_fields_set}:
                taken[name] = more
        return self._with(taken) if taken else self

    def _deciding(self) -> Iterator[tuple[str, Settings]]:
        """The sections that decide the predictions, as far as the job has them."""
        for name in _DECIDING:
            if (settings := getattr(self, name)) is not None:
                yield name, settings

    def _with(self, taken: Mapping[str, Mapping[str, Any]]) -> Job:
        """The same job with other defaults; the fields that count as set stay the same."""
        try:
            sections = {name: fill_unset_fields(getattr(self, name), more, self.folder) for name, more in taken.items()}
        except ValidationError as error:
            raise InvalidJob(f"this job was planned by another version of batchjob: {error}") from None
        job = self.model_copy(update=sections)
        job._taken = taken
        return job

    @classmethod
    def _built(cls, doc: Mapping[str, Any], base: Path) -> Job:
        job = cls.model_validate(doc, context={"base": base})
        job._base = base
        return job
