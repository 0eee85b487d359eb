"""`batchjob bench` as a person or a script meets it: every figure measured, nothing left behind, plain sentences."""

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
from jpeg_files import decode_files, encode_jpeg, make_photograph
from PIL import Image
from test_bench_figures import Spent

from batchjob.bench.bottleneck import Ceiling, compute_ceilings, explain_bottleneck
from batchjob.bench.results import Calibration
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a job of twelve images of noise; its temporary files have a place of their own."""
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


def measured(capfd: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """What a bench of the job answers to a machine."""
    assert main(["bench", "job.yaml", "--images", "24", *more, "--json"]) == 0, capfd.readouterr().err
    found: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    return found


def refused(capfd: pytest.CaptureFixture[str], *more: str, code: int = 2) -> str:
    """The sentence that a bench ends with, and nothing else."""
    assert main(["bench", "job.yaml", *more, "--json"]) == code
    out, err = capfd.readouterr()
    message: str = json.loads(out.splitlines()[-1])["message"]
    assert err.strip() == message
    return message


def files(folder: Path) -> set[Path]:
    """What lies there, caches left out."""
    return {path for path in folder.rglob("*") if not {"cache", "__pycache__"} & set(path.parts)}


def test_every_figure_is_there_and_fits_the_others(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = measured(capfd)
    assert (found["status"], found["exit_code"]) == ("measured", 0)
    assert (found["images"], found["distinct"], found["batch_size"]) == (24, 12, 3)
    stages = {stage["name"]: stage for stage in found["stages"]}
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

    rates = [ceiling["images_per_second"] for ceiling in found["ceilings"]]
    assert {ceiling["name"] for ceiling in found["ceilings"]} == {"cpu", "store", "disk"}
    assert rates == sorted(rates)
    assert found["tightest"] == found["ceilings"][0]["name"]
    spent = sum(stage["cpu_ms"] or 0 for stage in stages.values())
    cpu = next(ceiling for ceiling in found["ceilings"] if ceiling["name"] == "cpu")
    assert cpu["images_per_second"] == pytest.approx(found["cores"] / spent * 1e3)

    run = found["run"]
    assert (run["images"], run["failed"]) == (24, 0)
    assert 0 < run["load_s"] < run["first_batch_s"] < run["total_s"]
    assert 0 <= run["starvation"] <= 1
    assert 0 <= run["ready"] <= 1
    assert set(run["services"]) == {"fetch", "decode", "forward", "write"}
    assert found["share"] == pytest.approx(run["images_per_second"] / rates[0])
    assert [rung["name"].split()[0] for rung in found["ladder"]] == ["synthetic", "decoded", "encoded", "full,"]
    assert all(rung["images_per_second"] > 0 for rung in found["ladder"])
    assert found["ladder"][-1]["images_per_second"] == run["images_per_second"]
    assert found["verdict"].startswith("bottleneck: ")


def test_modes_memory_and_calibration(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = measured(capfd, "runtime.loader.processes=1")
    modes = {mode["name"]: mode for mode in found["modes"]}
    assert list(modes) == ["gradients on", "no_grad", "inference_mode"]
    assert all(mode["ms"] > 0 for mode in modes.values())
    assert modes["gradients on"]["bytes"] > modes["no_grad"]["bytes"] >= modes["inference_mode"]["bytes"] > 0
    if sys.platform == "linux":
        memory = {peak["processes"]: peak for peak in found["memory"]}
        assert memory["loaders"]["count"] == 1
        assert memory["driver and worker (one process)"]["rss"] > 50 << 20
    steady = found["calibration"]
    assert steady["drift"] == pytest.approx(steady["after_ms"] / steady["before_ms"] - 1)
    assert steady["noisy"] is (abs(steady["drift"]) > 0.05)


def test_a_person_reads_the_same_and_the_job_s_output_is_not_touched(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    assert main(["bench", "job.yaml", "--images", "12"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    for words in (*STAGES, "joint ceilings", "ladder", "starvation", "inference_mode", "calibration", "not measured"):
        assert words in err
    assert err.splitlines()[-1].startswith("bottleneck: ")
    assert {
        path for path in folder.rglob("*") if "cache" not in path.parts and "__pycache__" not in path.parts
    } == before
    assert not list(Path("/dev/shm").glob("batchjob-bench-*"))


def test_the_profile_is_a_table_and_a_trace_with_a_track_for_each_stage(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = measured(capfd, "--profile", "profile", "runtime.loader.processes=1")
    table, trace = map(Path, found["profile"])
    assert table.parent == folder / "profile"
    assert "Input Shapes" in table.read_text()
    events = json.loads(trace.read_text())["traceEvents"]
    titles = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event.get("name") == "thread_name"
    }
    ours = [event for event in events if event.get("cat") == "batchjob"]
    tracks = {titles[event["pid"], event["tid"]] for event in ours}
    assert tracks >= {"fetch", "decode", "H2D", "forward", "D2H", "write"}
    assert all(event["dur"] >= 0 for event in ours)
    pids = {name: {event["pid"] for event in ours if event["name"] == name} for name in ("decode", "forward")}
    assert pids["decode"].isdisjoint(pids["forward"])
    forward = [event["ts"] for event in ours if event["name"] == "forward"]
    decode = [event["ts"] for event in ours if event["name"] == "decode"]
    assert min(decode) < min(forward), "one clock for all processes"


def test_a_device_that_decodes_has_a_line_a_track_and_a_service(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.worker.loader_setup.create_jpeg_decoder", lambda device: decode_files)
    for number in range(12):
        (folder / f"images/{number:02}.png").write_bytes(encode_jpeg(make_photograph(number)))
    found = measured(capfd, "--profile", "profile", "decode.mode=fast", "decode.device=cuda")
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert stages["device decode"]["images_per_second"] > 0
    assert found["run"]["services"]["device decode"]["images_per_second"] > 0
    events = json.loads(Path(found["profile"][1]).read_text())["traceEvents"]
    assert {"fetch", "device decode", "forward"} <= {one["name"] for one in events if one.get("cat") == "batchjob"}


def test_error_rows_are_counted_and_measured_around(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "images/03.png").write_bytes(b"no image")
    found = measured(capfd)
    assert (found["run"]["images"], found["run"]["failed"]) == (24, 2)
    assert found["share"] > 0


def test_a_compiled_or_exported_thing_is_not_run_with_gradients(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4)).eval()
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(linear, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=(batch,))
    torch.export.save(program, folder / "net.pt2")
    digest = subprocess.run(["sha256sum", "net.pt2"], capture_output=True, text=True, check=True).stdout.split()[0]
    model = f'{{type: exported, weights: net.pt2, trust: true, sha256: "{digest}"}}'
    Path("job.yaml").write_text(JOB.replace('{type: python, target: "net:make"}', model))
    found = measured(capfd)
    assert {mode["ms"] for mode in found["modes"]} == {None}
    assert "runs as it was saved" in found["modes"][0]["note"]


# -- bad input -------------------------------------------------------------------------------------------------


def test_an_empty_or_tiny_set_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "lists 12: fewer than two batches of 7" in refused(capfd, "runtime.batch_size=7")
    assert "--images 5: fewer than two batches of 3" in refused(capfd, "--images", "5")
    (folder / "empty").mkdir()
    assert "no images there, so there is nothing to measure" in refused(capfd, "input.uri=empty/")


def test_images_that_all_fail_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in (folder / "images").iterdir():
        path.write_bytes(b"no image")
    assert "12 images tried, each an error row: nothing can be measured" in refused(capfd, "--images", "12")


def test_a_broken_model_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "RuntimeError: no such luck" in refused(capfd, "model.target=net:broken")


def test_a_profile_that_cannot_be_written_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "--profile" in (said := refused(capfd, "--images", "12", "--profile", "net.py"))
    assert "cannot be written" in said


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="a limit on files stands in for a full disk")
def test_a_full_disk_is_said_in_one_sentence(folder: Path) -> None:
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


# -- arithmetic ------------------------------------------------------------------------------------------------


def spent(**cpu_ms: float | None) -> list[Spent]:
    known: dict[str, float | None] = dict.fromkeys(("fetch", "decode", "transform", "collate", "forward", "write"), 0.0)
    return [Spent(name, ms, bytes=1000.0) for name, ms in (known | cpu_ms).items()]


def test_the_cpu_ceiling_is_cores_over_the_sum_of_cpu_seconds() -> None:
    (cpu,) = compute_ceilings(spent(decode=2.5, forward=4.0), 2)
    assert (cpu.name, cpu.words) == ("cpu", "2 cores ÷ 6.50 ms of CPU an image")
    assert cpu.images_per_second == pytest.approx(2 / 0.0065)


def test_a_ceiling_whose_figures_are_not_all_measured_is_left_out() -> None:
    assert compute_ceilings(spent(decode=None, forward=4.0), 2) == ()
    assert [one.name for one in compute_ceilings(spent(decode=None), 2, store_images_per_second=10.0)] == ["store"]
    assert compute_ceilings(spent(), 2, store_images_per_second=None, disk_bytes_per_second=None) == ()
    assert "not measured" in explain_bottleneck(10.0, (), spent(), starvation=None, loader_processes=0, on_cpu=True)


def test_the_tightest_comes_first() -> None:
    stages = [*spent(decode=2.0), Spent("H2D", 0.1, 0.05), Spent("D2H", 0.1, 0.1)]
    stages[4] = Spent("forward", 0.2, 0.4)
    found = compute_ceilings(stages, 16, store_images_per_second=9000.0, disk_bytes_per_second=5e6)
    rates = {one.name: one.images_per_second for one in found}
    assert rates == {
        "gpu": pytest.approx(2500),
        "disk": pytest.approx(5000),
        "cpu": pytest.approx(16e3 / 2.3),
        "store": 9000.0,
        "link": pytest.approx(20_000),
    }
    assert [one.name for one in found] == ["gpu", "disk", "cpu", "store", "link"]


@pytest.mark.parametrize(
    ("rate", "starvation", "on_cpu", "words"),
    [
        (95.0, 0.5, True, "the CPU, of which decode takes 75%"),
        (50.0, 0.4, True, "loading; the forward loop waited 40% of its time"),
        (50.0, 0.01, True, "the forward loop itself"),
    ],
)
def test_the_sentence_names_what_holds_the_run_back(rate: float, starvation: float, on_cpu: bool, words: str) -> None:
    stages = spent(decode=7.5, forward=2.5)
    found = compute_ceilings(stages, 1)
    said = explain_bottleneck(rate, found, stages, starvation=starvation, loader_processes=1, on_cpu=on_cpu)
    assert words in said
    assert "runtime." in said or "preprocess." in said
    assert f"{rate:.0f}% of the tightest ceiling (cpu)" in said


def test_cores_that_others_took_are_not_put_down_to_a_setting() -> None:
    stages = spent(decode=2.5, forward=7.5)
    said = explain_bottleneck(
        20.0,
        compute_ceilings(stages, 2),
        stages,
        starvation=0.0,
        loader_processes=2,
        on_cpu=True,
        cores=2,
        cores_busy=0.5,
    )
    assert "bottleneck: cores; the run had 0.5 of 2 on average" in said


@pytest.mark.parametrize("name", ["gpu", "link", "store", "disk"])
def test_each_ceiling_names_a_setting(name: str) -> None:
    said = explain_bottleneck(
        100.0, [Ceiling(name, 100.0, "")], spent(), starvation=0.0, loader_processes=2, on_cpu=False
    )
    assert any(setting in said for setting in ("runtime.", "TMPDIR"))


def test_drift_of_more_than_5_percent_is_noisy() -> None:
    assert not Calibration(10.0, 10.4).noisy
    assert Calibration(10.0, 10.6).noisy
    assert Calibration(10.0, 9.4).noisy
