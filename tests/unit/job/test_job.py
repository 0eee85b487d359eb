"""Jobs: reading, problems with their lines, parameters, overrides, fingerprints, serialization, JSON schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from batchjob.errors import InvalidJob
from batchjob.job.fingerprint import diff_fingerprints
from batchjob.job.job import AnyModel, Job
from batchjob.job.json_schema import job_json_schema
from batchjob.job.runtime import Workers
from batchjob.models.checkpoint import CheckpointModel
from batchjob.models.torchvision import TorchvisionModel
from batchjob.tasks.classification import ClassificationTask

MODELS = ", ".join(kind.model_fields["type"].default for kind in get_args(get_args(AnyModel)[0]))
GOOD = """\
name: product-tags
params: {dt: {type: date}}
input:
  type: manifest
  uri: s3://lake/image_index/dt=${dt}/
  uri_column: image_uri
  passthrough: [sku, country]
  require: {marker: _SUCCESS, min_images: 1000}
model:
  type: torchvision
  name: resnet50
  weights: IMAGENET1K_V2
task: {type: classification, top_k: 5}
runtime:
  workers: {min: 1, max: 8}
  gpus_per_worker: 1
  cpus_per_worker: 8
  device: auto
  batch_size: auto
  precision: auto
  shard_size: auto
  loader: {processes: auto, prefetch: auto, pin_memory: auto}
