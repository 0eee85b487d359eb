"""Bad jobs and inputs end with one clear sentence and exit code 2, before any image is read or a plan is frozen."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchjob.cli.main import main
from tests.support.batchjob_process import read_all_footers, read_rows, run_batchjob
from tests.support.tiny_job import encode_red_image, write_tiny_job


class OpenedFiles:
    """Files in a folder that this process opened. An audit hook cannot be removed, only disabled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names, self.enabled = str(folder), set[str](), True
        sys.addaudithook(self._record_open)

    def _record_open(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.enabled and event == "open" and isinstance(arguments[0], str | bytes):
            path = os.fsdecode(arguments[0])
            if path.startswith(self.folder):
                self.names.add(path)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[OpenedFiles]:
    files = OpenedFiles(tmp_path / "images")
    yield files
    files.enabled = False


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid job of four images; each test breaks it in one place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").write_bytes(encode_red_image(format="PNG"))
    lines = "".join(f"images/{n}.png,{n},a,b,c\n" for n in range(4))
    write_tiny_job(tmp_path, "file,sku,uri,embedding,country\n" + lines)
    return tmp_path


def edit_job(old: str, new: str) -> Callable[[], None]:
    def edit() -> None:
        text = Path("job.yaml").read_text()
        assert old in text
        Path("job.yaml").write_text(text.replace(old, new))

    return edit


def write_other_checkpoint() -> None:
    import torch

    torch.save({"elsewhere.weight": torch.zeros(3)}, "net.pth")


def change_nothing() -> None:
    pass


BAD_JOBS: dict[str, tuple[Callable[[], None], list[str], list[str]]] = {
    "unknown and duplicate keys, all at once": (
        edit_job("task: {type: embedding}", "task: {type: embedding, lyer: x}\ntask: {type: embedding}\nimput: 1"),
        [],
        ["job.yaml:4:", "lyer", "did you mean 'layer'", "job.yaml:5:1", "task", "job.yaml:6:1", "input"],
    ),
    "missing input": (change_nothing, ["input.uri=none.csv"], ["none.csv", "input.uri"]),
    "missing folder": (change_nothing, ["input={type: prefix, uri: nowhere/}"], ["nowhere", "input.uri"]),
    "empty input": (
        change_nothing,
        ["input={type: prefix, uri: images/, include: ['*.tif']}"],
        ["images", "--allow-empty"],
    ),
    "missing weights": (
        change_nothing,
        ["model={type: checkpoint, architecture: resnet18, weights: none.pth}"],
        ["none.pth", "model.weights"],
    ),
    "wrong architecture": (
        write_other_checkpoint,
        ["model={type: checkpoint, architecture: resnet18, weights: net.pth}"],
        ["net.pth", "elsewhere.weight", "conv1.weight"],
    ),
    "unknown architecture": (
        write_other_checkpoint,
        ["model={type: checkpoint, architecture: resnet81, weights: net.pth}"],
        ["resnet81", "resnet18"],
    ),
    "unknown target": (change_nothing, ["model.target=net:man"], ["net.py", "'man'", "mean"]),
    "no conditional create": (change_nothing, ["output.uri=ftp://host/out/"], ["ftp://", "output.uri"]),
    "passthrough that is ours": (change_nothing, ["input.passthrough=[uri]"], ["uri", "passthrough"]),
    "passthrough that is the task's": (change_nothing, ["input.passthrough=[embedding]"], ["embedding", "passthrough"]),
    "passthrough that is the path's": (
        change_nothing,
        ["input.passthrough=[country]", "output.uri=country=de/out"],
        ["country", "clashes", "another name"],
    ),
    "unknown passthrough": (change_nothing, ["input.passthrough=[skew]"], ["skew", "sku", "manifest.csv"]),
    "no CUDA": (change_nothing, ["runtime.device=cuda"], ["runtime.device", "cuda"]),
    "inference mode": (change_nothing, ["model.target=net:differentiates"], ["grad_mode", "no_grad"]),
    "unknown layer": (change_nothing, ["task.layer=blok"], ["blok", "task.layer"]),
    "labels that do not fit": (change_nothing, ["task={type: classification, labels: [a, b]}"], ["labels", "2", "3"]),
}


@pytest.mark.parametrize("fault", BAD_JOBS)
def test_bad_job_ends_with_one_sentence_before_any_image_is_read(
    fault: str, bad: Path, opened: OpenedFiles, capfd: pytest.CaptureFixture[str]
) -> None:
    break_job, overrides, words = BAD_JOBS[fault]
    if fault == "no CUDA":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    break_job()
    opened.names.clear()
    code = main(["run", "job.yaml", "--json", "--quiet", *overrides])
    out, err = capfd.readouterr()
    print(f"{fault}: {err.strip()}")
    assert code == 2, err
    assert json.loads(out.splitlines()[-1]).items() >= {"status": "invalid", "exit_code": 2}.items()
    assert "Traceback" not in err
    missing = [word for word in words if word not in err]
    assert not missing, f"{err!r} does not say {missing}"
    assert opened.names == set(), "an image was read before the fault was found"
    assert not list(bad.rglob("predictions/*"))
    assert not list(bad.rglob("head.json"))


def test_good_job_reads_its_images(bad: Path, opened: OpenedFiles) -> None:
    assert main(["run", "job.yaml", "--quiet"]) == 0
    assert {Path(name).name for name in opened.names} == {"0.png", "1.png", "2.png", "3.png"}
    assert main(["run", "job.yaml", "--quiet", "output.uri=grad", "model.target=net:differentiates"]) == 2
    allowed = ["output.uri=grad", "model.target=net:differentiates", "runtime.grad_mode=no_grad"]
    assert main(["run", "job.yaml", "--quiet", *allowed]) == 0
    assert read_rows(bad / "grad")["embedding"].to_pylist()[0] == pytest.approx((2.0, 0.0, 0.4), abs=0.02)


def test_output_of_another_job_is_refused_with_the_differences(
    bad: Path, opened: OpenedFiles, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "job.yaml", "--quiet"]) == 0
    assert opened.names == set(), "planning reads no image"
    capfd.readouterr()
    for change, line in (
        ("task.normalize=true", "task.normalize: not set there"),
        ("preprocess.resize=[9, 8]", "preprocess.resize"),
        ("model.target=net:differentiates", "model.target: net:mean there, net:differentiates here"),
        ("input.uri=other.csv", "input.uri"),
    ):
        shutil.copy("manifest.csv", "other.csv")
        assert main(["run", "job.yaml", "--quiet", change]) == 2
        _, err = capfd.readouterr()
        assert line in err
        assert "belongs to another job" in err
        assert "discard" in err
    assert opened.names == set()
    for harmless in ("runtime.batch_size=3", "errors.max_rate=0.5", "runtime.loader.prefetch=3"):
        assert main(["plan", "job.yaml", "--quiet", harmless]) == 0


