"""Frames of the user's own task carry the location and the passthrough columns of their images."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchjob
from tests.support.loaded_worker import write_job

TASK = """
def read(output, frames):
    return {"name": [frame.uri + " " + frame.passthrough["label"].upper() for frame in frames]}

def look_up(output, frames):
    return {"name": [frame.uri + " " + frame.passthrough.get("label").upper() for frame in frames]}
"""


@pytest.mark.parametrize("target", ["read", "look_up"])
def test_frames_name_their_images(target: str, tmp_path: Path) -> None:
    job = write_job(
        tmp_path,
        "input.passthrough=[label]",
        f"task={{type: python, target: 'own:{target}', fields: {{name: string}}}}",
        images=2,
    )
    (tmp_path / "own.py").write_text(TASK)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "manifest.csv").write_text("file,label\nwhite.png,a\nbad.png,b\nwhite.png,c\n")
    assert batchjob.run(job).predicted == 2
    rows = pq.read_table(tmp_path / "out" / "predictions").to_pylist()
    expected = [f"{row['uri']} {label}" for row, label in zip(rows, "ABC", strict=True)]
    assert [row["name"] for row in rows] == [expected[0], None, expected[2]]
