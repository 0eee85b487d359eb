"""`Job`: everything a run needs to know, as one frozen model made of the settings of the rooms below.

Read from a job file with every fault named at its line, or built in Python. Its fingerprint decides whether an output
belongs to it.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, model_validator

from batchjob import jobfile
from batchjob.complaints import complain
from batchjob.decode import DecodeSettings
from batchjob.errors import InvalidJob
from batchjob.loader import LoaderSettings
from batchjob.models import (
    CheckpointModel,
    ExportedModel,
    HuggingfaceModel,
    OnnxModel,
    PickleModel,
    PythonModel,
    TensorrtModel,
    TimmModel,
    TorchScriptModel,
    TorchvisionModel,
)
from batchjob.parameters import Param
from batchjob.portable import explicit, refilled, whole
from batchjob.preprocess import Preprocess
from batchjob.settings import Settings, Uri
from batchjob.sources import ManifestSource, PrefixSource
from batchjob.storage import StorageOptions
from batchjob.tasks import (
    ClassificationTask,
    DetectionTask,
    EmbeddingTask,
    MultilabelTask,
    PythonTask,
    RawTask,
    RegressionTask,
    SegmentationTask,
)
from batchjob.tuning import Acceleration

__all__ = ["ErrorBudget", "Job", "Output", "Param", "Runtime", "Workers", "difference", "job_schema"]

# The extension points: a new kind of source, model or task is one file in its folder, and its name here.
Source = Annotated[PrefixSource | ManifestSource, Field(discriminator="type")]
Model = Annotated[
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
Task = Annotated[
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

Auto = Literal["auto"]
AtLeastOne = Annotated[int, Field(ge=1)]

_DECIDING = ("input", "model", "preprocess", "task", "runtime", "decode")
_UNDECIDING = {"input": ("require",), "model": ("trust", "sha256")}
_TAKEN = "defaults"


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d+)?", value):
        raise ValueError(f"must be auto, cuda, cuda:N, mps, xpu or cpu, not {value!r}")
    return value


def _check_name(value: str) -> str:
    if not re.fullmatch(r"\w[\w .=-]{0,127}", value):
        raise ValueError("must be letters, digits, '.', '=', '-' and '_', 128 at most")
    return value


class Workers(Settings):
    """How many workers a run may have.

    Attributes:
        min: so many before work starts.
        max: never more than this.
    """

    min: AtLeastOne = 1
    max: AtLeastOne

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"has max {self.max} below min {self.min}")
        return self


class Runtime(Acceleration):
    """Where and how the job runs. Of all this only `precision`, `half_weights` and `quantize` alter a prediction.

    Attributes:
        pool: `ray` runs workers as Ray actors; `local` one worker in this process.
        workers: how many workers; a number, or `min` and `max`.
        gpus_per_worker: GPUs that each worker is given; may be a fraction.
        cpus_per_worker: cores that each worker is given, its loader processes included.
        device: auto, cuda, cuda:N, mps, xpu or cpu; one that is asked for and absent is an error.
        batch_size: images in a batch.
        grad_mode: `no_grad` for models that fail under inference mode.
        shard_size: images in a shard, the unit that is committed.
        loader: how images reach the model.
        stall_seconds: that one batch may take in the model, and its loader or, beyond `errors.outage_seconds`, its
            store go without a sign of life; then a worker is replaced, and on the local pool the run ends. Loading,
            tuning and compiling do not count.
    """

    pool: Literal["ray", "local"] = "ray"
    workers: AtLeastOne | Auto | Workers = "auto"
    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Auto = "auto"
    cpus_per_worker: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Auto = "auto"
    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    batch_size: AtLeastOne | Auto = "auto"
    grad_mode: Literal["inference", "no_grad"] = "inference"
    shard_size: AtLeastOne | Auto = "auto"
    loader: LoaderSettings = LoaderSettings()
    stall_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0


class ErrorBudget(Settings):
    """How much may go wrong.

    Attributes:
        max_rate: share of images that may be error rows; over it the run ends with exit 3 and no `_SUCCESS`.
        max_count: error rows that there may be in all; null counts none.
        abort_early: stop as soon as it is certain that the run will be over one of the two.
        attempts: how often a shard is tried before it is given up.
        retries: how often an image that cannot be read, for a reason that may pass, is asked for again while other
            images of its store can be read, before it is an error row; each time it is retried for up to 30 seconds.
        outage_seconds: how long a store that does not answer at all is waited for, once work has begun, before the run
            ends with exit 75. Faults of network and credentials use up no attempts and leave no rows.
    """

    max_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_count: Annotated[int, Field(ge=0)] | None = None
    abort_early: bool = True
    attempts: AtLeastOne = 3
    retries: Annotated[int, Field(ge=0)] = 2
    outage_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 360.0


class Output(Settings):
    """Where the rows go.

    Attributes:
        uri: folder of the output, a local path or a URI; `predictions/` and `_SUCCESS` appear in it.
    """

    uri: Uri


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
    input: Source
    model: Model
    preprocess: Preprocess | None = None
    task: Task
    runtime: Runtime = Runtime()
    errors: ErrorBudget = ErrorBudget()
    output: Output
    storage: dict[str, StorageOptions] = Field(default={})
    decode: DecodeSettings = DecodeSettings()

    _base: Path = PrivateAttr(default_factory=Path.cwd)
    _data_base: Path | None = PrivateAttr(default=None)
    _taken: Mapping[str, Any] = PrivateAttr(default={})

    @property
    def base(self) -> Path:
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
        text = jobfile.read(Path(path), params, overrides)
        job: Job | None = None
        try:
            job = cls._built(text.tree, base)
        except ValidationError as error:
            complain(error, cls, text)
        text.complain()
        assert job is not None
        return job

    @classmethod
    def from_portable(cls, doc: Mapping[str, Any], base: Path, data_base: Path) -> Job:
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
            job, there = cls._built(given, base), cls._built(given, data_base)
        except ValidationError as error:
            raise InvalidJob(f"this job was written by another version of batchjob: {error}") from None
        moved = job.model_copy(update={"input": there.input, "output": there.output})
        moved._data_base = data_base
        return moved._with(taken)

    def portable(self) -> dict[str, Any]:
        """All that was explicitly set, as JSON holds it, with `./` before paths inside the job's folder.

        Beside it, where `completed` found any, the defaults that are not this version's.
        """
        doc = explicit(self, self.base)
        data = explicit(self, self._data_base or self.base)
        taken = {_TAKEN: dict(self._taken)} if self._taken else {}
        return doc | {name: data[name] for name in ("input", "output")} | taken

    def fingerprint(self) -> dict[str, Any]:
        """What decides the predictions: the explicitly set fields of input, model, preprocess, task, decode, precision.

        Not in it: what says when, where or how fast (`input.require`, workers, batches, output), what is only checked
        (`model.sha256`), and versions. The same job in another folder has the same fingerprint.
        """
        given = self.portable()
        for section, keys in _UNDECIDING.items():
            for key in keys:
                given[section].pop(key, None)
        given["runtime"] = {key: value for key, value in given.get("runtime", {}).items() if key in _ALTERING}
        return {name: given[name] for name in _DECIDING if given.get(name)}

    def resolved(self) -> dict[str, Any]:
        """All fields of what decides the predictions, set or not, by section: what `completed` goes by."""
        found = {}
        for name, settings in self._deciding():
            fields = whole(settings, (self._data_base or self.base) if name == "input" else self.base)
            found[name] = {key: value for key, value in fields.items() if key not in _UNDECIDING.get(name, ())}
        return found | {"runtime": {key: getattr(self.runtime, key) for key in _ALTERING}}

    def completed(self, resolved: Mapping[str, Any]) -> Job:
        """The job as it was planned: what it does not set itself is what `resolved` said then, not today's default.

        Fields that this version no longer knows are passed over. The fingerprint stays the same.

        Raises:
            InvalidJob: a value is none that this version takes.
        """
        now, taken = self.resolved(), {}
        for name, settings in self._deciding():
            then = {key: value for key, value in resolved.get(name, {}).items() if key in now[name]}
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
            sections = {name: refilled(getattr(self, name), more, self.base) for name, more in taken.items()}
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


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, a line a key: `model.weights: V1 there, V2 here`."""
    a, b = dict(_leaves(there)), dict(_leaves(here))
    keys = dict.fromkeys([*a, *b])
    return [
        f"{key}: {_shown(a, key)} there, {_shown(b, key)} here"
        for key in keys
        if key not in a or key not in b or a[key] != b[key]
    ]


def job_schema() -> dict[str, Any]:
    """JSON schema of a job file, with descriptions, for editors."""
    schema = Job.model_json_schema()
    documented = {kind.__name__: kind for kind in _kinds_in(Job)}
    for name, definition in [("Job", schema), *schema.get("$defs", {}).items()]:
        if name in documented:
            _describe(definition, documented[name])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "batchjob job"}


def _leaves(doc: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in doc.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    if key not in leaves:
        return "not set"
    value = leaves[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _kinds_in(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _kinds_in(field.annotation)
    for part in get_args(annotation):
        yield from _kinds_in(part)


def _describe(definition: dict[str, Any], kind: type[Settings]) -> None:
    """Moves what the docstrings say of each attribute, also of inherited ones, to its property."""
    definition["description"] = (inspect.getdoc(kind) or "").partition("Attributes:")[0].strip()
    for ancestor in kind.__mro__:
        attributes = (inspect.getdoc(ancestor) or "").partition("Attributes:")[2]
        for name, words in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", attributes, re.MULTILINE):
            if name in definition.get("properties", {}):
                definition["properties"][name].setdefault("description", re.sub(r"\s+", " ", words))
