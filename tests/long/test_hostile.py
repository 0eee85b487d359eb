"""Thousands of broken, odd and malicious images: each is one row, and no worker is lost to any of them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from commands import cifar, footers, run, table

KNOWN = {"corrupt", "truncated", "not_an_image", "unsupported", "too_large", "empty"}


def test_every_hostile_file_is_one_row(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "hostile"
    files = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)  # noqa: PTH118 - as text
    ended = run(
        *cifar(test_data, tmp_path / "out"),
        f"input.uri={folder}/",
        "input.extensions=all",
        "preprocess.resize=[32, 32]",
        "runtime.shard_size=1000",
        "errors.max_rate=1",
        "errors.attempts=1",
        "decode.max_pixels=50000000",
    )
    assert ended.code == 0, ended.err
    rows = table(tmp_path / "out")
    faults = Counter(
        f"{stage}/{kind}"
        for stage, kind in zip(rows["error_stage"].to_pylist(), rows["error_type"].to_pylist(), strict=True)
        if stage is not None
    )
    print(f"{rows.num_rows} hostile files in {ended.seconds:.1f} s: {rows.num_rows - faults.total()} predicted")
    print("\n".join(f"{count:6,} {kind}" for kind, count in faults.most_common()))
    assert sorted(rows["uri"].to_pylist()) == files
    assert sorted(rows["position"].to_pylist()) == list(range(len(files)))
    assert {kind.split("/")[0] for kind in faults} == {"decode"}
    assert {kind.split("/")[1] for kind in faults} <= KNOWN
    assert rows["label"].null_count == faults.total() == rows.num_rows - rows["error_message"].null_count
    assert ended.answer.items() >= {"planned": len(files), "failed": faults.total()}.items()
    assert sum((Counter(made.errors) for made in footers(tmp_path / "out").values()), Counter[str]()) == faults
    assert "failed:" not in ended.err, "an attempt failed: a worker was lost or a loader died"
