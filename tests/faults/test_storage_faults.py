"""A store that throttles, resets, loses, truncates, falls silent, refuses or fills up: all rows right, or exit 75."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pytest
from batchjob_process import (
    Command,
    CompletedCommand,
    cifar_arguments,
    delete_lease,
    kill_on_exit,
    read_all_footers,
    read_rows,
    run_batchjob,
    start_batchjob,
    wait_until,
)
from fault_proxy import RESET, FaultProxy, RandomFaults, Reply, run_fault_proxy
from figures import Figure
from seaweed import Seaweed

from batchjob.output import commit
from batchjob.storage.store import open_store

SHARD = 50
PARTS = 1000 // SHARD
COMPARED = ["position", "uri", "label", "score", "error_stage"]

EXPIRED = Reply(400, b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>")
WITHDRAWN = Reply(403, b"<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message></Error>")


@pytest.fixture(scope="module")
def images(s3: Seaweed, test_data: Path) -> str:
    """The 1,000 real images on S3."""
    return put_images(s3, test_data / "cifar10/images", 1000)


@pytest.fixture(scope="module")
def clean(images: str, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Their rows as a run makes them that nothing befalls."""
    output = tmp_path_factory.mktemp("clean") / "out"
    ended = run_batchjob(*command(test_data, images, output))
    assert ended.exit_code == 0, ended.stderr
    return read_rows(output).select(COMPARED).sort_by("position")


@pytest.fixture
def gate(s3: Seaweed) -> Iterator[FaultProxy]:
    """What the runs take for their store."""
    with run_fault_proxy(s3.endpoint) as running:
        yield running


def put_images(s3: Seaweed, folder: Path, count: int) -> str:
    place = s3.bucket()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))[:count]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: s3.put(place + name, folder / name), names))
    return place


def command(data: Path, images: str, output: str | Path, *more: str) -> list[str]:
    settings = [f"input.uri={images}", f"runtime.shard_size={SHARD}", "runtime.tuning=off"]
    return [*cifar_arguments(data, output), *settings, *more]


def behind(gate: FaultProxy, patience: float = 2.0) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": gate.endpoint, "BATCHJOB_PATIENCE": f"{patience:g}"}


def has_parts(output: str, least: int) -> bool:
    return len(commit.list_parts(open_store(output))) >= least


