"""A real S3 server for tests: SeaweedFS, installed from PyPI, on free ports of the loopback interface."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.loopback import find_free_ports

__all__ = ["ACCESS_KEY", "REGION", "SECRET_KEY", "Seaweed", "find_weed", "run_seaweed", "s3_environment"]

ACCESS_KEY, SECRET_KEY, REGION = "testkey", "testsecret", "us-east-1"
_PR_SET_PDEATHSIG = 1


@dataclass
class Seaweed:
    """A running SeaweedFS server.

    Attributes:
        endpoint: URL such as `http://127.0.0.1:12345`.
        client: boto3 S3 client with endpoint and credentials; unlike obstore it can name every key.
    """

    endpoint: str
    client: Any
    _buckets: set[str] = field(default_factory=set)

    def bucket(self, name: str = "tests") -> str:
        """Return a fresh prefix `s3://<name>/<unique>/`; the bucket is created if it does not exist."""
        if name not in self._buckets:
            self.client.create_bucket(Bucket=name)
            self._buckets.add(name)
        return f"s3://{name}/{uuid.uuid4().hex[:12]}/"

    def put(self, uri: str, body: bytes | Path) -> None:
        """Write one object, also over an existing one; the key is taken literally."""
        bucket, key = _split(uri)
        self.client.put_object(Bucket=bucket, Key=key, Body=body if isinstance(body, bytes) else body.read_bytes())

    def put_tree(self, folder: Path, uri: str) -> None:
        """Write every file below `folder` under the prefix `uri`, with its relative name."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(uri.rstrip("/") + "/" + path.relative_to(folder).as_posix(), path)

    def get(self, uri: str) -> bytes:
        """Read one object."""
        bucket, key = _split(uri)
        return bytes(self.client.get_object(Bucket=bucket, Key=key)["Body"].read())

    def delete(self, uri: str) -> None:
        """Delete one object."""
        bucket, key = _split(uri)
        self.client.delete_object(Bucket=bucket, Key=key)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below the URI `prefix`, relative to it, sorted."""
        bucket, start = _split(prefix)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start)
        return sorted(item["Key"].removeprefix(start) for page in pages for item in page.get("Contents", []))


def find_weed() -> Path | None:
    """Return the `weed` program of this environment, or None."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    return Path(found) if found else None


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return the environment variables that point a process to the server; no file or metadata service is asked."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextmanager
def run_seaweed(folder: Path) -> Iterator[Seaweed]:
    """Run a server that keeps its data below `folder`; it is killed at the end, and when its parent dies."""
    binary = find_weed()
    assert binary is not None, "no weed: pip install 'batchjob[dev]'"
    names = ["master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc"]
    ports = dict(zip(names, find_free_ports(len(names)), strict=True))
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(binary, folder, ports),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **s3_environment(endpoint)},
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        yield Seaweed(endpoint, _wait_for_client(endpoint, process, log))
    finally:
        with suppress(ProcessLookupError):  # it may not have started at all
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _command(binary: Path, folder: Path, ports: dict[str, int]) -> list[str]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    flags = {f"{name.split('.')[0]}.port{'.grpc' if 'grpc' in name else ''}": port for name, port in ports.items()}
    return [
        str(binary),
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-volume.max=200",
        "-master.volumeSizeLimitMB=128",
        "-master.electionTimeout=1s",
        "-filer",
        f"-filer.localSocket={folder / 'filer.sock'}",
        "-s3",
        f"-s3.localSocket={folder / 's3.sock'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",  # both have fixed ports, on which a second server could not listen
        *(f"-{flag}={port}" for flag, port in flags.items()),
    ]


def _wait_for_client(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            # A listing is answered before the volumes can be written to: only a write shows that the server is ready.
            client.create_bucket(Bucket="warm-up")
            client.put_object(Bucket="warm-up", Key="up", Body=b"up")
            client.delete_object(Bucket="warm-up", Key="up")
            client.delete_bucket(Bucket="warm-up")
            return client
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"weed did not come up: {error}\n{tail}") from error
            time.sleep(0.1)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
