"""Files that a job names: a finished output whose weights, code, labels or manifest are others now is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchjob import api
from batchjob.driver import driver
from batchjob.driver.job_files import JobFiles, find_changed_files
from batchjob.driver.progress import NoProgress
from batchjob.errors import InvalidJob, Temporary
from batchjob.job.job import Job
from batchjob.models.huggingface import HuggingfaceModel
from batchjob.models.onnx import OnnxModel
from batchjob.models.pickle import PickleModel
from batchjob.plan.head import read_current_head
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerEvent, WorkerFailed
from tests.support.scripted_pool import ScriptedPool, make_job

IMAGES = ["0.png", "1.png", "bad.png"]
SECTIONS: dict[str, Any] = {
    "input": {"type": "manifest", "uri": "list.csv", "uri_column": "file"},
    "model": {"type": "checkpoint", "architecture": "net:build", "weights": "weights/net.pt"},
    "preprocess": {"transform": "steps:resize"},
    "task": {"type": "classification", "labels": "labels.txt"},
    "errors": {"max_rate": 1.0},
}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job whose every section names files; they are never loaded."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "net.pt").write_bytes(b"weights 1")
    (tmp_path / "list.csv").write_text("file\n" + "".join(f"images/{name}\n" for name in IMAGES))
    (tmp_path / "steps.py").write_text("from parts import blocks\ndef resize(image):\n    return image\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "blocks.py").write_text("SIZE = 8\n")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    return make_job(tmp_path, IMAGES, **SECTIONS)


def run(job: Job, pool: ScriptedPool | None = None, *, retry: bool = False) -> str:
    def make_pool() -> ScriptedPool:
        assert pool is not None, "no worker is needed for this"
        return pool

    return driver.run(job, make_pool, allow_empty=False, progress=NoProgress(), retry=retry).status


def fail_worker_late(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
    """Lose the worker some turns after the first shard was committed."""
    yield from [None] * 20
    yield WorkerFailed(Temporary("Ray is gone"))


def replace_content(path: Path) -> None:
    """Write other bytes: a source stays one, any other file keeps its length."""
    data = path.read_bytes()
    path.write_bytes(b"# changed\n" + data if path.suffix == ".py" else data[:-2] + b"#\n")


NAMES = [
    "weights/net.pt", "list.csv", "labels.txt", "net.py", "steps.py", "parts/blocks.py",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_finished_output_made_with_another_file_is_refused(tmp_path: Path, job: Job, name: str) -> None:
    assert run(job, ScriptedPool()) == "complete"
    assert run(job) == "already_complete"
    replace_content(tmp_path / name)
    with pytest.raises(InvalidJob, match=rf"other files.*\n  \./{name}: .* bytes, sha256 .* there, .* here\n.*--fresh"):
        run(job)


def test_validate_notices_another_file_before_it_loads_the_model(tmp_path: Path, job: Job) -> None:
    run(job, ScriptedPool())
    replace_content(tmp_path / "net.py")
    with pytest.raises(InvalidJob, match=r"other files.*\n  \./net\.py: "):
        api.validate(job)


@pytest.mark.parametrize("name", NAMES)
def test_file_of_another_time_but_the_same_content_is_the_same(tmp_path: Path, job: Job, name: str) -> None:
    run(job, ScriptedPool())
    os.utime(tmp_path / name, (1, 1))
    assert run(job) == "already_complete"


@pytest.mark.parametrize("name", ["list.csv", "weights/net.pt", "labels.txt"])
def test_complete_output_outlives_the_files_it_was_made_with(tmp_path: Path, job: Job, name: str) -> None:
    run(job, ScriptedPool())
    (tmp_path / name).unlink()
    assert run(job) == "already_complete"


def test_copied_job_folder_is_the_same_job(tmp_path: Path, job: Job) -> None:
    run(job, ScriptedPool())
    shutil.copytree(tmp_path, tmp_path / "copy", copy_function=shutil.copy)
    assert run(Job.from_file(tmp_path / "copy" / "job.yaml")) == "already_complete"


def test_added_import_is_a_change(tmp_path: Path, job: Job) -> None:
    run(job, ScriptedPool())
    (tmp_path / "extra.py").write_text("")
    assert run(job) == "already_complete"
    (tmp_path / "parts" / "blocks.py").write_text("import extra\n")
    with pytest.raises(InvalidJob, match=r"\./extra\.py: not there, 0 bytes.*here\n  \./parts/blocks\.py: "):
        run(job)


def test_half_done_output_is_resumed_with_its_files_only(tmp_path: Path, job: Job) -> None:
    with pytest.raises(Temporary):
        run(job, ScriptedPool({1: [fail_worker_late]}))
    (tmp_path / "labels.txt").write_text("dog\ncat\n")
    with pytest.raises(InvalidJob, match=r"\./labels\.txt"):
        run(job)


def test_resumed_run_does_not_hash_again_what_the_plan_has_recorded(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Temporary):
        run(job, ScriptedPool({1: [fail_worker_late]}))
    calls: list[JobFiles] = []

    def make_record(files: JobFiles) -> bytes:
        calls.append(files)
        return b"{}"

    monkeypatch.setattr(JobFiles, "make_record", make_record)
    assert run(job, ScriptedPool()) == "complete"
    assert calls == []


def test_output_that_lacks_only_success_is_finished_with_its_files_only(tmp_path: Path, job: Job) -> None:
    run(job, ScriptedPool())
    (tmp_path / "out" / "_SUCCESS").unlink()
    (tmp_path / "labels.txt").write_text("dog\ncat\n")
    with pytest.raises(InvalidJob, match=r"\./labels\.txt"):
        run(job)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    # The plan is frozen: its images are those of the manifest that was planned.
    replace_content(tmp_path / "list.csv")
    assert run(job) == "complete"


def test_retry_needs_the_model_and_no_manifest(tmp_path: Path, job: Job) -> None:
    run(job, ScriptedPool())
    replace_content(tmp_path / "list.csv")
    assert run(job, ScriptedPool(), retry=True) == "complete"
    replace_content(tmp_path / "net.py")
    (tmp_path / "out" / "_SUCCESS").unlink()
    with pytest.raises(InvalidJob, match=r"\./net\.py"):
        run(job, retry=True)


def test_output_without_a_record_is_accepted(tmp_path: Path, job: Job) -> None:
    run(job, ScriptedPool())
    (record,) = (tmp_path / "out").glob("_batchjob/plans/0000/files/*")
    record.unlink()
    replace_content(tmp_path / "net.py")
    assert run(job) == "already_complete"


def test_record_belongs_to_the_files_of_the_first_worker(tmp_path: Path, job: Job) -> None:
    # A driver that looked at other files and was killed before a worker began leaves no trace of them.
    driver.make_plan(job, allow_empty=False, progress=NoProgress())
    replace_content(tmp_path / "net.py")
    run(job, ScriptedPool())
    assert run(job) == "already_complete"


def test_file_in_a_bucket_is_compared_by_its_tag(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    run(job, ScriptedPool())
    store = open_store(job.output.uri)
    _, head = read_current_head(store)
    assert head is not None
    (record,) = (tmp_path / "out").glob("_batchjob/plans/0000/files/*")
    document = json.loads(record.read_text())
    remote = "s3://models/net.pt"
    facts = {"size": 9, "etag": "tag-1", "sha256": None, "is_input": False}
    files = JobFiles(job)
    for etag, here, changed in [("tag-1", 9, False), ("tag-2", 9, True), (None, 9, False), (None, 10, True)]:
        record.write_text(json.dumps({remote: facts | {"etag": etag}}))
        monkeypatch.setattr(files, "facts", {remote: files._look_at(str(tmp_path / "weights" / "net.pt"))})
        monkeypatch.setattr(files, "id", "another")
        object.__setattr__(files.facts[remote], "etag", "tag-1")
        object.__setattr__(files.facts[remote], "size", here)
        assert bool(find_changed_files(store, head, files, with_input=True)) is changed
    record.write_text(json.dumps(document))


def write_pickle(path: Path, module: str) -> None:
    """Write what `torch.save` writes of an object of a class in that module."""
    data = b"\x80\x02c" + module.encode() + b"\nNet\n)\x81."
    pickle.dumps(data)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("net/data.pkl", data)
        archive.writestr("net/data/0", bytes(64))
    path.write_bytes(content.getvalue())


@pytest.mark.parametrize(
    ("module", "main", "expected"),
    [
        ("parts.blocks", None, ["parts/__init__.py", "parts/blocks.py"]),
        ("__main__", "net", ["net.py"]),
        ("torchvision.models.resnet", None, []),
    ],
)
@pytest.mark.usefixtures("job")
def test_pickled_module_names_its_sources(tmp_path: Path, module: str, main: str | None, expected: list[str]) -> None:
    write_pickle(tmp_path / "net.pt", module)
    model = PickleModel(weights=str(tmp_path / "net.pt"), main=main, trust=True, sha256="0" * 64)
    files = model.list_files(Reader(), tmp_path)
    assert files == [str(tmp_path / name) for name in ["net.pt", *expected]]


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut off", b"\x80\x02K\x01."])
def test_damaged_pickle_is_left_to_whoever_loads_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.pt").write_bytes(content)
    model = PickleModel(weights=str(tmp_path / "net.pt"), trust=True, sha256="0" * 64)
    assert model.list_files(Reader(), tmp_path) == [str(tmp_path / "net.pt")]
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
        archive.writestr("net/data.pkl", b"junk")
    assert model.list_files(Reader(), tmp_path) == [str(tmp_path / "net.pt")]


def test_graph_counts_where_onnx_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.onnx").write_bytes(b"graph")
    monkeypatch.setattr("batchjob.models.onnx.find_spec", lambda _: None)
    model = OnnxModel(weights=str(tmp_path / "net.onnx"))
    assert model.list_files(Reader(), tmp_path) == [str(tmp_path / "net.onnx")]


def test_model_folder_counts_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "README.md"):
        (folder / name).write_text("{}")
    model = HuggingfaceModel(model=str(folder))
    names = [Path(uri).name for uri in model.list_files(Reader(), tmp_path)]
    assert names == ["model.safetensors", "config.json", "preprocessor_config.json"]
    assert HuggingfaceModel(model="google/vit-base-patch16-224").list_files(Reader(), tmp_path) == []


def name_in_arguments(folder: Path) -> dict[str, Any]:
    (folder / "data.bin").write_bytes(b"1234")
    return {"model": {"type": "python", "target": "net:build", "arguments": {"paths": ["data.bin", "no file"]}}}


def name_in_task_arguments(folder: Path) -> dict[str, Any]:
    (folder / "data.bin").write_bytes(b"1234")
    arguments = {"table": {"path": str(folder / "data.bin")}}
    return {"task": {"type": "python", "target": "net:build", "fields": {"x": "float32"}, "arguments": arguments}}


@pytest.mark.parametrize("name", [name_in_arguments, name_in_task_arguments])
def test_file_named_in_arguments_counts(tmp_path: Path, name: Callable[[Path], dict[str, Any]]) -> None:
    job = make_job(tmp_path, ["0.png"], **name(tmp_path))
    run(job, ScriptedPool())
    (tmp_path / "data.bin").write_bytes(b"4321")
    with pytest.raises(InvalidJob, match=r"\./data\.bin"):
        run(job)
