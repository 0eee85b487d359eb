"""Untrusted input (keys, manifest rows, job files) is data: it runs no code, and shows no secrets or controls."""

from __future__ import annotations

import colorsys
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from PIL import Image

from batchjob.driver.progress import ProgressBar, ProgressLog
from batchjob.errors import ImageError, InvalidJob, NotFound
from batchjob.job.job import Job
from batchjob.loader.fetch import Fetcher
from batchjob.preprocessing.settings import DecodeSettings
from batchjob.report.run_result import RunResult
from batchjob.sources.manifest import ManifestSource
from batchjob.sources.prefix import PrefixSource
from batchjob.storage.objects import ObjectData
from batchjob.storage.reader import Reader
from batchjob.text import (
    escape_controls,
    explain_uri_secret,
    find_held_secret,
    redact_assignment,
    redact_queries,
    redact_secrets,
)
from batchjob.types import Cursor, ErrorRecord, ImageRef
from batchjob.user_code import load_target
from tests.support.seaweed import Seaweed

ROOT = Path(__file__).parents[2]
MISSING_PATH = "../../../../../../../../tmp/away.png"

# --- keys and names ---------------------------------------------------------------------------------------------------

# Names that a disk accepts too; all end in .png.
ON_DISK = [
    "p%2Fq.png",
    "%2e%2e%2fup.png",
    "..up.png",
    "back\\slash.png",
    "C:\\windows.png",
    "new\nline.png",
    "\x1b]0;title\x07\x1b[31mred.png",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "\u202egnp.evil.png",
    " space .png",
    "~root.png",
    "$(touch away).png",
    "`id`;|&.png",
    "'quoted\".png",
    "a?X=1&b=%00.png",
    "#hash.png",
    "*[a-z]?.png",
    "=1+1.png",
    "-rf.png",
    "_SUCCESS.png",
    "part-0000000-0000000000000000.parquet.png",
    "\u0130\u00df\U0001f600.png",
]
# Keys that only a bucket can have.
IN_BUCKETS = [
    "a//b.png",
    "/absolute.png",
    "a/../up.png",
    "a/./b.png",
    "../out.png",
]
NET = """\
from torch import nn


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


def mean():
    return Mean()
"""