errors: {max_rate: 0.01}
output: {uri: "s3://lake/product_tags/dt=${dt}/"}
"""

SMALL = """\
input: {type: prefix, uri: images}
model: {type: checkpoint, architecture: "net:make", weights: net.pth}
task: {type: embedding}
output: {uri: out}
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, path: str = "job.yaml") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def read_problems(text: str, params: dict[str, str] | None = None, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(InvalidJob) as caught:
        Job.from_file(write(text), params or {}, overrides)
    return caught.value.message.splitlines()


def read_small_job(*overrides: str, **params: str) -> Job:
    return Job.from_file(write(SMALL), params, overrides)


def test_full_job_is_read() -> None:
    job = Job.from_file(write(GOOD), {"dt": "2026-11-19"})
    assert job.name == "product-tags"
    assert job.input.uri == "s3://lake/image_index/dt=2026-11-19/"
    assert job.output.uri == "s3://lake/product_tags/dt=2026-11-19/"
    assert job.runtime.workers == Workers(min=1, max=8)
    assert job.errors.attempts == 3


def test_all_problems_are_reported_with_their_lines() -> None:
    text = (
        GOOD.replace("  name: resnet50", "  nmae: resnet50")
        .replace("top_k: 5", "top_k: five")
        .replace("batch_size: auto", "batch_size: many")
        .replace("precision: auto", "precision: fp8")
        .replace("max_rate: 0.01", "max_rate: 7")
    )
    assert read_problems(text, {"dt": "2026-11-19"}) == [
        "job.yaml:11:3: model.nmae: not a field of this model; did you mean 'name'?",
        "job.yaml:13:37: task.top_k: must be a whole number, not 'five'",
        "job.yaml:19:15: runtime.batch_size: must be a whole number or 'auto', not 'many'",
        "job.yaml:20:14: runtime.precision: must be 'auto', 'fp32', 'tf32', 'bf16' or 'fp16', not 'fp8'",
        "job.yaml:23:20: errors.max_rate: must be at most 1, not 7",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("name: product", "nam: product", "job.yaml:1:1: nam: not a field of this job; did you mean 'name'?"),
        (
            "name: product-tags",
            "batch_size: 3",
            "job.yaml:1:1: batch_size: not a field of this job; did you mean 'runtime.batch_size'?",
        ),
        ("  name: resnet50\n", "", "job.yaml:10:3: model.name: is missing"),
        (
            "  weights:",
            "  name: x\n  weights:",
            "job.yaml:12:3: model.name: is given twice, first in line 11; keep one",
        ),
        (
            "type: torchvision",
            "type: caffe",
            f"job.yaml:10:9: model.type: 'caffe' is no model that this version has; it has {MODELS}",
        ),
        (
            "type: manifest",
            "type: manifst",
            (
                "job.yaml:4:9: input.type: 'manifst' is no input that this version has; "
                "it has prefix, manifest; did you mean 'manifest'?"
            ),
        ),
        (
            "  type: torchvision\n",
            "",
            f"job.yaml:10:3: model.type: is missing; it is one of {MODELS}",
        ),
        (
            "{type: classification, top_k: 5}",
            "classification",
            "job.yaml:13:7: task: must be a section, not 'classification'",
        ),
        ("name: resnet50", "name: 50", "job.yaml:11:9: model.name: must be text, not 50; put it in quotes"),
        (
            "device: auto",
            "device: gpu",
            "job.yaml:18:11: runtime.device: must be auto, cuda, cuda:N, mps, xpu or cpu, not 'gpu'",
        ),
        (
            "workers: {min: 1, max: 8}",
            "workers: {min: 3, max: 2}",
            "job.yaml:15:12: runtime.workers: has max 2 below min 3",
        ),
        (
            "workers: {min: 1, max: 8}",
            "workers: {max: 2, mni: 1}",
            "job.yaml:15:21: runtime.workers.mni: not a field of runtime.workers; did you mean 'min'?",
        ),
        (
            "workers: {min: 1, max: 8}",
            "workers: some",
            "job.yaml:15:12: runtime.workers: must be a whole number or 'auto' or a section, not 'some'",
        ),
        (
            "gpus_per_worker: 1",
            "gpus_per_worker: -1",
            "job.yaml:16:20: runtime.gpus_per_worker: must be at least 0 or 'auto', not -1",
        ),
        (
            "gpus_per_worker: 1",
            "gpus_per_worker: 1.5",
            (
                "job.yaml:16:20: runtime.gpus_per_worker: must be a whole number or at most 1, not 1.5: "
                "no worker gets parts of two GPUs"
            ),
        ),
        (
            "gpus_per_worker: 1",
            "gpus_per_worker: 0.00001",
            "job.yaml:16:20: runtime.gpus_per_worker: must be 0 or at least 0.0001, not 1e-05",
        ),
        (
            "cpus_per_worker: 8",
            "cpus_per_worker: 1.5",
            (
                "job.yaml:17:20: runtime.cpus_per_worker: must be a whole number or at most 1, not 1.5: "
                "a worker uses whole cores"
            ),
        ),
        ("errors:", "preprocess: {resize: [224]}\nerrors:", "job.yaml:23:22: preprocess.resize: has too few values"),
        (
            "name: product-tags",
            "name: a/b",
            "job.yaml:1:7: name: must be letters, digits, '.', '=', '-' and '_', 128 at most",
        ),
        ("${dt}/\n", "${dtt}/\n", "job.yaml:5:8: input.uri: ${dtt} is no parameter of this job; did you mean 'dt'?"),
        (
            "{type: date}",
            "{type: day}",
            "job.yaml:2:21: params.dt.type: must be 'str', 'int', 'float', 'bool' or 'date', not 'day'",
        ),
        ("{type: date}", "{type: int, default: x}", "-p dt=2026-11-19: must be a whole number"),
        (
            "s3://lake/image",
            "s3://me:secret@lake/image",
            (
                "job.yaml:5:8: input.uri: holds credentials before '@'; a job never does: "
                "give them through the environment"
            ),
        ),
        (
            "resnet50",
            "!!python/object:os.system x",
            (
                "job.yaml:11:9: model.name: has the tag tag:yaml.org,2002:python/object:os.system, "
                "which a job does not know; leave it out"
            ),
        ),
        (
            "errors:",
            "decode: {device: cuda}\nerrors:",
            (
                "job.yaml:23:18: decode.device: is cuda, but this version decodes on the CPU only; "
                "write device: cpu, or leave it away"
            ),
        ),
        ("task:", "? [a]\n: b\ntask:", "job.yaml:13:3: has a key that is not text"),
    ],
)
def test_problem_is_one_sentence(old: str, new: str, line: str) -> None:
    assert old in GOOD
    assert read_problems(GOOD.replace(old, new, 1), {"dt": "2026-11-19"}) == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "job.yaml:1:1: input: is missing"),
        ("[1, 2]", "job.yaml:1:1: must be a mapping of sections: input, model, task, output"),
        ("a: [1", "job.yaml:1:6: is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n---\nb: 2\n", "job.yaml:2:1: is not YAML: but found another document"),
        ("a: \x00", "job.yaml: is not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("a: " + "[" * 5000, "job.yaml: is nested too deeply; a job needs no more than 50 levels"),
        ("a: &a [*a]", "job.yaml:1:4: is too large or too deep once its aliases are followed; write it out"),
        (
            "a" * (1 << 20) + "a",
            "job.yaml: is larger than 1 MiB; long lists, such as labels, go into a file of their own",
        ),
    ],
)
def test_file_that_is_not_a_job_is_explained(text: str, line: str) -> None:
    assert read_problems(text)[0] == line


