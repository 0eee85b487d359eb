"""Settings built in Python: a wrong value raises InvalidJob with the sentences of a job file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchjob import (
    ClassificationTask,
    InvalidJob,
    Job,
    Output,
    PrefixSource,
    Preprocess,
    PythonModel,
    Runtime,
    TorchvisionModel,
)

SECTIONS: dict[str, Any] = {
    "input": PrefixSource(uri="photos"),
    "model": TorchvisionModel(name="resnet18", seed=0),
    "task": ClassificationTask(),
    "output": Output(uri="out"),
}
# What is built, and every line of the message.
FAULTS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "a misspelt field": (
        lambda: TorchvisionModel(nmae="resnet18", seed=0),  # type: ignore[call-arg]
        ["TorchvisionModel.nmae: not a field of TorchvisionModel; did you mean 'name'?"],
    ),
    "several faults": (
        lambda: Runtime(pool="lokal", batch_size=0, loader={"proceses": 2}),
        [
            "Runtime.pool: must be 'ray' or 'local', not 'lokal'; did you mean 'local'?",
            "Runtime.batch_size: must be at least 1 or 'auto', not 0",
            "Runtime.loader.proceses: not a field of loader; did you mean 'processes'?",
        ],
    ),
    "sections of a job": (
        lambda: Job(**(SECTIONS | {"model": {"type": "torchvision", "nmae": "x"}, "runtime": {"batch": 3}})),
        [
            "Job.model.nmae: not a field of this model; did you mean 'name'?",
            "Job.runtime.batch: not a field of runtime; did you mean 'batch_size'?",
        ],
    ),
    "missing sections": (
        lambda: Job(**{name: SECTIONS[name] for name in ("input", "model")}),
        ["Job.task: is missing", "Job.output: is missing"],
    ),
    "settings of another kind": (
        lambda: Job(**(SECTIONS | {"input": ClassificationTask()})),
        ["Job.input.type: 'classification' is no input that this version has; it has prefix, manifest"],
    ),
    "a path object": (
        lambda: Output(uri=Path("out")),
        ["Output.uri: must be text, not a PosixPath; write str(path)"],
    ),
    "a contradiction": (
        lambda: TorchvisionModel(name="resnet18", weights="DEFAULT", seed=1),
        ["TorchvisionModel: weights and seed exclude each other; leave one out"],
    ),
    "a target that is no name": (
        lambda: PythonModel(target="net"),
        ["PythonModel.target: must read 'module:attribute', a module beside the job file and a name in it"],
    ),
}


@pytest.mark.parametrize(("build", "lines"), FAULTS.values(), ids=FAULTS)
def test_wrong_settings_raise_the_sentences_of_a_job_file(build: Callable[[], object], lines: list[str]) -> None:
    with pytest.raises(InvalidJob) as raised:
        build()
    assert raised.value.message.splitlines() == lines
    assert raised.value.exit_code == 2
    assert raised.value.__cause__ is None


def test_relative_paths_resolve_against_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job(**(SECTIONS | {"input": PrefixSource(uri="photos"), "output": Output(uri="../out")}))
    assert job.input.uri == str(tmp_path / "photos")
    assert job.output.uri == str(tmp_path.parent / "out")
    assert job.folder == tmp_path


def test_settings_never_change() -> None:
    runtime = Runtime(batch_size=4)
    with pytest.raises(InvalidJob, match=r"Runtime\.batch_size: settings never change"):
        runtime.batch_size = 8  # type: ignore[misc]
    assert runtime.batch_size == 4


def test_settings_that_were_built_count_as_set_in_a_job() -> None:
    job = Job(**(SECTIONS | {"preprocess": Preprocess(resize=8, crop=8)}))
    assert job.fingerprint()["preprocess"] == {"resize": 8, "crop": 8}
    assert job.fingerprint()["model"] == {"type": "torchvision", "name": "resnet18", "seed": 0}


def test_credentials_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_notARealTokenButLongEnough")
    model = PythonModel(target="net:build", arguments={"token": "hf_notARealTokenButLongEnough"})
    with pytest.raises(
        InvalidJob, match=r"^Job\.model\.arguments\.token: holds the value of .* HF_TOKEN; .*leave it there$"
    ):
        Job(**(SECTIONS | {"model": model}))
