"""`Job`: all settings of a run, as one frozen model made of the settings of the other packages.

A job is read from a job file, which names every fault at its line, or built in Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from batchjob.errors import InvalidJob
from batchjob.functions.function_target import FunctionTarget, ModuleTarget
from batchjob.job.fingerprint import DECIDING_SECTIONS, complete_defaults, compute_fingerprint, select_deciding_fields
from batchjob.job.job_file import read_job_file
from batchjob.job.parameters import Param
from batchjob.job.runtime import ErrorBudget, Output, Runtime
from batchjob.job.serialization import fill_unset_fields, make_relative, serialize_all_fields, serialize_set_fields
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
from batchjob.setting_errors import find_held_secrets, join_faults
from batchjob.settings import Settings, resolve_path
from batchjob.sources.manifest import ManifestSource
from batchjob.sources.prefix import PrefixSource
from batchjob.storage.options import StorageOptions
from batchjob.system import working_directory
from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.detection import DetectionTask
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.multilabel import MultilabelTask
from batchjob.tasks.python import PythonTask
from batchjob.tasks.raw import RawTask
from batchjob.tasks.regression import RegressionTask
from batchjob.tasks.segmentation import SegmentationTask
from batchjob.uris import expand_home, is_local, local_path

__all__ = ["AnyModel", "AnySource", "AnyTask", "Job"]

# Extension points: a new kind of source, model or task is one file in its package, and its class here.
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
# Key of a serialized job for the defaults that differ from this version's.
_DEFAULTS_KEY = "defaults"
# Key of a serialized job for the functions that it holds by value: base64 by digest.
_FUNCTIONS_KEY = "functions"


def _check_name(value: str) -> str:
    if not re.fullmatch(r"\w[\w .=-]{0,127}", value):
        raise ValueError("must be letters, digits, '.', '=', '-' and '_', 128 at most")
    return value


class Job(Settings):
    """One run of a model over a dataset.

    A relative path starts at the working directory, in a job file at the file's folder. Wrong settings raise
    `InvalidJob`, with one line for each fault.

    Attributes:
        name: Name of the job, for people.
        params: Values given at run time with `-p name=value`; they replace `${name}` in any text.
        input: Images to read.
        model: The model, by the format of its weights.
        preprocess: Keys that are set override the weights' own; null switches a step off.
        task: Conversion of the model's output to columns.
        runtime: Place and manner of the run.
        errors: Limits on errors.
        output: Place of the output.
        storage: Options by URI prefix, such as `s3://` or `s3://bucket`; the longest one that fits counts. No
            credentials. Web hosts are read only if they stand here, such as `https://images.example.com`.
        decode: Limits on the images that are decoded.

    Example:
        ```
        job = Job(
            input=PrefixSource(uri="s3://bucket/photos/"),
            model=TorchvisionModel(name="resnet50", weights="DEFAULT"),
            task=ClassificationTask(top_k=5),
            output=Output(uri="s3://bucket/predictions/"),
        )
        ```
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

    _folder: Path = PrivateAttr(default_factory=Path.cwd)
    _data_folder: Path | None = PrivateAttr(default=None)
    _planned_defaults: Mapping[str, Any] = PrivateAttr(default={})

    @property
    def folder(self) -> Path:
        """The job's folder: the folder of its file, or the working directory in which it was built."""
        return self._folder

    @classmethod
    def from_file(cls, path: str | Path, params: Mapping[str, str] = {}, overrides: Sequence[str] = ()) -> Job:
        """Read a job file.

        Args:
            path: Path of the YAML file; relative paths in it resolve against its folder.
            params: Values of the job's parameters, as typed.
            overrides: `section.key=value`, the value in YAML; paths in it resolve against the working directory.

        Raises:
            InvalidJob: The job has faults. The message names all of them, one line each, such as
                `job.yaml:7:3: model.nmae: not a field of this model; did you mean 'name'?`.
        """
        # Asked for an absolute path too: torch and its processes do not start in a deleted folder.
        base = working_directory()
        try:
            folder = resolve_path(str(path), base).parent
        except ValueError as error:
            raise InvalidJob(f"{path}: {error}") from error
        # Messages name the file as the user does.
        source_map = read_job_file(Path(expand_home(str(local_path(str(path))))), params, overrides)
        job: Job | None = None
        try:
            job = cls._build(source_map.tree, folder)
        except ValidationError as error:
            add_validation_errors(error, cls, source_map)
        source_map.raise_if_invalid()
        assert job is not None
        return job

    @classmethod
    def deserialize(cls, document: Mapping[str, Any], folder: Path, data_folder: Path) -> Job:
        """Restore a job that was serialized, perhaps on another machine.

        Args:
            document: Result of `serialize`.
            folder: Copy of the job's folder on this machine, for paths of model, preprocess and task.
            data_folder: Folder that the job was started from, for paths of input and output.

        Raises:
            InvalidJob: The document was written by another version of batchjob.
        """
        fields = {key: value for key, value in document.items() if key not in {_DEFAULTS_KEY, _FUNCTIONS_KEY}}
        functions = document.get(_FUNCTIONS_KEY, {})
        try:
            job = cls._build(fields, folder, functions=functions)
            job_with_data = cls._build(fields, data_folder, functions=functions)
        except ValidationError as error:
            raise InvalidJob(f"this job was written by another version of batchjob: {error}") from None
        restored = job.model_copy(update={"input": job_with_data.input, "output": job_with_data.output})
        restored._data_folder = data_folder
        return restored._fill_unset(document.get(_DEFAULTS_KEY, {}))

    def serialize(self) -> dict[str, Any]:
        """Return the explicitly set fields as a JSON document, with `./` before paths in the job's folder.

        Under `defaults` it holds the defaults that `with_defaults` took over and that differ from this version's.
        """
        functions = {function.digest: function.encoded for function in self._list_functions() if function.pickled}
        return self.describe() | ({_FUNCTIONS_KEY: functions} if functions else {})

    def describe(self) -> dict[str, Any]:
        """Return what `serialize` does without the functions that the job holds by value, for the head of a plan."""
        document = serialize_set_fields(self, self.folder)
        data = serialize_set_fields(self, self._data_folder or self.folder)
        defaults = {_DEFAULTS_KEY: dict(self._planned_defaults)} if self._planned_defaults else {}
        return document | {name: data[name] for name in ("input", "output")} | defaults

    def fingerprint(self) -> dict[str, Any]:
        """Return the explicitly set fields that decide the predictions.

        They are fields of input, model, preprocess, task and decode, and the precision. Not among them: fields that
        say when, where or how fast to run (`input.require`, workers, batches, output), fields that are only checked
        (`model.sha256`), and versions. The same job in another folder has the same fingerprint.
        """
        return compute_fingerprint(self.describe())

    def resolved_settings(self) -> dict[str, Any]:
        """Return all fields that decide the predictions, set or not, by section; see `with_defaults`."""
        resolved = {}
        for name, settings in self._deciding_sections():
            folder = (self._data_folder or self.folder) if name == "input" else self.folder
            resolved[name] = select_deciding_fields(name, serialize_all_fields(settings, folder))
        return resolved

    def with_defaults(self, defaults: Mapping[str, Any]) -> Job:
        """Return the job with the defaults of the version that planned it, in place of this version's.

        Fields that this version does not know are ignored. The fingerprint stays the same.

        Args:
            defaults: Result of `resolved_settings` when the job was planned, by whichever version.

        Raises:
            InvalidJob: This version does not accept one of the values.
        """
        current, differing = self.resolved_settings(), {}
        types = {name: fields["type"] for name, fields in current.items() if "type" in fields}
        defaults = complete_defaults(defaults, types)
        for name, settings in self._deciding_sections():
            changed = {
                key: value
                for key, value in defaults.get(name, {}).items()
                if key in current[name] and key not in settings.model_fields_set and value != current[name][key]
            }
            if changed:
                differing[name] = changed
        return self._fill_unset(differing) if differing else self

    def shorten_path(self, uri: str) -> str:
        """Return a path in the job's folder as `./path`, as the job is stored; any other path or URI unchanged."""
        return make_relative(uri, self._data_folder or self.folder) if is_local(uri) else uri

    def _deciding_sections(self) -> Iterator[tuple[str, Settings]]:
        for name in DECIDING_SECTIONS:
            if (settings := getattr(self, name)) is not None:
                yield name, settings

    def _fill_unset(self, defaults: Mapping[str, Mapping[str, Any]]) -> Job:
        """Return the job with these values in fields that were not set; they still count as not set."""
        try:
            sections = {
                name: fill_unset_fields(getattr(self, name), values, self.folder) for name, values in defaults.items()
            }
        except ValidationError as error:
            raise InvalidJob(f"this job was planned by another version of batchjob: {error}") from None
        job = self.model_copy(update=sections)
        job._planned_defaults = defaults
        return job

    @model_validator(mode="after")
    def _adopt_folder(self) -> Self:
        """Take the folder of the modules whose functions were given themselves as the job's folder."""
        folders = {value.folder for value in self._list_targets() if isinstance(value, ModuleTarget)}
        # A function by value finds its modules wherever this program does, but on other machines only in this folder.
        by_value = {function.folder for function in self._list_functions() if function.folder is not None}
        folders = folders or (by_value if len(by_value) == 1 else set())
        if len(folders) > 1:
            listed = " and ".join(sorted(map(str, folders)))
            raise ValueError(f"has functions of modules in {listed}; put these modules into one folder")
        for folder in folders - {self._folder}:
            self._folder, self._data_folder = folder, self._folder
        return self

    @model_validator(mode="after")
    def _refuse_secrets(self, info: ValidationInfo) -> Self:
        """Refuse credentials in a job that was built in Python; a job file is checked before it is validated."""
        if info.context is None and (faults := list(find_held_secrets(self.describe()))):
            raise InvalidJob(join_faults("Job", faults))
        return self

    def _list_targets(self) -> Iterator[Any]:
        """Yield the values of the fields that may hold a function."""
        for section in (self.model, self.preprocess, self.task):
            yield from dict(section or {}).values()

    def _list_functions(self) -> list[FunctionTarget]:
        return [value for value in self._list_targets() if isinstance(value, FunctionTarget)]

    @classmethod
    def _build(cls, document: Mapping[str, Any], folder: Path, functions: Mapping[str, str] | None = None) -> Job:
        job = cls.model_validate(document, context={"base": folder, "functions": functions})
        job._folder = folder
        return job
