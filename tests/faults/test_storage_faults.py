"""Runs on a store that throttles, resets, truncates, falls silent, refuses or fills up: right rows, or exit 75."""

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

from batchjob.output import commit
from batchjob.storage.store import open_store
from tests.support.batchjob_process import (
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
from tests.support.fault_proxy import RESET, FaultProxy, RandomFaults, Reply, run_fault_proxy
from tests.support.figures import Figure
from tests.support.seaweed import Seaweed

SHARD = 50
PARTS = 1000 // SHARD
COMPARED = ["position", "uri", "label", "score", "error_stage"]

EXPIRED = Reply(400, b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>")
WITHDRAWN = Reply(403, b"<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message></Error>")


@pytest.fixture(scope="module")
def images(s3: Seaweed, test_data: Path) -> str:
    """URI of the 1,000 real images on S3."""
    return upload_images(s3, test_data / "cifar10/images", 1000)


@pytest.fixture(scope="module")
def expected_rows(images: str, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Rows of a run without faults."""
    output = tmp_path_factory.mktemp("clean") / "out"
    result = run_batchjob(*run_arguments(test_data, images, output))
    assert result.exit_code == 0, result.stderr
    return read_rows(output).select(COMPARED).sort_by("position")


@pytest.fixture
def proxy(s3: Seaweed) -> Iterator[FaultProxy]:
    """The proxy that the runs use as their store."""
    with run_fault_proxy(s3.endpoint) as running:
        yield running


def upload_images(s3: Seaweed, folder: Path, count: int) -> str:
    prefix = s3.bucket()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))[:count]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: s3.put(prefix + name, folder / name), names))
    return prefix


def run_arguments(data: Path, images: str, output: str | Path, *more: str) -> list[str]:
    settings = [f"input.uri={images}", f"runtime.shard_size={SHARD}", "runtime.tuning=off"]
    return [*cifar_arguments(data, output), *settings, *more]


def environment_through(proxy: FaultProxy, patience: float = 2.0) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": proxy.endpoint, "BATCHJOB_PATIENCE": f"{patience:g}"}


def has_parts(output: str, min_parts: int) -> bool:
    return len(commit.list_parts(open_store(output))) >= min_parts


def check_rows(output: str | Path, expected_rows: pa.Table) -> None:
    """Check that the rows are those of the run without faults, each once."""
    rows = read_rows(output).select(COMPARED).sort_by("position")
    assert rows["position"].to_pylist() == list(range(1000))
    assert rows["error_stage"].null_count == 1000
    assert rows.drop_columns("score").equals(expected_rows.drop_columns("score"))
    for ours, theirs in zip(rows["score"].to_pylist(), expected_rows["score"].to_pylist(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def check_interrupted_run(result: CompletedCommand, output: str, expected_rows: pa.Table) -> None:
    """Check for exit 75, no error rows, and correct committed parts."""
    assert (result.exit_code, result.json_result["status"]) == (75, "temporary"), result.stderr
    assert "Traceback" not in result.stderr
    parts = read_all_footers(output)
    assert sum(footer.failed for footer in parts.values()) == 0
    assert 0 < len(parts) < PARTS
    rows = read_rows(output)["position"].to_pylist()
    assert len(set(rows)) == len(rows) == len(parts) * SHARD
    expected = expected_rows.filter(pa.compute.is_in(expected_rows["position"], pa.array(rows)))
    found = read_rows(output).select(COMPARED).sort_by("position")
    assert found.drop_columns("score").equals(expected.drop_columns("score"))


def check_nothing_redone(output: str, before: dict[str, str]) -> dict[str, str]:
    """Return the attempt of each part; check that earlier parts are unchanged."""
    attempts = {key: footer.attempt for key, footer in read_all_footers(output).items()}
    assert before.items() <= attempts.items(), "a committed part was made again"
    return attempts


# -- random faults -----------------------------------------------------------------------------------------------


def test_random_faults_change_no_row(
    s3: Seaweed, proxy: FaultProxy, images: str, expected_rows: pa.Table, test_data: Path, seed: int, figure: Figure
) -> None:
    faults = RandomFaults(seed, throttled=0.20, reset=0.05, lost=0.10, truncated=0.05, late=0.05)
    proxy.decide = faults
    output = s3.bucket() + "out"
    result = run_batchjob(*run_arguments(test_data, images, output), env=environment_through(proxy, 30))
    print(f"{result.seconds:.1f} s, {len(proxy.requests)} requests, {dict(faults.counts)}")
    assert (result.exit_code, result.json_result["predicted"], result.json_result["failed"]) == (0, 1000, 0), (
        result.stderr
    )
    check_rows(output, expected_rows)
    assert len(read_all_footers(output)) == PARTS
    assert {key.split("/")[0] for key in s3.keys(output + "/")} == {"_SUCCESS", "_batchjob", "predictions"}
    assert {faults.counts[kind] > 20 for kind in ("503", "reset", "lost", "truncated")} == {True}
    met = ", ".join(f"{count} {kind}" for kind, count in faults.counts.most_common())
    figure("storage faults", f"1,000 of 1,000 rows right, 0 bad reads; of {len(proxy.requests):,} requests {met}")


# -- outages -----------------------------------------------------------------------------------------------------


@contextmanager
def silence_after(proxy: FaultProxy, output: str, parts: int, seconds: float) -> Iterator[list[float]]:
    """Silence the store once `parts` parts are committed; yield a list that gets the seconds that it was silent."""
    stopped, durations = threading.Event(), list[float]()

    def work() -> None:
        while not has_parts(output, parts) and not stopped.wait(0.05):
            pass
        began = time.monotonic()
        proxy.decide = lambda method, path: RESET
        stopped.wait(seconds)
        proxy.decide = lambda method, path: None
        durations.append(time.monotonic() - began)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield durations
    finally:
        stopped.set()
        thread.join()


def run_through_outage(
    proxy: FaultProxy, output: str, seconds: float, arguments: list[str], expected_rows: pa.Table, patience: float
) -> CompletedCommand:
    with silence_after(proxy, output, 2, seconds) as durations:
        result = run_batchjob(*arguments, env=environment_through(proxy, patience), timeout=seconds + 240)
    print(f"{result.seconds:.1f} s in all, silent for {durations[0]:.1f} s\n{result.stderr}")
    assert durations[0] >= seconds, "the run ended before the outage did"
    assert (result.exit_code, result.json_result["predicted"], result.json_result["failed"]) == (0, 1000, 0), (
        result.stderr
    )
    check_rows(output, expected_rows)
    return result


def test_short_outage_is_waited_out(
    s3: Seaweed, proxy: FaultProxy, images: str, expected_rows: pa.Table, test_data: Path, figure: Figure
) -> None:
    output = s3.bucket() + "out"
    arguments = run_arguments(test_data, images, output, "errors.outage_seconds=60", "errors.attempts=1")
    run_through_outage(proxy, output, 12.0, arguments, expected_rows, patience=2)
    figure("outage", "12 s of silence ridden out under errors.outage_seconds=60: all rows right, no attempt used up")


@pytest.mark.timeout(900)
def test_outage_of_five_minutes_is_waited_out(
    s3: Seaweed,
    proxy: FaultProxy,
    images: str,
    expected_rows: pa.Table,
    test_data: Path,
    full_clocks: bool,
    figure: Figure,
) -> None:
    """All settings have their defaults."""
    if not full_clocks:
        pytest.skip("takes six minutes: BATCHJOB_FULL_CLOCKS=1")
    output = s3.bucket() + "out"
    result = run_through_outage(
        proxy, output, 300.0, run_arguments(test_data, images, output), expected_rows, patience=30
    )
    figure("outage", f"300 s of silence ridden out under the defaults, the run took {result.seconds:.0f} s")


# -- interrupted runs --------------------------------------------------------------------------------------------


def go_silent(proxy: FaultProxy, driver: Command) -> None:
    proxy.decide = lambda method, path: RESET


def expire_token(proxy: FaultProxy, driver: Command) -> None:
    proxy.decide = lambda method, path: EXPIRED


def withdraw_key(proxy: FaultProxy, driver: Command) -> None:
    proxy.decide = lambda method, path: WITHDRAWN


def stop_endpoint(proxy: FaultProxy, driver: Command) -> None:
    proxy.stop()


def go_silent_and_stop_driver(proxy: FaultProxy, driver: Command) -> None:
    proxy.decide = lambda method, path: RESET
    threading.Event().wait(3.0)  # every thread waits for the store by then
    driver.process.send_signal(signal.SIGTERM)


def test_faults_of_the_whole_store_leave_no_error_rows_and_runs_resume(
    s3: Seaweed, images: str, expected_rows: pa.Table, test_data: Path, figure: Figure
) -> None:
    """On one output, five runs end with exit 75, each after more parts than the one before; the last one completes."""
    output = s3.bucket() + "out"
    arguments = run_arguments(test_data, images, output, "errors.attempts=1")
    faults = {
        "outage": (go_silent, "longer than errors.outage_seconds=6", 6),
        "systemic faults": (expire_token, "token expired (400)", 6),
        "systemic faults ": (withdraw_key, "key withdrawn (403)", 6),
        "systemic faults  ": (stop_endpoint, "endpoint gone", 6),
        "SIGTERM": (go_silent_and_stop_driver, "in the middle of an outage", 360),
    }
    attempts: dict[str, str] = {}
    for promise, (inject, words, seconds) in faults.items():
        with run_fault_proxy(s3.endpoint) as proxy:
            driver = start_batchjob(*arguments, f"errors.outage_seconds={seconds}", env=environment_through(proxy))
            with kill_on_exit(driver):
                wait_until(partial(has_parts, output, len(attempts) + 2), command=driver)
                inject(proxy, driver)
                began = time.monotonic()
                result = driver.wait()
                elapsed = time.monotonic() - began
        print(f"{words}: {elapsed:.1f} s\n{result.stderr}")
        check_interrupted_run(result, output, expected_rows)
        assert promise != "SIGTERM" or elapsed <= 20
        attempts = check_nothing_redone(output, attempts)
        delete_lease(output)  # the driver could not release it
        figure(promise.strip(), f"{words}: exit 75 after {elapsed:.0f} s, 0 error rows, {len(attempts)} parts kept")
    result = run_batchjob(*arguments)
    assert (result.exit_code, result.json_result["predicted"]) == (0, 1000), result.stderr
    check_nothing_redone(output, attempts)
    check_rows(output, expected_rows)


# -- a source that changes ---------------------------------------------------------------------------------------


def test_images_changed_after_the_plan_are_error_rows(s3: Seaweed, test_data: Path, figure: Figure) -> None:
    folder = test_data / "cifar10/images"
    images, output = upload_images(s3, folder, 200), s3.bucket() + "out"
    arguments = run_arguments(test_data, images, output, "errors.max_rate=1")
    assert run_batchjob("plan", *arguments[1:]).exit_code == 0
    keys = s3.keys(images)
    overwritten, deleted = keys[3::20], keys[7::20]
    for key in overwritten:
        s3.put(images + key, (folder / keys[0]).read_bytes())
    for key in deleted:
        s3.delete(images + key)
    result = run_batchjob(*arguments)
    assert (result.exit_code, result.json_result["failed"]) == (0, 20), result.stderr
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
def mount_small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """Mount a disk of 1 MiB on which `kib` KiB are free."""
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


def test_full_scratch_disk_fails_the_shard(test_data: Path, tmp_path: Path, figure: Figure) -> None:
    output = tmp_path / "out"
    arguments = [*cifar_arguments(test_data, output), "runtime.shard_size=1000", "runtime.tuning=off"]
    with mount_small_disk(tmp_path / "disk", kib=8) as disk:
        result = run_batchjob(*arguments, env={"TMPDIR": str(disk)})
        print(result.stderr)
        assert (result.exit_code, result.json_result["status"]) == (4, "incomplete"), result.stderr
        assert f"{disk}/batchjob-" in result.json_result["message"]
        assert "the disk is full" in result.json_result["message"]
        assert "Traceback" not in result.stderr
        assert list_visible_files(output) == []
        assert not list(disk.glob("batchjob-*")), "the room was not given back"
        (disk / "filler").unlink()
        again = run_batchjob(*arguments, env={"TMPDIR": str(disk)})
        assert (again.exit_code, again.json_result["predicted"]) == (0, 1000), again.stderr
    figure("disk full", "spool on a 1 MB disk: the shard's error, exit 4, nothing visible; with room it completes")


def test_full_output_disk_leaves_nothing_visible(test_data: Path, tmp_path: Path, figure: Figure) -> None:
    with mount_small_disk(tmp_path / "disk", kib=96) as disk:
        output = disk / "out"
        arguments = [*cifar_arguments(test_data, output), "runtime.shard_size=1000", "runtime.tuning=off"]
        assert run_batchjob("plan", *arguments[1:]).exit_code == 0
        free = os.statvfs(disk)
        (disk / "more").write_bytes(bytes(max(0, free.f_bavail - 4) * free.f_bsize))
        result = run_batchjob(*arguments)
        print(result.stderr)
        assert (result.exit_code, result.json_result["status"]) == (4, "incomplete"), result.stderr
        assert "the disk is full" in result.json_result["message"]
        assert "Traceback" not in result.stderr
        assert list_visible_files(output) == []
    figure("disk full", "output on a 1 MB disk: exit 4, nothing visible")


def test_read_only_output_is_reported(test_data: Path, tmp_path: Path, figure: Figure) -> None:
    with mount_small_disk(tmp_path / "disk", kib=512) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        output = disk / "out"
        result = run_batchjob(*cifar_arguments(test_data, output), "runtime.tuning=off")
        print(result.stderr)
        assert (result.exit_code, result.json_result["status"]) == (2, "invalid"), result.stderr
        assert f"{disk}" in result.json_result["message"]
        assert "cannot be written" in result.json_result["message"]
        assert list_visible_files(output) == []
    figure("disk full", "a read-only output: exit 2 with one sentence, nothing visible")


def list_visible_files(output: Path) -> list[str]:
    """Return the files that readers would see."""
    return [str(path) for path in output.rglob("*") if path.is_file() and "_batchjob" not in path.parts]