def make_picture(number: int) -> bytes:
    """Make a picture whose colour encodes its number."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), compute_colour(number)).save(out, "PNG")
    return out.getvalue()


def compute_colour(number: int) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(number / 64, 0.7, 0.9))
    return red, green, blue


def write_to_disk(folder: Path) -> dict[str, int]:
    """Write a picture under each name; return the names with the numbers of their pictures."""
    there = {}
    for number, name in enumerate(ON_DISK):
        (folder / name).write_bytes(make_picture(number))
        there[name] = number
    return there


def write_to_bucket(s3: Seaweed, root: str) -> dict[str, int]:
    """Write a picture under each key. A key that the server refuses is returned too; nothing lies there."""
    there = {}
    for number, name in enumerate([*ON_DISK, *IN_BUCKETS]):
        with suppress(ClientError):
            s3.put(root + name, make_picture(number))
        there[name] = number
    return there


def list_images(source: ManifestSource | PrefixSource) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.Table.from_batches(list(source.refs(Reader(), Cursor()))).to_pylist()
    return rows


def write_manifest(folder: Path, uris: list[str]) -> ManifestSource:
    file = folder / "manifest.parquet"
    pq.write_table(pa.table({"image": uris}), file)
    return ManifestSource.model_validate({"uri": str(file), "uri_column": "image"})


def fetch_images(rows: list[dict[str, Any]]) -> list[ObjectData | ErrorRecord]:
    refs = [ImageRef(number, row["uri"], row["location"]) for number, row in enumerate(rows)]
    return Fetcher(Reader(retry_timeout=0.0)).fetch(refs)


def test_odd_file_names_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    there = write_to_disk(tmp_path / "in")
    listed = list_images(PrefixSource.model_validate({"uri": str(tmp_path / "in"), "hidden": True}))
    assert {row["uri"].removeprefix(f"{tmp_path}/in/") for row in listed} == set(there)
    named = list_images(write_manifest(tmp_path / "in", list(there)))
    absolute = list_images(write_manifest(tmp_path / "in", [f"{tmp_path}/in/{name}" for name in there]))
    for rows in (listed, named, absolute):
        answers = fetch_images(rows)
        for row, answer in zip(rows, answers, strict=True):
            name = row["location"].removeprefix(f"{tmp_path}/in/")
            assert isinstance(answer, ObjectData), name
            assert answer.data == make_picture(there[name]), name


def test_odd_bucket_keys_are_read_as_they_are(s3: Seaweed, tmp_path: Path) -> None:
    root = s3.bucket("guards")
    there = write_to_bucket(s3, f"{root}in/")
    stored = {key.removeprefix("in/"): key for key in s3.keys(root)}
    listed = list_images(PrefixSource.model_validate({"uri": f"{root}in/", "hidden": True}))
    assert {row["uri"].removeprefix(root) for row in listed} == {
        key for key in stored.values() if key.startswith("in/")
    }
    named = list_images(write_manifest(tmp_path, [f"{root}in/{name}" for name in there]))
    for rows in (listed, named):
        for row, answer in zip(rows, fetch_images(rows), strict=True):
            name = row["uri"].removeprefix(f"{root}in/")
            if isinstance(answer, ObjectData):  # SeaweedFS replaces backslashes by slashes
                assert answer.data == (make_picture(there[name]) if name in there else s3.get(row["uri"])), name
            else:  # the server has stored it under another key
                assert name not in stored, (name, answer)
                assert (answer.stage, answer.type) in {("fetch", "not_found"), ("fetch", "unaddressable")}


@pytest.mark.parametrize(
    ("uri", "type"),
    [
        ("nul\0byte.png", {"unaddressable", "not_found"}),
        ("/nul\0byte.png", {"unaddressable", "not_found"}),
        ("x" * 5000 + ".png", {"unaddressable", "not_found"}),
        (MISSING_PATH, {"not_found"}),
        ("/etc", {"not_found"}),
        ("/dev/zero", {"not_found"}),
        ("file:///dev/stdin", {"not_found"}),
        ("", {"not_found"}),
    ],
)
def test_name_without_an_object_is_an_error_row(tmp_path: Path, uri: str, type: set[str]) -> None:
    if not uri:
        with pytest.raises(InvalidJob, match="row 1: no image in column 'image'"):
            list_images(write_manifest(tmp_path, [uri]))
        return
    (answer,) = fetch_images(list_images(write_manifest(tmp_path, [uri])))
    assert isinstance(answer, ErrorRecord)
    assert answer.stage == "fetch"
    assert answer.type in type


@pytest.mark.parametrize("key", ["nul\0byte.png", "x" * 5000, "../../../up.png", "..", "a/../../b"])
def test_key_that_no_bucket_can_have_is_an_error_row(s3: Seaweed, tmp_path: Path, key: str) -> None:
    root = s3.bucket("guards")
    s3.put(f"{root}fine.png", make_picture(0))
    fine, bad = fetch_images(list_images(write_manifest(tmp_path, [f"{root}fine.png", root + key])))
    assert isinstance(fine, ObjectData)
    assert isinstance(bad, ErrorRecord)
    assert bad.type in {"unaddressable", "not_found", "unreadable"}


@pytest.fixture(scope="module")
def ran(s3: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], str]:
    """A run over all these keys and one broken file, its output on the server: folder, names and output."""
    folder = tmp_path_factory.mktemp("guards")
    root = s3.bucket("guards")
    there = write_to_bucket(s3, f"{root}in/")
    s3.put(f"{root}in/\x1b]0;owned\x07\nbatchjob: all is well.png", b"no image at all")
    (folder / "net.py").write_text(NET)
    (folder / "job.yaml").write_text(
        f'input: {{type: prefix, uri: "{root}in/", hidden: true}}\n'
        'model: {type: python, target: "net:mean"}\n'
        "preprocess: {resize: null, crop: null, mean: null, std: null}\n"
        "task: {type: embedding}\n"
        "runtime: {pool: local, device: cpu, tuning: off, shard_size: 7, loader: {processes: 1}}\n"
        "errors: {max_rate: 1}\n"
        f'output: {{uri: "{root}out/"}}\n'
    )
    done = run_batchjob("run", "job.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, there, f"{root}out/"


def run_batchjob(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "batchjob", *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=False, timeout=200, cwd=cwd)


def test_run_over_odd_keys_gives_each_its_row(ran: tuple[Path, dict[str, int], str], s3: Seaweed) -> None:
    folder, there, output = ran
    keys = s3.keys(output)
    parts = [key for key in keys if key.startswith("predictions/")]
    assert all(re.fullmatch(r"predictions/part-\d{7}-[0-9a-f]+\.parquet", key) for key in parts)
    assert all(key == "_SUCCESS" or key.startswith(("_batchjob/", "predictions/")) for key in keys)
    rows = [row for key in parts for row in pq.read_table(pa.BufferReader(s3.get(output + key))).to_pylist()]
    home = output.replace("/out/", "/in/")
    right = [row for row in rows if row["uri"].removeprefix(home) in there and row["error_type"] is None]
    assert len(right) > 20, sorted(row["uri"].removeprefix(home) for row in rows)
    assert [row["error_type"] for row in rows if row["error_type"]] == ["not_an_image"]
    for row in right:
        wanted = [part / 255 for part in compute_colour(there[row["uri"].removeprefix(home)])]
        assert row["embedding"] == pytest.approx(wanted, abs=1e-4)
    assert len({row["uri"] for row in rows}) == len(rows) == len(s3.keys(home))
    assert not (folder / "away").exists()


def test_control_characters_of_names_do_not_reach_the_terminal(ran: tuple[Path, dict[str, int], str]) -> None:
    folder, _, output = ran
    looked: list[tuple[str, str]] = [("errors", output), ("status", output), ("run", "job.yaml")]
    for words in looked:
        endpoint = ("--endpoint", os.environ["AWS_ENDPOINT_URL"]) if words[0] != "run" else ()
        done = run_batchjob(*words, *endpoint, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stderr + done.stdout
        assert "\x07" not in done.stderr + done.stdout
        assert not re.search(r"^batchjob: all is well", done.stderr, re.MULTILINE)
        if words[0] == "errors":
            assert r"\x1b]0;owned\x07\nbatchjob: all is well.png: decode/not_an_image:" in done.stderr


# --- code is loaded only from the job folder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "os:system",
        "subprocess:run",
        "batchjob.cli.main:main",
        "..net:mean",
        ".net:mean",
        "net..mean:x",
        "net:.mean",
        "../net:mean",
        "/tmp/net:mean",
        "net/../net:mean",
        "net\n:mean",
        "net:mean\n",
        "https://host/net:mean",
        "s3://bucket/net:mean",
        "__import__('os'):system",
        "net:mean()",
        "net",
        "net:",
        ":mean",
        "",
    ],
)
def test_code_is_loaded_only_from_the_job_folder(tmp_path: Path, target: str) -> None:
    (tmp_path / "jobs").mkdir()
    for folder in (tmp_path, tmp_path / "jobs"):
        (folder / "net.py").write_text("def mean(): ...\n")
    text = {
        "input": {"type": "prefix", "uri": "images/"},
        "model": {"type": "python", "target": target},
        "task": {"type": "embedding"},
        "output": {"uri": "out/"},
    }
    (tmp_path / "jobs" / "job.yaml").write_text(json.dumps(text))
    with pytest.raises(InvalidJob):
        load_target(Job.from_file(tmp_path / "jobs" / "job.yaml").model.target, tmp_path / "jobs")  # type: ignore[union-attr]


def test_manifest_row_never_loads_code(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import pathlib\npathlib.Path('ran').touch()\ndef mean(): ...\n")
    for uri in ("net:mean", "!!python/object:os.system", "net.py", "python://net:mean"):
        with suppress(InvalidJob):  # a protocol that data must not name
            fetch_images(list_images(write_manifest(tmp_path, [uri])))
    assert not (tmp_path / "ran").exists()
    assert not Path("ran").exists()


# --- limits of a job file ---------------------------------------------------------------------------------------------


def billion_laughs(levels: int) -> str:
    lines = ["a0: &a0 [" + ", ".join(["lol"] * 10) + "]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        billion_laughs(9),
        billion_laughs(400),
        "a: &a {b: *a}",
        "x: &x [[[[1]]]]\ny: [" + ", ".join(["*x"] * 60_000) + "]",
        "a: " + "{a: " * 3000,
        "- " * 3000 + "x",
        "&a " * 100 + "x",
        "? " * 2000,
    ],
    ids=["laughs", "more", "itself", "wide", "braces", "dashes", "anchors", "keys"],
)
def test_yaml_bomb_is_refused_with_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(InvalidJob) as caught:
        Job.from_file(tmp_path / "job.yaml")
    assert time.process_time() - began < 10, "generous: reading the text takes most of it"
    assert len(caught.value.message.splitlines()[0]) < 300


def test_yaml_tags_create_no_objects(tmp_path: Path) -> None:
    text = "name: !!python/object/apply:os.system ['touch ran']\ninput: !!python/name:os.system\n"
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(InvalidJob, match=r"has (?:the|a) tag|which a job does not know"):
        Job.from_file(tmp_path / "job.yaml")
    assert not Path("ran").exists()


# --- decode settings --------------------------------------------------------------------------------------------------


def read_small_job(tmp_path: Path, *overrides: str) -> Job:
    text = {
        "input": {"type": "prefix", "uri": "images/"},
        "model": {"type": "python", "target": "net:mean"},
        "task": {"type": "embedding"},
        "output": {"uri": "out/"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(text))
    return Job.from_file(tmp_path / "job.yaml", overrides=overrides)


def test_decode_settings_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    plain = read_small_job(tmp_path)
    accepting, fewer = (
        read_small_job(tmp_path, "decode.truncated=accept"),
        read_small_job(tmp_path, "decode.formats=[png, jpeg]"),
    )
    assert len({json.dumps(job.fingerprint(), sort_keys=True) for job in (plain, accepting, fewer)}) == 3
    assert fewer.fingerprint() == read_small_job(tmp_path, "decode.formats=[jpeg, png, jpeg]").fingerprint()
    assert fewer.fingerprint()["decode"] == {"formats": ["jpeg", "png"]}
    assert plain.decode == DecodeSettings()


def test_unknown_decode_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"decode\.formats\.1: must be 'jpeg', 'png', .* or 'heif', not 'psd'"):
        read_small_job(tmp_path, "decode.formats=[png, psd]")
    with pytest.raises(InvalidJob, match=r"decode\.formats=\[\]: has 0 values; 1 is the least"):
        read_small_job(tmp_path, "decode.formats=[]")
    with pytest.raises(InvalidJob, match=r"decode\.truncated=maybe: must be 'error' or 'accept'"):
        read_small_job(tmp_path, "decode.truncated=maybe")


# --- messages hold no secrets and no control characters ---------------------------------------------------------------

SECRET = "9f8e7d6c5b4a39281706"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://me:{SECRET}@lake/a.jpg: gone", "s3://…@lake/a.jpg: gone"),
        (f"https://me:p@{SECRET}@host/a: gone", "https://…@host/a: gone"),
        (f"at https://h/a?X-Amz-Signature={SECRET}&w=1 now", "at https://h/a?X-Amz-Signature=…&w=1 now"),
        (f"https://h/a?w=1&x-oss-signature={SECRET}", "https://h/a?w=1&x-oss-signature=…"),
        (f"https://h/a?x-tos-security-token={SECRET}&w=1", "https://h/a?x-tos-security-token=…&w=1"),
        (f"https://h/a?q-ak=me&q-signature={SECRET}", "https://h/a?q-ak=…&q-signature=…"),
        (f"https://h/a?X-API-Key={SECRET}&w=1", "https://h/a?X-API-Key=…&w=1"),
        (f"https://h/a?w=1&sig={SECRET}", "https://h/a?w=1&sig=…"),
        (f"https://h/a?token={SECRET}:{SECRET}: not there", "https://h/a?token=…: not there"),
        (f"https://h/a?w=1&amp;access_token={SECRET}", "https://h/a?w=1&amp;access_token=…"),
        (f"GET with Authorization: Bearer {SECRET}", "GET with Authorization: …"),
        (f"Bearer {SECRET}", "Bearer …"),
        ("key AKIAIOSFODNN7EXAMPLE is no more", "key … is no more"),
        (f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----", "…"),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
        ("s3://lake/a@2x.jpg?v=1 a basic thing = fine", "s3://lake/a@2x.jpg?v=1 a basic thing = fine"),
        ("/data/glob?.jpg: nothing there", "/data/glob?.jpg: nothing there"),
    ],
)
def test_secrets_are_redacted_from_text(text: str, shown: str) -> None:
    assert redact_secrets(text) == shown
    assert redact_secrets(shown) == shown
    assert SECRET not in str(InvalidJob(text))
    assert SECRET not in ImageError("fetch", "storage", text).message
    assert SECRET not in ErrorRecord("fetch", "storage", text).message
    assert SECRET not in RunResult.from_error(RuntimeError(text)).to_json()
    assert isinstance(NotFound(text), NotFound)


def test_secret_environment_values_are_redacted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"/{SECRET}+x=")
    monkeypatch.setenv("MY_API_TOKEN", "short")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token-of-this-machine")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    said = f"the key /{SECRET}+x= and {quote(f'/{SECRET}+x=', safe='')} of /var/run/token-of-this-machine, token, short"
    assert redact_secrets(said) == "the key … and … of /var/run/token-of-this-machine, token, short"
    assert find_held_secret(said) == "AWS_SECRET_ACCESS_KEY"
    with pytest.raises(InvalidJob) as caught:
        read_small_job(tmp_path, f"name=x{SECRET}", f"model.target=net:/{SECRET}+x=")
    assert "holds the value of the environment variable AWS_SECRET_ACCESS_KEY; a job never holds" in str(caught.value)
    assert f"/{SECRET}" not in str(caught.value)


def test_typed_values_are_shown_without_their_query() -> None:
    assert redact_queries(f"https://b/x?anything={SECRET}") == "https://b/x?…"
    assert redact_assignment("input.uri", f"https://me:{SECRET}@b/x?anything={SECRET}") == "input.uri=https://…@b/x?…"
    assert redact_assignment("api_token", SECRET) == "api_token=…"
    assert redact_assignment("storage.s3://.secret_access_key", SECRET) == "storage.s3://.secret_access_key=…"


@pytest.mark.parametrize("uri", ["s3://lake/k@2x?v=1", "abfs://c@a/x", "https://[bad", "az://c/a?v=1&w=2"])
def test_uri_without_secrets_is_accepted(uri: str) -> None:
    assert explain_uri_secret(uri) is None


def test_control_characters_are_escaped() -> None:
    assert (
        escape_controls("plain text, \u00fc, \U0001f600\tand a\nline") == "plain text, \u00fc, \U0001f600\tand a\nline"
    )
    assert "\x1b" not in InvalidJob("s3://b/\x1b[2J: gone").message + ErrorRecord("fetch", "gone", "\x1b[2J").message
    assert escape_controls("\x1b[2J\x9b31m\u202e\x00\r\x07\u2028") == r"\x1b[2J\x9b31m\u202e\x00\r\x07\u2028"


@pytest.mark.parametrize("made", [ProgressLog, "bar"])
def test_progress_notes_are_sanitized(made: Callable[..., Any] | str) -> None:
    from rich.console import Console

    stream = io.StringIO()
    view = ProgressBar(Console(file=stream)) if made == "bar" else ProgressLog(stream, interval=0)
    view.note(f"image s3://me:{SECRET}@b/\x1b[31mred.png was lost")
    assert SECRET not in stream.getvalue()
    assert r"@b/\x1b[31mred.png" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


# --- every example starts Ray with a token, its dashboard on loopback -------------------------------------------------


def find_examples() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each file that users copy from, with continuation lines joined."""
    files = [ROOT / name for name in ("README.md", "SECURITY.md", "cluster.yaml", "Makefile")]
    files += [path for folder in ("jobs", ".ci", "benchmarks") for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += (ROOT / "docs").rglob("*.md")
    for path in files:
        if path.suffix not in {".pyc", ".lock", ".th", ".png", ".jpg", ".pt"}:
            yield str(path.relative_to(ROOT)), re.sub(r"\\?\n {4,}", " ", path.read_text(errors="replace"))


@pytest.mark.parametrize(("name", "text"), list(find_examples()), ids=lambda value: value if len(value) < 80 else "")
def test_every_ray_example_requires_its_token(name: str, text: str) -> None:
    assert not re.search(r"dashboard[-_]host[= ]+['\"]?(?!127\.0\.0\.1|localhost|=)\S", text), name
    assert not re.search(r"0\.0\.0\.0|RAY_AUTH_MODE=(?!token)\S|RAY_AUTH_TOKEN=", text), name
    for start in re.finditer(r"ray start --(?:head|address)", text):
        said = text[max(0, start.start() - 600) : start.start()]
        assert "RAY_AUTH_MODE=token" in said, f"{name}: {text[start.start() : start.end() + 60]}"
    for start in re.finditer(r"ray start --head", text):
        assert "--dashboard-host=127.0.0.1" in text[start.start() : start.start() + 300], name


def test_ray_examples_are_found() -> None:
    assert sum("ray start --head" in text for _, text in find_examples()) >= 2