def check_rows(output: str | Path, clean: pa.Table) -> None:
    """All as in the clean run, each once."""
    rows = read_rows(output).select(COMPARED).sort_by("position")
    assert rows["position"].to_pylist() == list(range(1000))
    assert rows["error_stage"].null_count == 1000
    assert rows.drop_columns("score").equals(clean.drop_columns("score"))
    for ours, theirs in zip(rows["score"].to_pylist(), clean["score"].to_pylist(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def check_ended_in_between(ended: CompletedCommand, output: str, clean: pa.Table) -> None:
    """Exit 75, no rows of faults, nothing of what is committed wrong."""
    assert (ended.exit_code, ended.json_result["status"]) == (75, "temporary"), ended.stderr
    assert "Traceback" not in ended.stderr
    parts = read_all_footers(output)
    assert sum(made.failed for made in parts.values()) == 0
    assert 0 < len(parts) < PARTS
    rows = read_rows(output)["position"].to_pylist()
    assert len(set(rows)) == len(rows) == len(parts) * SHARD
    expected = clean.filter(pa.compute.is_in(clean["position"], pa.array(rows)))
    found = read_rows(output).select(COMPARED).sort_by("position")
    assert found.drop_columns("score").equals(expected.drop_columns("score"))


def check_nothing_redone(output: str, before: dict[str, str]) -> dict[str, str]:
    """The attempts that made the parts; those before still stand."""
    attempts = {key: made.attempt for key, made in read_all_footers(output).items()}
    assert before.items() <= attempts.items(), "a committed part was made again"
    return attempts


# -- by chance ---------------------------------------------------------------------------------------------------


def test_many_faults_at_once_change_no_row(
    s3: Seaweed, gate: FaultProxy, images: str, clean: pa.Table, test_data: Path, seed: int, figure: Figure
) -> None:
    weather = RandomFaults(seed, throttled=0.20, reset=0.05, lost=0.10, truncated=0.05, late=0.05)
    gate.decide = weather
    output = s3.bucket() + "out"
    ended = run_batchjob(*command(test_data, images, output), env=behind(gate, 30))
    print(f"{ended.seconds:.1f} s, {len(gate.requests)} requests, {dict(weather.counts)}")
    assert (ended.exit_code, ended.json_result["predicted"], ended.json_result["failed"]) == (0, 1000, 0), ended.stderr
    check_rows(output, clean)
    assert len(read_all_footers(output)) == PARTS
    assert {key.split("/")[0] for key in s3.keys(output + "/")} == {"_SUCCESS", "_batchjob", "predictions"}
    assert {weather.counts[kind] > 20 for kind in ("503", "reset", "lost", "truncated")} == {True}
    met = ", ".join(f"{count} {kind}" for kind, count in weather.counts.most_common())
    figure("storage faults", f"1,000 of 1,000 rows right, 0 bad reads; of {len(gate.requests):,} requests {met}")


# -- outages -----------------------------------------------------------------------------------------------------


@contextmanager
def silent_after(gate: FaultProxy, output: str, parts: int, seconds: float) -> Iterator[list[float]]:
    """The store falls silent once so many parts are committed; yields for how long that was, once it is over."""
    over, lasted = threading.Event(), list[float]()

    def work() -> None:
        while not has_parts(output, parts) and not over.wait(0.05):
            pass
        began = time.monotonic()
        gate.decide = lambda method, path: RESET
        over.wait(seconds)
        gate.decide = lambda method, path: None
        lasted.append(time.monotonic() - began)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lasted
    finally:
        over.set()
        thread.join()


def ride_out(
    gate: FaultProxy, output: str, seconds: float, arguments: list[str], clean: pa.Table, patience: float
) -> CompletedCommand:
    with silent_after(gate, output, 2, seconds) as lasted:
        ended = run_batchjob(*arguments, env=behind(gate, patience), timeout=seconds + 240)
    print(f"{ended.seconds:.1f} s in all, silent for {lasted[0]:.1f} s\n{ended.stderr}")
    assert lasted[0] >= seconds, "the run ended before the outage did"
    assert (ended.exit_code, ended.json_result["predicted"], ended.json_result["failed"]) == (0, 1000, 0), ended.stderr
    check_rows(output, clean)
    return ended


def test_an_outage_is_ridden_out(
    s3: Seaweed, gate: FaultProxy, images: str, clean: pa.Table, test_data: Path, figure: Figure
) -> None:
    output = s3.bucket() + "out"
    arguments = command(test_data, images, output, "errors.outage_seconds=60", "errors.attempts=1")
    ride_out(gate, output, 12.0, arguments, clean, patience=2)
    figure("outage", "12 s of silence ridden out under errors.outage_seconds=60: all rows right, no attempt used up")


@pytest.mark.timeout(900)
def test_an_outage_of_five_minutes_is_ridden_out(
    s3: Seaweed, gate: FaultProxy, images: str, clean: pa.Table, test_data: Path, full_clocks: bool, figure: Figure
) -> None:
    """With no setting but the defaults."""
    if not full_clocks:
        pytest.skip("takes six minutes: BATCHJOB_FULL_CLOCKS=1")
    output = s3.bucket() + "out"
    ended = ride_out(gate, output, 300.0, command(test_data, images, output), clean, patience=30)
    figure("outage", f"300 s of silence ridden out under the defaults, the run took {ended.seconds:.0f} s")


# -- ends in between ---------------------------------------------------------------------------------------------


def falls_silent(gate: FaultProxy, driver: Command) -> None:
    gate.decide = lambda method, path: RESET


def expires(gate: FaultProxy, driver: Command) -> None:
    gate.decide = lambda method, path: EXPIRED


def is_withdrawn(gate: FaultProxy, driver: Command) -> None:
    gate.decide = lambda method, path: WITHDRAWN


def goes_away(gate: FaultProxy, driver: Command) -> None:
    gate.stop()


def falls_silent_and_is_stopped(gate: FaultProxy, driver: Command) -> None:
    gate.decide = lambda method, path: RESET
    threading.Event().wait(3.0)  # so that all of it waits for the store
    driver.process.send_signal(signal.SIGTERM)


def test_what_befalls_a_whole_store_leaves_no_rows_and_each_run_goes_on_where_the_last_one_ended(
    s3: Seaweed, images: str, clean: pa.Table, test_data: Path, figure: Figure
) -> None:
    """One output: five runs that end with exit 75, each after more parts than the one before; one completes."""
    output = s3.bucket() + "out"
    arguments = command(test_data, images, output, "errors.attempts=1")
    faults = {
        "outage": (falls_silent, "longer than errors.outage_seconds=6", 6),
        "systemic faults": (expires, "token expired (400)", 6),
        "systemic faults ": (is_withdrawn, "key withdrawn (403)", 6),
        "systemic faults  ": (goes_away, "endpoint gone", 6),
        "SIGTERM": (falls_silent_and_is_stopped, "in the middle of an outage", 360),
    }
    attempts: dict[str, str] = {}
    for promise, (befalls, words, seconds) in faults.items():
        with run_fault_proxy(s3.endpoint) as gate:
            driver = start_batchjob(*arguments, f"errors.outage_seconds={seconds}", env=behind(gate))
            with kill_on_exit(driver):
                wait_until(partial(has_parts, output, len(attempts) + 2), command=driver)
                befalls(gate, driver)
                began = time.monotonic()
                ended = driver.wait()
                took = time.monotonic() - began
        print(f"{words}: {took:.1f} s\n{ended.stderr}")
        check_ended_in_between(ended, output, clean)
        assert promise != "SIGTERM" or took <= 20
        attempts = check_nothing_redone(output, attempts)
        delete_lease(output)  # it could not be given back
        figure(promise.strip(), f"{words}: exit 75 after {took:.0f} s, 0 error rows, {len(attempts)} parts kept")
    ended = run_batchjob(*arguments)
    assert (ended.exit_code, ended.json_result["predicted"]) == (0, 1000), ended.stderr
    check_nothing_redone(output, attempts)
    check_rows(output, clean)


# -- a source that changes ---------------------------------------------------------------------------------------


def test_images_that_change_after_the_plan_are_told_apart(s3: Seaweed, test_data: Path, figure: Figure) -> None:
    folder = test_data / "cifar10/images"
    images, output = put_images(s3, folder, 200), s3.bucket() + "out"
    arguments = command(test_data, images, output, "errors.max_rate=1")
    assert run_batchjob("plan", *arguments[1:]).exit_code == 0
    keys = s3.keys(images)
    overwritten, deleted = keys[3::20], keys[7::20]
    for key in overwritten:
        s3.put(images + key, (folder / keys[0]).read_bytes())
    for key in deleted:
        s3.delete(images + key)
    ended = run_batchjob(*arguments)
    assert (ended.exit_code, ended.json_result["failed"]) == (0, 20), ended.stderr
    found = {row["uri"].removeprefix(images): row for row in read_rows(output).to_pylist()}
    for names, kind in ((overwritten, "changed"), (deleted, "deleted")):
        for name in names:
            row = found[name]
            assert (row["error_stage"], row["error_type"], row["label"]) == ("fetch", kind, None)
            assert f"{kind} since the plan was made" in row["error_message"]
            assert name in row["error_message"]
    assert Counter(row["error_type"] for row in found.values()) == {None: 180, "changed": 10, "deleted": 10}
    figure("source changed", "10 of 10 overwritten and 10 of 10 deleted images reported as such, 180 others right")


# -- full disks --------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, kib: int) -> Iterator[Path]:
    """A disk of its own with 1 MiB, of which so much is left."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk cannot be mounted here")
    try:
        (folder / "filler").write_bytes(bytes((1024 - kib) * 1024))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_spool_is_a_shards_error(test_data: Path, tmp_path: Path, figure: Figure) -> None:
    output = tmp_path / "out"
    arguments = [*cifar_arguments(test_data, output), "runtime.shard_size=1000", "runtime.tuning=off"]
    with mounted(tmp_path / "disk", kib=8) as disk:
        ended = run_batchjob(*arguments, env={"TMPDIR": str(disk)})
        print(ended.stderr)
        assert (ended.exit_code, ended.json_result["status"]) == (4, "incomplete"), ended.stderr
        assert f"{disk}/batchjob-" in ended.json_result["message"]
        assert "the disk is full" in ended.json_result["message"]
        assert "Traceback" not in ended.stderr
        assert visible(output) == []
        assert not list(disk.glob("batchjob-*")), "the room was not given back"
        (disk / "filler").unlink()
        again = run_batchjob(*arguments, env={"TMPDIR": str(disk)})
        assert (again.exit_code, again.json_result["predicted"]) == (0, 1000), again.stderr
    figure("disk full", "spool on a 1 MB disk: the shard's error, exit 4, nothing visible; with room it completes")


def test_a_full_output_is_an_error_and_shows_nothing(test_data: Path, tmp_path: Path, figure: Figure) -> None:
    with mounted(tmp_path / "disk", kib=96) as disk:
        output = disk / "out"
        arguments = [*cifar_arguments(test_data, output), "runtime.shard_size=1000", "runtime.tuning=off"]
        assert run_batchjob("plan", *arguments[1:]).exit_code == 0
        free = os.statvfs(disk)
        (disk / "more").write_bytes(bytes(max(0, free.f_bavail - 4) * free.f_bsize))
        ended = run_batchjob(*arguments)
        print(ended.stderr)
        assert (ended.exit_code, ended.json_result["status"]) == (4, "incomplete"), ended.stderr
        assert "the disk is full" in ended.json_result["message"]
        assert "Traceback" not in ended.stderr
        assert visible(output) == []
    figure("disk full", "output on a 1 MB disk: exit 4, nothing visible")


def test_an_output_that_is_read_only_is_said(test_data: Path, tmp_path: Path, figure: Figure) -> None:
    with mounted(tmp_path / "disk", kib=512) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        output = disk / "out"
        ended = run_batchjob(*cifar_arguments(test_data, output), "runtime.tuning=off")
        print(ended.stderr)
        assert (ended.exit_code, ended.json_result["status"]) == (2, "invalid"), ended.stderr
        assert f"{disk}" in ended.json_result["message"]
        assert "cannot be written" in ended.json_result["message"]
        assert visible(output) == []
    figure("disk full", "a read-only output: exit 2 with one sentence, nothing visible")


def visible(output: Path) -> list[str]:
    """What readers would see."""
    return [str(path) for path in output.rglob("*") if path.is_file() and "_batchjob" not in path.parts]