def test_expanded_aliases_are_limited() -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))
    assert "too large" in read_problems(f"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{levels}")[0]


def test_missing_or_unreadable_file_is_named() -> None:
    with pytest.raises(InvalidJob, match=r"^none\.yaml: no such file"):
        Job.from_file("none.yaml")
    Path("latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(InvalidJob, match=r"^latin\.yaml: is not UTF-8 text \(byte 6\)"):
        Job.from_file("latin.yaml")
    with pytest.raises(InvalidJob, match=r"^\.: is a folder; give the path of a job file"):
        Job.from_file(".")


def test_plain_scalars_follow_yaml_1_2() -> None:
    labels = "labels: [no, yes, on, 2026-11-19, 12:30:45, 0x1f]"
    text = SMALL.replace("{type: embedding}", f"{{type: classification, {labels}}}")
    job = Job.from_file(write(text))
    assert isinstance(job.task, ClassificationTask)
    assert list(job.task.labels or ()) == ["no", "yes", "on", "2026-11-19", "12:30:45", "0x1f"]
    assert read_small_job("errors.max_rate=1e-3").errors.max_rate == 0.001


# ---------------------------------------------------------------------------------------------------------- parameters


def add_param(declaration: str, *, use: str = "${x}") -> str:
    return f"params: {{x: {declaration}}}\n" + SMALL.replace("uri: out", f'uri: "out/{use}"')


@pytest.mark.parametrize(
    ("declaration", "given", "used"),
    [
        ("{type: date}", "2026-11-19", "2026-11-19"),
        ("{type: int}", "07", "7"),
        ("{type: int, default: 3}", None, "3"),
        ("{type: float}", "1e-1", "0.1"),
        ("{type: bool}", "True", "true"),
        ("{type: bool, default: false}", None, "false"),
        ("{type: date, default: 2026-01-02}", None, "2026-01-02"),
        ("{}", "a b", "a b"),
    ],
)
def test_parameters_are_substituted(declaration: str, given: str | None, used: str) -> None:
    params = {} if given is None else {"x": given}
    assert Path(Job.from_file(write(add_param(declaration)), params).output.uri).name == used


@pytest.mark.parametrize(
    ("declaration", "given", "line"),
    [
        ("{type: date}", "20261119", "-p x=20261119: must be a date such as 2026-11-19"),
        ("{type: date}", "2026-02-30", "-p x=2026-02-30: must be a date such as 2026-11-19"),
        ("{type: int}", "7.5", "-p x=7.5: must be a whole number"),
        ("{type: bool}", "yes", "-p x=yes: must be true or false"),
        ("{type: date}", None, "job.yaml:1:10: params.x: needs a value: add -p x=YYYY-MM-DD"),
        ("{type: int, default: many}", None, "job.yaml:1:34: params.x.default: must be a whole number"),
    ],
)
def test_parameter_of_the_wrong_type_is_refused(declaration: str, given: str | None, line: str) -> None:
    assert read_problems(add_param(declaration), {} if given is None else {"x": given}) == [line]


def test_undeclared_parameter_is_refused() -> None:
    assert read_problems(GOOD, {"dt": "2026-11-19", "dtt": "1"}) == [
        "-p dtt=1: is no parameter of this job; did you mean 'dt'?"
    ]
    assert "it declares none" in read_problems(SMALL, {"dt": "1"})[0]


def test_missing_parameter_neither_hides_nor_causes_other_problems() -> None:
    text = (
        add_param("{type: int}")
        .replace("output:", 'runtime: {batch_size: "${x}"}\noutput:')
        .replace("type: prefix", "type: p")
    )
    assert [line.split(": ")[1] for line in read_problems(text)] == ["params.x", "input.type"]


def test_parameter_can_set_a_number_and_dollars_can_be_escaped() -> None:
    text = add_param("{type: int}", use="$${x}").replace("output:", 'runtime: {batch_size: "${x}"}\noutput:')
    job = Job.from_file(write(text), {"x": "32"})
    assert job.runtime.batch_size == 32
    assert Path(job.output.uri).name == "${x}"


# ----------------------------------------------------------------------------------------------------------- overrides


def test_paths_resolve_against_the_file_and_overrides_against_the_working_directory(tmp_path: Path) -> None:
    path = write(SMALL, "deep/job.yaml")
    job = Job.from_file(path, overrides=["output.uri=mine", "input.uri=../there/"])
    assert job.folder == tmp_path / "deep"
    assert isinstance(job.model, CheckpointModel)
    assert job.model.weights == str(tmp_path / "deep/net.pth")
    assert job.output.uri == str(tmp_path / "mine")
    assert job.input.uri == str(tmp_path.parent / "there") + "/"


def test_overrides_replace_add_and_remove() -> None:
    job = read_small_job(
        "runtime.loader.processes=0",
        "runtime.workers={min: 2, max: 3}",
        "preprocess.mean=[0.5, 0.5, 0.5]",
        "preprocess.resize=null",
        "name=a=b",
        "storage.s3://.region=eu-west-1",
    )
    assert job.runtime.loader.processes == 0
    assert job.runtime.workers == Workers(min=2, max=3)
    assert job.preprocess is not None
    assert job.preprocess.mean == (0.5, 0.5, 0.5)
    assert "resize" in job.preprocess.model_fields_set
    assert job.name == "a=b"
    assert job.storage["s3://"].region == "eu-west-1"


def test_override_can_change_the_type_of_a_section(tmp_path: Path) -> None:
    job = read_small_job("model={type: torchvision, name: resnet18, weights: w.pth}", "input.uri=s3://b/x")
    assert isinstance(job.model, TorchvisionModel)
    assert job.model.weights == str(tmp_path / "w.pth")
    assert job.input.uri == "s3://b/x"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.nmae=x", "model.nmae=x: not a field of this model; it has type, architecture, weights"),
        ("runtime.batch_sze=3", "runtime.batch_sze=3: not a field of runtime; did you mean 'batch_size'?"),
        ("runtime.batch_size=0", "runtime.batch_size=0: must be at least 1 or 'auto', not 0"),
        ("runtime={batch_size: 0}", "runtime={batch_size: 0}: runtime.batch_size: must be at least 1 or 'auto', not 0"),
        ("runtime.batch_size=true", "runtime.batch_size=true: must be a whole number or 'auto', not 'true'"),
        ("errors.max_rate=false", "errors.max_rate=false: must be a number, not 'false'"),
        ("preprocess.std=[1, true]", "preprocess.std=[1, true]: preprocess.std.1: must be a number, not 'true'"),
        ("nonsense", "nonsense: is no override; write section.key=value, for instance runtime.batch_size=64"),
        ("a..b=1", "a..b=1: is no override; write section.key=value, for instance runtime.batch_size=64"),
        ("input.uri.x=1", "input.uri.x=1: input.uri is no section; give it whole, or take it out of the job file"),
        ("task=5", "task=5: must be a section, not 5"),
        ("name=[a", "name=[a: must be letters, digits, '.', '=', '-' and '_', 128 at most"),
        (
            "input.uri=s3://k:pw@b/x",
            "input.uri=s3://…@b/x: holds credentials before '@'; a job never does: give them through the environment",
        ),
        (
            "input.uri=https://b/x?sig=abc",
            (
                "input.uri=https://b/x?…: is a presigned URL; a job never holds a signature: "
                "give credentials through the environment"
            ),
        ),
    ],
)
def test_wrong_override_is_quoted_as_typed(override: str, line: str) -> None:
    (problem,) = read_problems(SMALL, overrides=(override,))
    assert problem.startswith(line)


