"""Images that kill, hang or bloat the process which decodes them: one error row each, all other rows right, exit 0."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.support.batchjob_process import CompletedCommand, read_rows, write_slow_job
from tests.support.driver_server import DriverServer
from tests.support.figures import Figure

IMAGES, HANG_SECONDS = 1000, 2
CRASH_SECONDS = 5
REPLACE_SECONDS = 0.25  # until a hung process is noticed (0.1 s) and replaced

# The red value of a picture decides the harm that it does; the harmless pictures have another one.
DEADLY_TRANSFORM = """\
import os
import signal
import time


def deadly(image):
    match int(image[0, 0, 0]):
        case 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 1:
            os._exit(9)
        case 2:
            while True:
                pass
        case 3:
            bytearray(8 << 30)[::4096] = b"x" * (2 << 20)
        case 4:
            time.sleep(600)
    return image.float() / 255
"""
POISONS = {
    "segv": (0, ("decode", "crash")),
    "exit": (1, ("decode", "crash")),
    "hang": (2, ("decode", "hang")),
    "eat": (3, ("transform", "memory")),  # its process survives and reports the lack of memory
    "doze": (4, ("decode", "hang")),  # uses no CPU time, so that only the wall clock notices
}


def write_job(folder: Path, poisons: dict[int, str]) -> None:
    """Write a job whose pictures at these positions are poison images."""
    from PIL import Image

    write_slow_job(folder, IMAGES)
    (folder / "poison.py").write_text(DEADLY_TRANSFORM)
    for name, (shade, _) in POISONS.items():
        Image.new("RGB", (8, 8), (shade, 0, 51)).save(folder / f"{name}.png")
    names = [f"{poisons[position]}.png" if position in poisons else "tiny.png" for position in range(IMAGES)]
    (folder / "manifest.csv").write_text("\n".join(["file", *names, ""]))


def run_job(driver_server: DriverServer, folder: Path) -> CompletedCommand:
    """Run the job with loader processes from a running fork server, whose start would take longer than the job."""
    command = ["run", str(folder / "job.yaml"), "--json", "preprocess={transform: poison:deadly}", "errors.max_rate=1"]
    command += ["runtime.loader.processes=2", f"runtime.loader.image_seconds={HANG_SECONDS}", "errors.attempts=1"]
    command += ["runtime.batch_size=25", "runtime.shard_size=100"]
    return driver_server.start(*command, loaders="shared").wait()


@pytest.fixture(scope="module")
def clean_seconds(driver_server: DriverServer, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds of the same job without poison images, in its second run."""
    seconds = 0.0
    for _ in range(2):
        folder = tmp_path_factory.mktemp("clean")
        write_job(folder, {})
        ended = run_job(driver_server, folder)
        assert (ended.exit_code, ended.json_result["failed"]) == (0, 0), ended.stderr
        seconds = ended.seconds
    return seconds


@pytest.mark.parametrize("kind", list(POISONS))
def test_poison_images_are_one_error_row_each(
    kind: str, driver_server: DriverServer, tmp_path: Path, clean_seconds: float, seed: int, figure: Figure
) -> None:
    rng, results = random.Random(f"poison {seed} {kind}"), []
    hangs = POISONS[kind][1][1] == "hang"
    for count in (1, 3) if kind == "doze" else (1, 3, 10):
        folder = tmp_path / str(count)
        poisons = dict.fromkeys(rng.sample(range(IMAGES), count), kind)
        write_job(folder, poisons)
        ended = run_job(driver_server, folder)
        assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
        deaths = ended.stderr.count("loader process ") + ended.stderr.count("is an error row")
        seconds_each = 2 * (HANG_SECONDS + REPLACE_SECONDS) if hangs else CRASH_SECONDS
        results.append(f"{count}: {deaths} processes lost, {ended.seconds:.1f} s")
        check_rows(folder, dict.fromkeys(poisons, POISONS[kind][1]))
        assert deaths <= 2 * count
        assert ended.seconds <= 1.5 * clean_seconds + count * seconds_each
        assert "failed:" not in ended.stderr, "an attempt was used up"
    figure(
        "poison", f"{kind} in {IMAGES:,} images ({clean_seconds:.1f} s without): {'; '.join(results)}; all others right"
    )


def check_rows(folder: Path, expected: dict[int, tuple[str, str]]) -> None:
    rows = read_rows(folder / "out").to_pylist()
    assert [row["position"] for row in rows] == list(range(IMAGES))
    errors = {row["position"]: (row["error_stage"], row["error_type"]) for row in rows if row["error_stage"]}
    assert errors == expected
    right = [1.0, 0.0, 0.2]
    assert all(row["embedding"] == pytest.approx(right) for row in rows if row["error_stage"] is None)


def test_quarantine_outlives_the_run(driver_server: DriverServer, tmp_path: Path) -> None:
    """A second run of the same plan, from its first shard on, tries none of the poison images."""
    poisons = {5: "segv", 333: "exit", 777: "segv"}
    write_job(tmp_path, poisons)
    assert run_job(driver_server, tmp_path).exit_code == 0
    records = sorted((tmp_path / "out/_batchjob/plans/0000/quarantine").iterdir())
    assert [json.loads(path.read_text())["position"] for path in records] == sorted(poisons)
    for part in (tmp_path / "out/predictions").iterdir():
        part.unlink()
    (tmp_path / "out/_SUCCESS").unlink()
    again = run_job(driver_server, tmp_path)
    assert again.exit_code == 0, again.stderr
    assert Counter(again.stderr.split())["SIGSEGV"] == again.stderr.count("loader process") == 0
    check_rows(tmp_path, dict.fromkeys(poisons, ("decode", "crash")))
