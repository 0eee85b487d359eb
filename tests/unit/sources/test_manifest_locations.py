"""Locations of a manifest's images: those in the output are found under every spelling of its scheme."""

from __future__ import annotations

import pyarrow as pa
import pytest

from batchjob.sources.manifest_locations import are_below


@pytest.mark.parametrize(
    ("folder", "location", "is_below"),
    [
        ("s3://lake/out/", "s3://lake/out/a.jpg", True),
        ("s3://lake/out/", "s3a://lake/out/a.jpg", True),
        ("s3://lake/out/", "S3N://lake/out/a.jpg", True),
        ("gs://lake/out/", "gcs://lake/out/a.jpg", True),
        ("abfss://lake@account.dfs.core.windows.net/out/", "az://lake/out/a.jpg", True),
        ("/data/out/", "file:///data/out/a.jpg", True),
        ("s3://lake/out/", "s3a://lake/out2/a.jpg", False),
        ("s3://lake/out/", "gs://lake/out/a.jpg", False),
        ("s3://lake/out/", "/lake/out/a.jpg", False),
        ("/lake/out/", "s3://lake/out/a.jpg", False),
        ("/data/out/", "file:///data/out2/a.jpg", False),
    ],
)
def test_output_is_found_under_every_spelling(folder: str, location: str, is_below: bool) -> None:
    locations = pa.array(["https://host/a.jpg", location, "/other/a.jpg"])
    assert are_below(locations, folder).to_pylist() == [False, is_below, False]
