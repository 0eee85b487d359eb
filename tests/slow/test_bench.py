"""`batchjob bench` from the command line: all figures measured, no files left behind, plain messages."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchjob.cli.main import main

NET = """
from torch import nn


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(3, 4, 3), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(16))]
        self.body, self.head = nn.Sequential(*convolutions), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.body(x).mean(dim=(2, 3)))


def make():
    return Mean().eval()


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("no such luck")


def broken():
    return Broken()
"""
JOB = """\
input: {type: prefix, uri: images/}
model: {type: python, target: "net:make"}
preprocess: {resize: [16, 16], crop: null, mean: null, std: null}
task: {type: classification, labels: [a, b, c, d]}
runtime: {pool: local, device: cpu, batch_size: 3, tuning: "off"}
output: {uri: out}
"""
STAGES = ["list", "fetch", "decode", "transform", "collate", "H2D", "forward", "D2H", "write"]
STEPS = ["H2D", "forward", "D2H"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Working directory with a job of twelve images of noise, and a folder for temporary files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(12):
        pixels = noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02}.png")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "job.yaml").write_text(JOB)
    yield tmp_path
    tempfile.tempdir = None


def run_bench(capfd: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """Run a bench of the job; return its JSON."""
    assert main(["bench", "job.yaml", "--images", "24", *more, "--json"]) == 0, capfd.readouterr().err
    result: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    return result


def run_refused_bench(capfd: pytest.CaptureFixture[str], *more: str, code: int = 2) -> str:
    """Run a bench that fails; return its message, which is all that it prints."""
    assert main(["bench", "job.yaml", *more, "--json"]) == code
    out, err = capfd.readouterr()
    message: str = json.loads(out.splitlines()[-1])["message"]
    assert err.strip() == message
    return message


def list_files(folder: Path) -> set[Path]:
    """List the files of a folder, without caches."""
    return {path for path in folder.rglob("*") if not {"cache", "__pycache__"} & set(path.parts)}


def test_all_figures_are_measured_and_consistent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run_bench(capfd)
    assert (result["status"], result["exit_code"]) == ("measured", 0)
    assert (result["images"], result["distinct"], result["batch_size"]) == (24, 12, 3)
    stages = {stage["name"]: stage for stage in result["stages"]}
    assert list(stages) == STAGES
    for name in set(STAGES) - {"H2D", "D2H"}:
        assert stages[name]["images_per_second"] > 0
        assert stages[name]["cpu_ms"] >= 0
        assert stages[name]["gpu_ms"] is None
    assert stages["H2D"]["images_per_second"] is None
    assert "the device is the CPU" in stages["H2D"]["note"]
    sizes = [(folder / f"images/{number:02}.png").stat().st_size for number in range(12)]
    assert stages["fetch"]["bytes"] == pytest.approx(sum(sizes) / 12)
    assert (stages["decode"]["bytes"], stages["transform"]["bytes"]) == (20 * 24 * 3, 16 * 16 * 3)
    assert stages["write"]["bytes"] > 0

    rates = [ceiling["images_per_second"] for ceiling in result["ceilings"]]
    assert {ceiling["name"] for ceiling in result["ceilings"]} == {"cpu", "store"}
    assert rates == sorted(rates)
    assert result["tightest"] == result["ceilings"][0]["name"]
    cpu_ms = sum(stage["cpu_ms"] or 0 for name, stage in stages.items() if name != "list")
    cpu = next(ceiling for ceiling in result["ceilings"] if ceiling["name"] == "cpu")
    assert cpu["images_per_second"] == pytest.approx(result["cores"] / cpu_ms * 1e3)

    run = result["run"]
    assert (run["images"], run["failed"]) == (24, 0)
    assert 0 < run["load_s"] < run["first_batch_s"] < run["total_s"]
    assert 0 <= run["starvation"] <= 1
    assert set(run["busy"]) == {"fetch", "decode", "forward", "write"}
    assert result["share"] == pytest.approx(run["images_per_second"] / rates[0])
    assert result["verdict"].startswith("bottleneck: ")


def test_memory_and_steadiness_of_the_machine_are_measured(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run_bench(capfd, "runtime.loader.processes=1")
    assert result["memory"]["driver and worker"] > 50 << 20
    assert result["memory"]["loaders"] > 10 << 20
    before, after = result["calibration_ms"]
    assert result["drift"] == pytest.approx(after / before - 1)
    assert result["noisy"] is (abs(result["drift"]) > 0.05)


def test_text_begins_with_the_verdict_and_output_is_untouched(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = list_files(folder)
    assert main(["bench", "job.yaml", "--images", "12"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    starts = [line.split(":")[0] for line in err.splitlines()[:5]]
    assert starts == ["bottleneck", "to move it", "the run", "measured", "machine"]
    for words in (*STAGES, "each stage alone", "joint ceilings", "starvation", "memory at most"):
        assert words in err
    assert list_files(folder) == before


def test_profile_is_a_table_and_a_trace_with_a_track_for_each_stage(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run_bench(capfd, "--profile", "profile", "runtime.loader.processes=1")
    table, trace = map(Path, result["profile"])
    assert table.parent == folder / "profile"
    assert "Input Shapes" in table.read_text()
    events = json.loads(trace.read_text())["traceEvents"]
    starts = [event for event in events if event.get("cat") == "batchjob" and event["ph"] == "b"]
    assert {event["name"] for event in starts} == {"fetch", "decode", "wait", "forward", "write", "commit"}
    decode, forward = ([event for event in starts if event["name"] == name] for name in ("decode", "forward"))
    assert {event["pid"] for event in decode}.isdisjoint({event["pid"] for event in forward})
    steps = {name: [event["ts"] for event in events if event.get("name") == f"batchjob.{name}"] for name in STEPS}
    assert all(steps.values())
    # One clock for all processes: the steps that torch has timed lie within what the worker has timed.
    ends = [event["ts"] for event in events if event.get("cat") == "batchjob" and event["ph"] == "e"]
    assert min(event["ts"] for event in decode) < min(steps["forward"])
    assert min(event["ts"] for event in forward) - 1000 < min(steps["forward"]) < max(ends)


def test_error_rows_are_counted(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "images/03.png").write_bytes(b"no image")
    result = run_bench(capfd)
    assert (result["run"]["images"], result["run"]["failed"]) == (24, 2)
    assert result["share"] > 0


# -- bad input


def test_fewer_than_two_batches_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "lists 12: fewer than two batches of 7" in run_refused_bench(capfd, "runtime.batch_size=7")
    assert "--images 5: fewer than two batches of 3" in run_refused_bench(capfd, "--images", "5")
    (folder / "empty").mkdir()
    assert "no images there, so there is nothing to measure" in run_refused_bench(capfd, "input.uri=empty/")


def test_images_that_all_fail_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in (folder / "images").iterdir():
        path.write_bytes(b"no image")
    assert "12 images tried, each an error row: nothing can be measured" in run_refused_bench(capfd, "--images", "12")


def test_broken_model_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "RuntimeError: no such luck" in run_refused_bench(capfd, "model.target=net:broken")


def test_unwritable_profile_folder_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "--profile" in (message := run_refused_bench(capfd, "--images", "12", "--profile", "net.py"))
    assert "cannot be written" in message


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="a limit on files stands in for a full disk")
def test_full_disk_is_one_sentence(folder: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600));"
        "from batchjob.cli.main import main; sys.exit(main(['bench', 'job.yaml', '--images', '12', '--json']))"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 75, done.stderr
    assert "the disk is full, so nothing could be measured" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list((folder / "tmp").iterdir()) == []