# ----------------------------------------------------------------------------------------- fingerprint, serialization


def test_fingerprint_holds_settings_that_change_predictions() -> None:
    job = read_small_job()
    assert job.fingerprint() == {
        "input": {"type": "prefix", "uri": "./images"},
        "model": {"type": "checkpoint", "architecture": "net:make", "weights": "./net.pth"},
        "task": {"type": "embedding"},
    }
    same = [
        "runtime.batch_size=3",
        "runtime.workers=2",
        "errors.max_rate=0.5",
        "output.uri=other",
        "name=other",
        "runtime.device=cpu",
        "storage.s3://.region=x",
        "input.require={min_images: 3}",
        "decode={}",
    ]
    assert all(read_small_job(override).fingerprint() == job.fingerprint() for override in same)
    others = [
        "runtime.precision=bf16",
        "task.normalize=true",
        "model.strict=false",
        "preprocess.resize=null",
        "decode.max_pixels=5",
        "input.recursive=true",
    ]
    assert all(read_small_job(override).fingerprint() != job.fingerprint() for override in others)


def test_fingerprint_does_not_depend_on_the_folder() -> None:
    here = Job.from_file(write(SMALL, "here/job.yaml"))
    there = Job.from_file(write(SMALL, "there/job.yaml"))
    assert here != there
    assert here.fingerprint() == there.fingerprint()
    assert json.loads(json.dumps(here.fingerprint())) == here.fingerprint()


