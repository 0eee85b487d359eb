"""Thousands of broken, odd and malicious images among good ones: each is one row, and none costs a process."""

from __future__ import annotations

import csv
import os
import random
from collections import Counter
from pathlib import Path

from tests.support.batchjob_process import cifar_arguments, read_all_footers, read_rows
from tests.support.driver_server import DriverServer
from tests.support.figures import Figure

KNOWN = {"corrupt", "truncated", "not_an_image", "unsupported", "too_large", "empty"}


def list_files(folder: Path) -> list[str]:
    """List all files of a tree, sorted by path."""
    return sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)  # noqa: PTH118


def test_every_hostile_file_is_one_row(
    driver_server: DriverServer, test_data: Path, tmp_path: Path, seed: int, figure: Figure
) -> None:
    hostile, clean = list_files(test_data / "hostile"), list_files(test_data / "cifar10" / "images")
    mixed = random.Random(f"hostile {seed}").sample(hostile + clean, len(hostile) + len(clean))
    with (tmp_path / "manifest.csv").open("w", newline="") as manifest:
        csv.writer(manifest).writerows([["file"], *([name] for name in mixed)])
    output = tmp_path / "out"
    ended = driver_server.start(
        *cifar_arguments(test_data, output),
        f"input={{type: manifest, uri: {tmp_path}/manifest.csv, uri_column: file}}",
        "preprocess.resize=[32, 32]",
        "runtime.shard_size=1000",
        "runtime.tuning=off",
        "errors.max_rate=1",
        "errors.attempts=1",
        "decode.max_pixels=50000000",
        loaders="shared",
    ).wait()
    assert ended.exit_code == 0, ended.stderr
    rows = read_rows(output).to_pylist()
    faults = Counter(f"{row['error_stage']}/{row['error_type']}" for row in rows if row["error_stage"] is not None)
    harmless = set(clean)
    right = sum(row["label"] == row["uri"].split("/")[-2] for row in rows if row["uri"] in harmless)
    lost = ended.stderr.count("loader process ") + ended.stderr.count("failed:")
    figure(
        "hostile files",
        f"{len(hostile):,} among {len(clean):,} clean: {len(rows):,} rows, {faults.total():,} of them errors, "
        f"{lost} processes or attempts lost, {right} of the clean right, {ended.seconds:.0f} s",
    )
    print("\n".join(f"{count:6,} {kind}" for kind, count in faults.most_common()))
    assert [row["uri"] for row in rows] == mixed
    assert [row["position"] for row in rows] == list(range(len(mixed)))
    assert {kind.split("/")[0] for kind in faults} == {"decode"}
    assert {kind.split("/")[1] for kind in faults} <= KNOWN
    assert [row["uri"] for row in rows if (row["label"] is None) != (row["error_message"] is not None)] == []
    assert ended.json_result.items() >= {"planned": len(mixed), "failed": faults.total()}.items()
    assert sum((Counter(made.errors) for made in read_all_footers(output).values()), Counter[str]()) == faults
    assert abs(right - 804) <= 1
    assert lost == 0