def test_required_input_that_does_not_exist_yet_is_temporary(bad: Path) -> None:
    for source in ("{type: manifest, uri: none.csv, uri_column: file}", "{type: prefix, uri: none/}"):
        whole = f"input={source[:-1]}, require: {{min_images: 3}}}}"
        ended = run_batchjob("run", "job.yaml", whole, "--json", cwd=bad)
        assert (ended.exit_code, ended.json_result["status"]) == (75, "temporary"), ended.stderr
        assert "not there yet" in ended.stderr or "nothing there yet" in ended.stderr


def test_requested_gpu_is_not_replaced_by_the_cpu(bad: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ended = run_batchjob("run", "job.yaml", "--json", "runtime.device=auto", "runtime.gpus_per_worker=1", cwd=bad)
    assert (ended.exit_code, ended.json_result["status"]) == (2, "invalid"), ended.stderr
    assert "runtime.gpus_per_worker is 1" in ended.stderr


def test_empty_input_can_be_allowed(bad: Path) -> None:
    empty = ["job.yaml", "input={type: prefix, uri: images/, include: ['*.tif']}"]
    ended = run_batchjob("run", *empty, "--allow-empty", "--json", cwd=bad)
    assert (ended.exit_code, ended.json_result["status"], ended.json_result["planned"]) == (0, "complete", 0), (
        ended.stderr
    )
    rows = read_rows(bad / "out")
    assert rows.num_rows == 0
    assert "embedding" in rows.column_names
    assert len(read_all_footers(bad / "out")) == 1
    assert (bad / "out/_SUCCESS").is_file()
