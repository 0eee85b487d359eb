"""Images that kill, stop or bloat the process which decodes them: one error row each, every other row right, exit 0."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from batchjob_process import CompletedCommand, read_rows, write_slow_job
from driver_server import DriverServer
from figures import Figure

IMAGES, HANG_SECONDS = 1000, 2
CRASH_SECONDS, LOST_SECONDS = 5, 0.25  # the latter until a hung process is seen (0.1 s) and another one in its place

# What is done at a picture of one colour; the pictures that do no harm are of another.
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
PILLS = {
    "segv": (0, ("decode", "crash")),
    "exit": (1, ("decode", "crash")),
    "hang": (2, ("decode", "hang")),
    "eat": (3, ("transform", "memory")),  # its process lives on, and knows where memory ended
    "doze": (4, ("decode", "hang")),  # uses no CPU second, so that only the clock on the wall can tell
}


def write_job(folder: Path, pills: dict[int, str]) -> None:
    """A job over so many pictures, of which those at these positions are pills."""
    from PIL import Image

    write_slow_job(folder, IMAGES)
    (folder / "poison.py").write_text(DEADLY_TRANSFORM)
    for name, (shade, _) in PILLS.items():
        Image.new("RGB", (8, 8), (shade, 0, 51)).save(folder / f"{name}.png")
    names = [f"{pills[position]}.png" if position in pills else "tiny.png" for position in range(IMAGES)]
    (folder / "manifest.csv").write_text("\n".join(["file", *names, ""]))


def predict(driver_server: DriverServer, folder: Path) -> CompletedCommand:
    """Loader processes come from a fork server that runs: it takes longer to start than the rest takes."""
    command = ["run", str(folder / "job.yaml"), "--json", "preprocess={transform: poison:deadly}", "errors.max_rate=1"]
    command += ["runtime.loader.processes=2", f"runtime.loader.image_seconds={HANG_SECONDS}", "errors.attempts=1"]
    command += ["runtime.batch_size=25", "runtime.shard_size=100"]
    return driver_server.start(*command, loaders="shared").wait()


@pytest.fixture(scope="module")
def clean_seconds(driver_server: DriverServer, tmp_path_factory: pytest.TempPathFactory) -> float:
    """What the same job takes without a pill, by the second time."""
    seconds = 0.0
    for _ in range(2):
        folder = tmp_path_factory.mktemp("clean")
        write_job(folder, {})
        ended = predict(driver_server, folder)
        assert (ended.exit_code, ended.json_result["failed"]) == (0, 0), ended.stderr
        seconds = ended.seconds
    return seconds


@pytest.mark.parametrize("kind", list(PILLS))
def test_pills_are_one_error_row_each(
    kind: str, driver_server: DriverServer, tmp_path: Path, clean_seconds: float, seed: int, figure: Figure
) -> None:
    chance, told = random.Random(f"poison {seed} {kind}"), []
    hangs = PILLS[kind][1][1] == "hang"
    for count in (1, 3) if kind == "doze" else (1, 3, 10):
        folder = tmp_path / str(count)
        pills = dict.fromkeys(chance.sample(range(IMAGES), count), kind)
        write_job(folder, pills)
        ended = predict(driver_server, folder)
        assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
        deaths = ended.stderr.count("loader process ") + ended.stderr.count("is an error row")
        each = 2 * (HANG_SECONDS + LOST_SECONDS) if hangs else CRASH_SECONDS
        told.append(f"{count}: {deaths} processes lost, {ended.seconds:.1f} s")
        check_rows(folder, dict.fromkeys(pills, PILLS[kind][1]))
        assert deaths <= 2 * count
        assert ended.seconds <= 1.5 * clean_seconds + count * each
        assert "failed:" not in ended.stderr, "an attempt was used up"
    figure(
        "poison", f"{kind} in {IMAGES:,} images ({clean_seconds:.1f} s without): {'; '.join(told)}; all others right"
    )


def check_rows(folder: Path, faults: dict[int, tuple[str, str]]) -> None:
    rows = read_rows(folder / "out").to_pylist()
    assert [row["position"] for row in rows] == list(range(IMAGES))
    found = {row["position"]: (row["error_stage"], row["error_type"]) for row in rows if row["error_stage"]}
    assert found == faults
    right = [1.0, 0.0, 0.2]
    assert all(row["embedding"] == pytest.approx(right) for row in rows if row["error_stage"] is None)


def test_what_is_known_of_a_pill_outlives_the_run(driver_server: DriverServer, tmp_path: Path) -> None:
    """A second run of the same plan, from its first shard on, meets none of them."""
    pills = {5: "segv", 333: "exit", 777: "segv"}
    write_job(tmp_path, pills)
    assert predict(driver_server, tmp_path).exit_code == 0
    kept = sorted((tmp_path / "out/_batchjob/plans/0000/quarantine").iterdir())
    assert [json.loads(path.read_text())["position"] for path in kept] == sorted(pills)
    for part in (tmp_path / "out/predictions").iterdir():
        part.unlink()
    (tmp_path / "out/_SUCCESS").unlink()
    again = predict(driver_server, tmp_path)
    assert again.exit_code == 0, again.stderr
    assert Counter(again.stderr.split())["SIGSEGV"] == again.stderr.count("loader process") == 0
    check_rows(tmp_path, dict.fromkeys(pills, ("decode", "crash")))
