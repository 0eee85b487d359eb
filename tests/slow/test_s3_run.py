"""Runs with input, manifest and output on a real S3 server: killed, cut off, and with wrong credentials."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.output import commit
from batchjob.storage.store import open_store
from tests.support.batchjob_process import (
    Command,
    CompletedCommand,
    cifar_arguments,
    count_correct_labels,
    delete_lease,
    filter_alive,
    find_actors,
    kill,
    kill_on_exit,
    list_plan_heads,
    read_all_footers,
    read_rows,
    run_batchjob,
    start_batchjob,
    wait_until,
)
from tests.support.fault_proxy import RESET, run_fault_proxy
from tests.support.seaweed import Seaweed

SHARD = 50
PARTS = 1000 // SHARD


@pytest.fixture(scope="module")
def data_uri(s3: Seaweed, test_data: Path) -> str:
    """URI of the 1,000 real images on S3, with a manifest of their labels: `images/`, `manifest/part-N.parquet`."""
    data_uri = s3.bucket()
    folder = test_data / "cifar10/images"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: s3.put(f"{data_uri}images/{name}", folder / name), names))
    for number in range(2):
        half_names = names[number * 500 : (number + 1) * 500]
        rows = {
            "image": [f"../images/{name}" for name in half_names],
            "truth": [name.split("/")[0] for name in half_names],
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(rows), buffer)
        s3.put(f"{data_uri}manifest/part-{number}.parquet", buffer.getvalue())
    return data_uri


# -- killed drivers ----------------------------------------------------------------------------------------------


@dataclass
class OutputState:
    """The committed parts of an output, compared with those of the last check."""

    output: str
    attempts: dict[str, str] = field(default_factory=dict)
    etags: dict[str, str | None] = field(default_factory=dict)

    def count(self) -> int:
        return len(commit.list_parts(open_store(self.output)))

    def has_parts(self, min_parts: int) -> bool:
        return self.count() >= min_parts

    def check_unchanged(self) -> int:
        """Check that earlier parts were neither deleted nor written again; return the number of parts."""
        attempts = {key: footer.attempt for key, footer in read_all_footers(self.output).items()}
        etags = {info.uri: info.etag for info in open_store(self.output).list("predictions/")}
        assert self.attempts.items() <= attempts.items(), "a committed part was done again"
        assert self.etags.items() <= etags.items(), "a committed part was written again"
        self.attempts, self.etags = attempts, etags
        return len(attempts)


def kill_driver(
    command: list[str], committed: OutputState, moment: Callable[[], Any], env: Mapping[str, str] | None = None
) -> None:
    """Run until `moment` is true, kill the driver, and check the output once all its actors have ended."""
    before = len(committed.attempts)
    with kill_on_exit(start_batchjob(*command, env=env)) as driver:
        wait_until(moment, command=driver)
        actors = find_actors(driver)
        kill(driver)
    wait_until(lambda: not filter_alive(actors), timeout=60)
    delete_lease(committed.output)
    print(
        f"driver killed with {committed.check_unchanged()} of {PARTS} parts committed, "
        f"{before} of them by drivers before it"
    )


def check_complete_output(s3: Seaweed, result: CompletedCommand, committed: OutputState) -> None:
    """Check for 1,000 rows of one plan, none twice, with the usual accuracy, and no partial files beside them."""
    output = committed.output
    assert (result.exit_code, result.json_result["status"]) == (0, "complete"), result.stderr
    assert committed.check_unchanged() == PARTS
    rows = read_rows(output)
    hits = count_correct_labels(rows)
    print(f"then to the end: {rows.num_rows} rows, each image once, {hits} right")
    assert abs(hits - 804) <= 1
    assert len(list_plan_heads(output)) == 1
    assert set(rows["run_id"].to_pylist()) == {footer.plan for footer in read_all_footers(output).values()}
    assert {key.split("/")[0] for key in s3.keys(output)} == {"_SUCCESS", "_batchjob", "predictions"}
    assert not [key for key in s3.keys(output) if key.startswith("_batchjob") and key.endswith(".parquet")]


def test_run_on_s3_completes_after_several_killed_drivers(s3: Seaweed, data_uri: str, test_data: Path) -> None:
    committed = OutputState(s3.bucket() + "killed/")
    command = [
        *cifar_arguments(test_data, committed.output),
        f"input.uri={data_uri}images/",
        f"runtime.shard_size={SHARD}",
    ]
    kill_driver(command, committed, lambda: list_plan_heads(committed.output))
    for min_parts in (2, 9):
        kill_driver(command, committed, partial(committed.has_parts, min_parts))
    with run_fault_proxy(
        s3.endpoint
    ) as gate:  # the proxy refuses `_SUCCESS`, so that all parts are committed without it
        gate.decide = lambda method, path: RESET if method == "PUT" and path.endswith("/_SUCCESS") else None
        env = {"AWS_ENDPOINT_URL": gate.endpoint}
        kill_driver(command, committed, lambda: any(gate.decide(*request) for request in gate.requests), env)
    assert committed.count() == PARTS
    check_complete_output(s3, run_batchjob(*command), committed)
    assert run_batchjob(*command).json_result["status"] == "already_complete"


def kill_actor(driver: Command, committed: OutputState, min_parts: int, earlier: set[int]) -> int:
    """Kill an actor that was not killed before, once `least` parts are committed."""

    def list_new_actors() -> list[int]:
        return sorted({pid for pid, _ in find_actors(driver)} - earlier)

    wait_until(lambda: committed.count() >= min_parts and list_new_actors(), command=driver)
    victim = list_new_actors()[0]
    os.kill(victim, signal.SIGKILL)
    print(f"actor killed with {committed.check_unchanged()} of {PARTS} parts committed")
    return victim


def test_ray_run_on_s3_completes_after_killed_actors_and_drivers(
    s3: Seaweed, data_uri: str, test_data: Path, ray_environment: dict[str, str]
) -> None:
    committed = OutputState(s3.bucket() + "killed/")
    command = [
        *cifar_arguments(test_data, committed.output),
        f"input.uri={data_uri}images/",
        f"runtime.shard_size={SHARD}",
    ]
    command += ["runtime.pool=ray", "runtime.batch_size=1"]  # slow enough to be killed at work
    kill_driver(command, committed, lambda: list_plan_heads(committed.output), ray_environment)
    kill_driver(command, committed, lambda: committed.count() >= 3, ray_environment)
    with kill_on_exit(start_batchjob(*command, env=ray_environment)) as driver:
        victims: set[int] = set()
        for min_parts in (0, 6, 12):  # once while it loads, twice at work
            victims.add(kill_actor(driver, committed, min_parts, victims))
        result = driver.wait()
    assert "was lost" in result.stderr
    check_complete_output(s3, result, committed)


# -- manifests and unreachable stores ----------------------------------------------------------------------------


def test_manifest_on_s3_passes_its_columns_through(s3: Seaweed, data_uri: str, test_data: Path) -> None:
    output = s3.bucket() + "dt=2026-11-19/"
    source = "input={type: manifest, uri: %smanifest/, uri_column: image, passthrough: [truth]}" % data_uri  # noqa: UP031
    result = run_batchjob(*cifar_arguments(test_data, output, source))
    assert (result.exit_code, result.json_result["planned"]) == (0, 1000), result.stderr
    rows = read_rows(output).sort_by("position")
    assert count_correct_labels(rows) == sum(
        a == b for a, b in zip(*rows.select(["label", "truth"]).to_pydict().values(), strict=True)
    )
    assert rows["uri"][0].as_py().startswith("../images/")
    assert rows["etag"].null_count == 0
    print(f"manifest on S3: {result.seconds:.1f} s, {len(read_all_footers(output))} parts")
    status = run_batchjob("status", output, "--json")
    assert status.json_result.items() >= {"status": "complete", "rows": 1000, "parts": 10}.items()


def test_wrong_credentials_commit_nothing(s3: Seaweed, data_uri: str, test_data: Path) -> None:
    wrong = {"AWS_SECRET_ACCESS_KEY": "wrong"}
    output = s3.bucket()
    command = [*cifar_arguments(test_data, output), f"input.uri={data_uri}images/"]
    result = run_batchjob(*command, env=wrong)
    print(result.stderr)
    assert (result.exit_code, result.json_result["status"]) == (75, "temporary"), result.stderr
    assert "Traceback" not in result.stderr
    assert s3.keys(output) == []


@pytest.mark.parametrize("fault", ["expired", "cut off"])
def test_unreachable_images_are_no_error_rows(
    fault: str, s3: Seaweed, data_uri: str, test_data: Path, tmp_path: Path
) -> None:
    """The plan is written, then the images cannot be read. The output is local, so that it can still be checked."""
    command = [*cifar_arguments(test_data, tmp_path / "out"), f"input.uri={data_uri}images/"]
    assert run_batchjob("plan", *command[1:]).exit_code == 0
    if fault == "expired":
        result = run_batchjob(*command, env={"AWS_SECRET_ACCESS_KEY": "expired"})
    else:
        with run_fault_proxy(s3.endpoint) as cut:
            cut.decide = lambda method, path: RESET
            result = run_batchjob(*command, "errors.outage_seconds=2", env={"AWS_ENDPOINT_URL": cut.endpoint})
    print(f"{fault}: {result.json_result['message']} ({result.seconds:.1f} s)")
    assert (result.exit_code, result.json_result["status"]) == (75, "temporary"), result.stderr
    assert "Traceback" not in result.stderr
    assert read_all_footers(tmp_path / "out") == {}
    resumed = run_batchjob(*command)
    assert (resumed.exit_code, resumed.json_result["predicted"]) == (0, 1000), resumed.stderr


def test_dead_server_is_temporary(test_data: Path) -> None:
    with run_fault_proxy("http://127.0.0.1:9") as dead_server:
        dead_server.decide = lambda method, path: RESET
        env = {"AWS_ENDPOINT_URL": dead_server.endpoint, "BATCHJOB_PATIENCE": "2", "AWS_EC2_METADATA_DISABLED": "true"}
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        result = run_batchjob(*cifar_arguments(test_data, "s3://bucket/out/"), env={**env, **keys})
    print(f"{result.json_result['message']} ({result.seconds:.1f} s)")
    assert (result.exit_code, result.json_result["status"]) == (75, "temporary"), result.stderr
