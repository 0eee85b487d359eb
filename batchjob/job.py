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

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from batchjob import jobfile
from batchjob.complaints import complain
from batchjob.decode import DecodeSettings
from batchjob.errors import InvalidJob
from batchjob.loader import LoaderSettings
from batchjob.models import CheckpointModel, PythonModel, TorchvisionModel
from batchjob.parameters import Param
from batchjob.records import Preprocess
from batchjob.settings import Settings, Uri, is_local
from batchjob.sources import ManifestSource, PrefixSource
from batchjob.storage import StorageOptions
from batchjob.tasks import ClassificationTask, EmbeddingTask

__all__ = ["ErrorBudget", "Job", "Output", "Param", "Runtime", "Workers", "difference", "job_schema"]

# The extension points: a new kind of source, model or task is one file in its folder, and its name here.
Source = Annotated[PrefixSource | ManifestSource, Field(discriminator="type")]
Model = Annotated[TorchvisionModel | CheckpointModel | PythonModel, Field(discriminator="type")]
Task = Annotated[ClassificationTask | EmbeddingTask, Field(discriminator="type")]

Auto = Literal["auto"]
AtLeastOne = Annotated[int, Field(ge=1)]


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError(f"must be auto, cuda, cuda:N, mps or cpu, not {value!r}")
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


class Runtime(Settings):
    """Where and how the job runs. Of all this only `precision` alters a prediction.

    Attributes:
        pool: `ray` runs workers as Ray actors; `local` one worker in this process.
        workers: how many workers; a number, or `min` and `max`.
        gpus_per_worker: GPUs that each worker is given; may be a fraction.
        cpus_per_worker: cores that each worker is given, its loader processes included.
        device: auto, cuda, cuda:N, mps or cpu; one that is asked for and absent is an error.
        batch_size: images in a batch.
        precision: of the model's arithmetic; `auto` takes what the device gains by.
        grad_mode: `no_grad` for models that fail under inference mode.
        shard_size: images in a shard, the unit that is committed.
        loader: how images reach the model.
    """

    pool: Literal["ray", "local"] = "ray"
    workers: AtLeastOne | Auto | Workers = "auto"
    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Auto = "auto"
    cpus_per_worker: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Auto = "auto"
    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    batch_size: AtLeastOne | Auto = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    grad_mode: Literal["inference", "no_grad"] = "inference"
    shard_size: AtLeastOne | Auto = "auto"
    loader: LoaderSettings = LoaderSettings()


class ErrorBudget(Settings):
    """How much may go wrong.

    Attributes:
        max_rate: share of images that may be error rows; over it the run ends with exit 3 and no `_SUCCESS`.
        attempts: how often a shard is tried before it is given up.
    """

    max_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    attempts: AtLeastOne = 3


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
        try:
            job, there = cls._built(doc, base), cls._built(doc, data_base)
        except ValidationError as error:
            raise InvalidJob(f"this job was written by another version of batchjob: {error}") from None
        moved = job.model_copy(update={"input": there.input, "output": there.output})
        moved._data_base = data_base
        return moved

    def portable(self) -> dict[str, Any]:
        """All that was explicitly set, as JSON holds it, with `./` before paths inside the job's folder."""
        doc = _explicit(self, self.base)
        data = _explicit(self, self._data_base or self.base)
        return doc | {name: data[name] for name in ("input", "output")}

    def fingerprint(self) -> dict[str, Any]:
        """What decides the predictions: the explicitly set fields of input, model, preprocess, task, decode, precision.

        Not in it: what says when, where or how fast (`input.require`, workers, batches, output), what is only checked
        (`model.sha256`), and versions. The same job in another folder has the same fingerprint.
        """
        whole = self.portable()
        for section, key in (("input", "require"), ("model", "trust"), ("model", "sha256")):
            whole[section].pop(key, None)
        whole["runtime"] = {key: value for key, value in whole.get("runtime", {}).items() if key == "precision"}
        sections = ("input", "model", "preprocess", "task", "runtime", "decode")
        return {name: whole[name] for name in sections if whole.get(name)}

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


def _explicit(settings: BaseModel, base: Path) -> dict[str, Any]:
    """Fields that were given (and every `type`), in the order the class declares them."""
    kind = type(settings)
    given = settings.model_fields_set | ({"type"} & set(kind.model_fields))
    return {
        name: _plain(getattr(settings, name), base, _holds_path(field.annotation) or _is_path(field.metadata))
        for name, field in kind.model_fields.items()
        if name in given
    }


def _plain(value: Any, base: Path, path: bool) -> Any:
    match value:
        case BaseModel():
            return _explicit(value, base)
        case Mapping():
            return {str(key): _plain(item, base, path) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, base, path) for item in value]
        case str() if path and is_local(value):
            return _beside(value, base)
        case str():
            return str(value)
    return value


def _beside(value: str, base: Path) -> str:
    if value.rstrip("/") == str(base):
        return "./"
    return f"./{value[len(str(base)) + 1 :]}" if value.startswith(f"{str(base).rstrip('/')}/") else value


def _is_path(metadata: Sequence[Any]) -> bool:
    # Uri and its kin are the only types that look at a value before it is validated.
    return any(isinstance(part, BeforeValidator) for part in metadata)


def _holds_path(annotation: Any) -> bool:
    return _is_path(getattr(annotation, "__metadata__", ())) or any(map(_holds_path, get_args(annotation)))


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
    """Moves what the docstring says of each attribute to its property."""
    doc = inspect.getdoc(kind) or ""
    summary, _, attributes = doc.partition("Attributes:")
    definition["description"] = summary.strip()
    for name, words in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", attributes, re.MULTILINE):
        if name in definition.get("properties", {}):
            definition["properties"][name].setdefault("description", re.sub(r"\s+", " ", words))