def test_fingerprint_differences_name_both_values() -> None:
    here = read_small_job("model.weights=other.pth", "task.layer=fc").fingerprint()
    assert diff_fingerprints(read_small_job().fingerprint(), here) == [
        "model.weights: ./net.pth there, ./other.pth here",
        "task.layer: not set there, fc here",
    ]
    assert diff_fingerprints(here, here) == []


def test_serialized_job_is_restored_in_another_folder(tmp_path: Path) -> None:
    job = read_small_job("runtime.batch_size=7", "preprocess.crop=null", "storage.s3://.anonymous=true")
    document: dict[str, Any] = json.loads(json.dumps(job.serialize()))
    restored = Job.deserialize(document, tmp_path / "copy", tmp_path)
    assert restored.folder == tmp_path / "copy"
    assert isinstance(restored.model, CheckpointModel)
    assert restored.model.weights == str(tmp_path / "copy/net.pth")
    assert restored.input.uri == job.input.uri
    assert restored.output.uri == job.output.uri
    assert (restored.runtime, restored.preprocess, restored.storage) == (job.runtime, job.preprocess, job.storage)
    assert restored.fingerprint() == job.fingerprint()
    assert restored.serialize() == document


def test_paths_outside_the_folder_and_uris_are_not_changed(tmp_path: Path) -> None:
    job = Job.from_file(write(SMALL, "in/job.yaml"), overrides=["input.uri=far", "model.weights=s3://b/w.pth"])
    assert job.serialize()["input"]["uri"] == str(tmp_path / "far")
    assert job.serialize()["model"]["weights"] == "s3://b/w.pth"
    whole = Job.from_file(write(SMALL, "in/job.yaml"), overrides=["input.uri=in/"])
    assert whole.serialize()["input"]["uri"] == "./"
    assert Job.deserialize(whole.serialize(), tmp_path, tmp_path / "z").input.uri.rstrip("/") == str(tmp_path / "z")


def test_document_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="another version"):
        Job.deserialize({"input": {"type": "later"}}, tmp_path, tmp_path)


def test_job_built_in_python_resolves_paths_against_the_working_directory(tmp_path: Path) -> None:
    job = Job(
        input={"type": "prefix", "uri": "images"},
        model={"type": "torchvision", "name": "resnet18", "seed": 1},
        task={"type": "classification"},
        output={"uri": "out"},
    )
    assert job.folder == tmp_path
    assert job.output.uri == str(tmp_path / "out")
    assert job.fingerprint()["input"]["uri"] == "./images"


# --------------------------------------------------------------------------------------------------------- JSON schema


def test_json_schema_describes_every_section() -> None:
    schema = job_json_schema()
    assert schema["required"] == ["input", "model", "task", "output"]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Job.model_fields)
    runtime = schema["$defs"]["Runtime"]["properties"]
    assert all(described.get("description") for described in runtime.values())
    assert schema["properties"]["model"]["discriminator"]["propertyName"] == "type"
    json.dumps(schema)


def test_reading_a_job_loads_neither_torch_nor_ray() -> None:
    write(SMALL)
    look = "print(sys.modules.keys() & {'torch', 'ray'})"
    program = f"import sys; from batchjob.job.job import Job; Job.from_file('job.yaml'); {look}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "set()"
