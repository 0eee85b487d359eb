"""Whole jobs on the local pool, over real images, held against plain PyTorch loops."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from commands import ROOT, Ended, cifar, ends, footers, right, run, start, table
from PIL import Image

import batchjob
from batchjob.cli import main

# -- Shown 2 and 7: CIFAR, with readers at the door ------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A run that readers looked into while it was at work."""

    ended: Ended
    output: Path
    seen: list[dict[str, int]]


def readers(folder: Path) -> dict[str, int]:
    """Rows that each common reader sees, with one plain call."""
    import duckdb
    import pandas as pd
    import polars as pl

    where = f"{folder}/"
    return {
        "duckdb": len(duckdb.sql(f"FROM read_parquet('{where}')").fetchall()),
        "polars": pl.read_parquet(where).height,
        "pandas": len(pd.read_parquet(where)),
        "pyarrow": pa.parquet.read_table(where).num_rows,
    }


@pytest.fixture(scope="module")
def watched(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    output = tmp_path_factory.mktemp("cifar") / "out"
    predictions = output / "predictions"
    seen = []
    with ends(start(*cifar(test_data, output, "runtime.shard_size=20"))) as command:
        while command.process.poll() is None:
            if predictions.is_dir() and any(predictions.iterdir()):
                seen.append(readers(predictions))
            else:
                time.sleep(0.01)
        ended = command.end()
    assert ended.code == 0, ended.err
    seen.append(readers(predictions))
    return Watched(ended, output, seen)


def test_a_thousand_real_images_are_as_right_as_in_the_plain_loop(watched: Watched) -> None:
    rows = table(watched.output)
    hits = right(rows)
    print(f"{rows.num_rows} rows, {hits} right, {watched.ended.seconds:.1f} s in all")
    assert rows.num_rows == 1000
    assert abs(hits - 804) <= 1
    assert rows["error_stage"].null_count == 1000
    assert set(rows["width"].to_pylist()) == {32}
    assert watched.ended.answer.keys() >= {
        *("status", "planned", "predicted", "failed", "seconds", "images_per_second", "output", "exit_code")
    }
    assert watched.ended.answer["status"] == "complete"
    success = json.loads((watched.output / "_SUCCESS").read_text())
    assert [part["rows"] for part in success["parts"]] == [20] * 50
    assert {part["name"] for part in success["parts"]} == footers(watched.output).keys()


def test_readers_see_whole_parts_from_the_first_on(watched: Watched) -> None:
    print(f"{len(watched.seen)} looks: {[look['duckdb'] for look in watched.seen]}")
    assert watched.seen[0]["duckdb"] < 1000, "no reader came in time to see the run at work"
    assert watched.seen[-1] == dict.fromkeys(("duckdb", "polars", "pandas", "pyarrow"), 1000)
    for reader in ("duckdb", "polars", "pandas", "pyarrow"):
        counts = [look[reader] for look in watched.seen]
        assert counts == sorted(counts)
        assert all(count % 20 == 0 for count in counts), "a part was seen before it was whole"


def test_a_finished_job_is_left_alone(watched: Watched, test_data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in watched.output.rglob("*")}
    ended = run(*cifar(test_data, watched.output, "runtime.shard_size=20"))
    print(f"a finished job again: {ended.seconds:.1f} s")
    assert (ended.code, ended.answer["status"]) == (0, "already_complete")
    assert before == {path: path.stat().st_mtime_ns for path in watched.output.rglob("*")}


def test_status_and_errors_agree_with_the_rows(watched: Watched) -> None:
    status = run("status", str(watched.output), "--json")
    print(f"batchjob status: {status.seconds:.2f} s")
    assert status.answer.items() >= {"status": "complete", "planned": 1000, "rows": 1000, "parts": 50}.items()
    assert run("errors", str(watched.output), "--json").answer["total"] == 0


def test_embeddings_are_those_of_a_plain_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from torchvision.transforms import Compose, Normalize, ToTensor

    ended = run(*cifar(test_data, tmp_path / "out", "task={type: embedding}"))
    assert ended.code == 0, ended.err
    rows = table(tmp_path / "out").sort_by("position")

    sys.path.insert(0, str(ROOT / "jobs/cifar10_resnet20"))
    try:
        from net import resnet20
    finally:
        sys.path.pop(0)
        sys.modules.pop("net", None)
    saved = torch.load(test_data / "cifar10/resnet20-12fca82f.th", map_location="cpu", weights_only=True)
    model = resnet20()
    model.load_state_dict({name.removeprefix("module."): value for name, value in saved["state_dict"].items()})
    model.eval()
    transform = Compose([ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    paths = sorted((test_data / "cifar10/images").rglob("*.jpg"))
    with torch.no_grad():
        logits = torch.cat([model(transform(Image.open(path).convert("RGB"))[None]) for path in paths]).numpy()

    assert [row.split("/")[-2:] for row in rows["uri"].to_pylist()] == [[p.parent.name, p.name] for p in paths]
    ours = np.stack(rows["embedding"].to_numpy(zero_copy_only=False))
    apart = np.abs(ours - logits).max()
    print(f"CIFAR: outputs at most {apart:.1e} from the plain loop's")
    assert apart < 1e-4


# -- Shown 5: photographs --------------------------------------------------------------------------------------

IMAGENET = """\
input: {type: prefix, uri: images/}
model: {type: torchvision, name: resnet18, seed: 0}
preprocess: {resize: 256, crop: 224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
task: {type: embedding}
runtime: {pool: local, device: cpu}
output: {uri: out}
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchvision")
def test_photographs_come_out_as_in_the_documented_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.models import ResNet18_Weights, resnet18

    (tmp_path / "job.yaml").write_text(IMAGENET)
    ended = run("run", str(tmp_path / "job.yaml"), f"input.uri={test_data}/imagenet-sample/", "--json")
    assert ended.code == 0, ended.err
    rows = table(tmp_path / "out").sort_by("position")

    transform = ResNet18_Weights.DEFAULT.transforms()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18().eval()
    paths = sorted(path for path in (test_data / "imagenet-sample").iterdir() if path.suffix.lower() == ".jpeg")
    with torch.no_grad():
        logits = [model(transform(decode_image(str(path), ImageReadMode.RGB))[None]) for path in paths]
    assert [row.rsplit("/", 1)[-1] for row in rows["uri"].to_pylist()] == [path.name for path in paths]
    ours = np.stack(rows["embedding"].to_numpy(zero_copy_only=False))
    apart = np.abs(ours - torch.cat(logits).numpy()).max()
    print(f"ImageNet sample: {rows.num_rows} rows in {ended.seconds:.1f} s, at most {apart:.1e} from the loop's")
    assert rows.num_rows == 300
    assert apart < 1e-3


# -- odd images ------------------------------------------------------------------------------------------------

MEAN_NET = """\
import torch
from torch import nn


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


class Differentiates(nn.Module):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((x * x).sum(), x)
        return slope.mean(dim=(2, 3))


def mean():
    return Mean()


def differentiates():
    return Differentiates()
"""

MEAN_JOB = """\
input: {type: manifest, uri: manifest.csv, uri_column: file}
model: {type: python, target: "net:mean"}
preprocess: {resize: [8, 8], crop: null, mean: null, std: null, exif: apply}
task: {type: embedding}
runtime: {pool: local, device: cpu, shard_size: 5, loader: {processes: 0}}
errors: {max_rate: 1}
output: {uri: out}
"""


def photo(**saved: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (255, 0, 51)).save(buffer, **saved)
    return buffer.getvalue()


def saved(image: Image.Image, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **how)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return photo(format="JPEG", exif=exif, quality=95)


def sixteen_bit() -> bytes:
    return saved(Image.fromarray(np.full((10, 10), 0x8080, dtype=np.uint16)), format="PNG")


def animated() -> bytes:
    frames = [Image.new("RGB", (10, 10), color) for color in ((255, 0, 51), (0, 255, 0))]
    return saved(frames[0], format="GIF", save_all=True, append_images=frames[1:])


def palette() -> bytes:
    return saved(Image.new("RGB", (10, 10), (255, 0, 51)).convert("P", palette=Image.Palette.ADAPTIVE), format="PNG")


RED = (1.0, 0.0, 0.2)
GREY = (0.5, 0.5, 0.5)
# name, bytes (None: no such file), (width, height) as stored, what the model sees, or the fault
ODD: list[tuple[str, bytes | None, tuple[int, int] | None, tuple[float, ...] | str]] = [
    ("plain.png", photo(format="PNG"), (40, 20), RED),
    ("cmyk.jpg", saved(Image.new("CMYK", (10, 10), (0, 255, 204, 0)), format="JPEG", quality=95), (10, 10), RED),
    ("sixteen.png", sixteen_bit(), (10, 10), GREY),
    ("palette.png", palette(), (10, 10), RED),
    ("animated.gif", animated(), (10, 10), RED),
    ("rotated.jpg", rotated(), (40, 20), RED),
    ("one.png", saved(Image.new("RGB", (1, 1), (255, 0, 51)), format="PNG"), (1, 1), RED),
    ("grey.jpg", saved(Image.new("L", (10, 10), 128), format="JPEG"), (10, 10), GREY),
    ("empty.jpg", b"", None, "decode/empty"),
    ("text.jpg", b"this is no image\n", None, "decode/not_an_image"),
    ("truncated.jpg", photo(format="JPEG")[:-200], None, "decode/truncated"),
    ("missing.jpg", None, None, "fetch/not_found"),
]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    for name, data, _, _ in ODD:
        if data is not None:
            (tmp_path / name).write_bytes(data)
    (tmp_path / "manifest.csv").write_text("file\n" + "".join(f"{name}\n" for name, *_ in ODD))
    (tmp_path / "net.py").write_text(MEAN_NET)
    (tmp_path / "job.yaml").write_text(MEAN_JOB)
    return tmp_path


def test_an_odd_image_is_one_row_predicted_or_explained(odd: Path) -> None:
    ended = run("run", "job.yaml", "--json", cwd=odd)
    assert ended.code == 0, ended.err
    rows = table(odd / "out").sort_by("position").to_pylist()
    assert [row["uri"] for row in rows] == [name for name, *_ in ODD]
    for row, (name, _, size, expected) in zip(rows, ODD, strict=True):
        fault = f"{row['error_stage']}/{row['error_type']}" if row["error_stage"] else None
        if isinstance(expected, str):
            assert (fault, row["embedding"]) == (expected, None), name
            assert row["error_message"], name
        else:
            assert (fault, row["error_message"]) == (None, None), name
            assert (row["width"], row["height"]) == size, name
            assert row["embedding"] == pytest.approx(expected, abs=0.02), name
    faults = sum(isinstance(expected, str) for *_, expected in ODD)
    assert ended.answer.items() >= {"predicted": len(ODD) - faults, "failed": faults}.items()
    counts = run("errors", "out", "--json", cwd=odd).answer
    assert counts["total"] == faults
    assert counts["by_type"] == dict.fromkeys((e for *_, e in ODD if isinstance(e, str)), 1)


# -- bad input -------------------------------------------------------------------------------------------------


class Opened:
    """Files that this process opened below a folder; an audit hook cannot be taken out, only switched off."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names, self.on = str(folder), set[str](), True
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str | bytes):
            path = os.fsdecode(arguments[0])
            if path.startswith(self.folder):
                self.names.add(path)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    watch = Opened(tmp_path / "images")
    yield watch
    watch.on = False


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound job of four images, which each test spoils in one place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").write_bytes(photo(format="PNG"))
    lines = "".join(f"images/{n}.png,{n},a,b,c\n" for n in range(4))
    (tmp_path / "manifest.csv").write_text("file,sku,uri,embedding,country\n" + lines)
    (tmp_path / "net.py").write_text(MEAN_NET)
    (tmp_path / "job.yaml").write_text(MEAN_JOB)
    return tmp_path


def spoil(old: str, new: str) -> Callable[[], None]:
    def do() -> None:
        text = Path("job.yaml").read_text()
        assert old in text
        Path("job.yaml").write_text(text.replace(old, new))

    return do


def checkpoint_of_another_net() -> None:
    import torch

    torch.save({"elsewhere.weight": torch.zeros(3)}, "net.pth")


def nothing() -> None:
    pass


BAD: dict[str, tuple[Callable[[], None], list[str], list[str]]] = {
    "unknown and duplicate keys, all at once": (
        spoil("task: {type: embedding}", "task: {type: embedding, lyer: x}\ntask: {type: embedding}\nimput: 1"),
        [],
        ["job.yaml:4:", "lyer", "did you mean 'layer'", "job.yaml:5:1", "task", "job.yaml:6:1", "input"],
    ),
    "missing input": (nothing, ["input.uri=none.csv"], ["none.csv", "input.uri"]),
    "missing folder": (nothing, ["input={type: prefix, uri: nowhere/}"], ["nowhere", "input.uri"]),
    "empty input": (nothing, ["input={type: prefix, uri: images/, include: ['*.tif']}"], ["images", "--allow-empty"]),
    "missing weights": (
        nothing,
        ["model={type: checkpoint, architecture: resnet18, weights: none.pth}"],
        ["none.pth", "model.weights"],
    ),
    "wrong architecture": (
        checkpoint_of_another_net,
        ["model={type: checkpoint, architecture: resnet18, weights: net.pth}"],
        ["net.pth", "elsewhere.weight", "conv1.weight"],
    ),
    "unknown architecture": (
        checkpoint_of_another_net,
        ["model={type: checkpoint, architecture: resnet81, weights: net.pth}"],
        ["resnet81", "resnet18"],
    ),
    "unknown target": (nothing, ["model.target=net:man"], ["net.py", "'man'", "mean"]),
    "no conditional create": (nothing, ["output.uri=ftp://host/out/"], ["ftp://", "output.uri"]),
    "passthrough that is ours": (nothing, ["input.passthrough=[uri]"], ["uri", "passthrough"]),
    "passthrough that is the task's": (nothing, ["input.passthrough=[embedding]"], ["embedding", "passthrough"]),
    "passthrough that is the path's": (
        nothing,
        ["input.passthrough=[country]", "output.uri=country=de/out"],
        ["country", "output"],
    ),
    "unknown passthrough": (nothing, ["input.passthrough=[skew]"], ["skew", "sku", "manifest.csv"]),
    "no CUDA": (nothing, ["runtime.device=cuda"], ["runtime.device", "cuda"]),
    "inference mode": (nothing, ["model.target=net:differentiates"], ["grad_mode", "no_grad"]),
    "unknown layer": (nothing, ["task.layer=blok"], ["blok", "task.layer"]),
    "labels that do not fit": (nothing, ["task={type: classification, labels: [a, b]}"], ["labels", "2", "3"]),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_clear_sentence_before_anything_is_read(
    fault: str, bad: Path, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    spoiled, overrides, words = BAD[fault]
    if fault == "no CUDA":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    spoiled()
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


def test_the_sound_job_reads_its_images(bad: Path, opened: Opened) -> None:
    assert main(["run", "job.yaml", "--quiet"]) == 0
    assert {Path(name).name for name in opened.names} == {"0.png", "1.png", "2.png", "3.png"}
    assert main(["run", "job.yaml", "--quiet", "output.uri=grad", "model.target=net:differentiates"]) == 2
    allowed = ["output.uri=grad", "model.target=net:differentiates", "runtime.grad_mode=no_grad"]
    assert main(["run", "job.yaml", "--quiet", *allowed]) == 0
    assert table(bad / "grad")["embedding"].to_pylist()[0] == pytest.approx((2.0, 0.0, 0.4), abs=0.02)


def test_an_output_of_another_job_is_refused_with_the_difference(
    bad: Path, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "job.yaml", "--quiet"]) == 0
    assert opened.names == set(), "planning reads no image"
    capfd.readouterr()
    for change, line in (
        ("task.normalize=true", "task.normalize: not set there, True here"),
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


def test_nothing_to_do_may_be_allowed(bad: Path) -> None:
    empty = ["job.yaml", "input={type: prefix, uri: images/, include: ['*.tif']}"]
    ended = run("run", *empty, "--allow-empty", "--json", cwd=bad)
    assert (ended.code, ended.answer["status"], ended.answer["planned"]) == (0, "complete", 0), ended.err
    rows = table(bad / "out")
    assert rows.num_rows == 0
    assert "embedding" in rows.column_names
    assert len(footers(bad / "out")) == 1
    assert (bad / "out/_SUCCESS").is_file()
    assert readers(bad / "out/predictions") == dict.fromkeys(("duckdb", "polars", "pandas", "pyarrow"), 0)


def test_a_plan_is_run_later_and_thrown_away_on_request(bad: Path) -> None:
    planned = run("plan", "job.yaml", "--json", "runtime.shard_size=2", cwd=bad).answer
    assert planned.items() >= {"status": "planned", "images": 4, "shards": 2}.items()
    assert run("status", "out", "--json", cwd=bad).answer["status"] == "incomplete"
    assert run("run", "job.yaml", "--json", cwd=bad).answer["status"] == "complete"
    assert {made.plan for made in footers(bad / "out").values()} == {planned["plan"]}
    assert len(footers(bad / "out")) == 2
    assert run("discard", "out", cwd=bad).code == 2
    assert run("discard", "out", "--yes", "--json", cwd=bad).answer["status"] == "discarded"
    assert not list((bad / "out/predictions").iterdir())
    again = run("run", "job.yaml", "--json", "task.normalize=true", cwd=bad)
    assert (again.code, again.answer["status"]) == (0, "complete"), again.err
    assert planned["plan"] not in {made.plan for made in footers(bad / "out").values()}


# -- from Python -----------------------------------------------------------------------------------------------

IN_PYTHON = """
import random, signal, sys, threading, warnings
import numpy, torch
from PIL import Image, ImageFile
import batchjob

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(5); random.seed(5); numpy.random.seed(5)
torch.set_grad_enabled({grad})

def state():
    return dict(
        threads=torch.get_num_threads(), dtype=torch.get_default_dtype(), device=torch.get_default_device(),
        grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled(),
        rng=torch.get_rng_state().tolist(), random=random.getstate(), numpy=numpy.random.get_state()[1].tolist(),
        matmul=torch.get_float32_matmul_precision(), cudnn=torch.backends.cudnn.benchmark,
        deterministic=torch.are_deterministic_algorithms_enabled(), autocast=torch.is_autocast_enabled("cpu"),
        sharing=torch.multiprocessing.get_sharing_strategy(), start=torch.multiprocessing.get_start_method(True),
        pixels=Image.MAX_IMAGE_PIXELS, truncated=ImageFile.LOAD_TRUNCATED_IMAGES, filters=list(warnings.filters),
        term=signal.getsignal(signal.SIGTERM), int=signal.getsignal(signal.SIGINT), path=list(sys.path),
    )

if __name__ == "__main__":
    before = state()
    job = batchjob.Job(
        input={{"type": "prefix", "uri": "images/"}},
        model={{"type": "torchvision", "name": "resnet18", "seed": 3}},
        preprocess={{"resize": 40, "crop": 32, "mean": None, "std": None}},
        task={{"type": "embedding"}},
        runtime={{"pool": "local", "device": "cpu", "loader": {{"processes": {processes}}}}},
        output={{"uri": "{out}"}},
    )
    outcome = batchjob.run(job)
    assert (outcome.status, outcome.predicted) == ("complete", 4), outcome
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, changed
    left = [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    assert not left, left
    print("unchanged")
"""


@pytest.mark.parametrize(("grad", "processes"), [(True, 0), (False, 1)])
def test_a_run_from_python_leaves_the_process_as_it_was(bad: Path, grad: bool, processes: int) -> None:
    (bad / "main.py").write_text(IN_PYTHON.format(grad=grad, processes=processes, out=f"out{processes}"))
    done = subprocess.run([sys.executable, "main.py"], cwd=bad, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "unchanged\n"), done.stderr
    ours = np.stack(table(bad / f"out{processes}")["embedding"].to_numpy(zero_copy_only=False))
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all()


def test_the_public_face_is_enough(bad: Path) -> None:
    job = batchjob.Job.from_file("job.yaml", {}, ["output.uri=again"])
    assert batchjob.run(job).status == "complete"
    assert batchjob.run(job).status == "already_complete"
