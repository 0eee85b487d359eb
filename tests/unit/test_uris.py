"""URIs in all their spellings: `file:`, home folders, schemes, archives; as settings, arguments and rows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from batchjob import api
from batchjob.cli.options import resolve_output
from batchjob.errors import InvalidJob, UnaddressableKey
from batchjob.job.job import Job
from batchjob.settings import Settings, Uri
from batchjob.sources.manifest import ManifestSource
from batchjob.storage.options import StorageOptions, options_for
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.types import Cursor
from batchjob.uris import (
    explain_bad_bucket,
    is_below,
    is_local,
    local_path,
    split_chain,
    suggest_bucket_uri,
    suggest_scheme,
)


class Place(Settings):
    uri: Uri


def resolve(uri: str, base: Path = Path("/job")) -> str:
    return Place.model_validate({"uri": uri}, context={"base": base}).uri


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:/a/b.png", "/a/b.png"),
        ("file:///a%20b.png", "/a b.png"),
        ("file://localhost/a", "/a"),
        ("FILE://LOCALHOST/a", "/a"),
        ("File:/a%2520b", "/a%20b"),
        ("file:////a", "/a"),
        ("file:///50%.png", "/50%.png"),
        ("file:///a#b?c.png", "/a#b?c.png"),
        ("/data/50%25/x.png", "/data/50%25/x.png"),
        ("/data/a%20b.png", "/data/a%20b.png"),
        ("/data/file:/x", "/data/file:/x"),
    ],
)
def test_local_uris_name_one_path(uri: str, path: str) -> None:
    assert is_local(uri)
    assert str(local_path(uri)) == resolve(uri) == path


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("s3:/lake/out", "s3://lake/out"),
        ("s3//lake/out", "s3://lake/out"),
        ("GS:lake/out", "gs://lake/out"),
        ("abfss:/c@a.dfs.core.windows.net/x", "abfss://c@a.dfs.core.windows.net/x"),
        ("https:/host/x.csv", "https://host/x.csv"),
    ],
)
def test_uri_with_a_slash_too_few_is_no_folder_here(tmp_path: Path, path: str, uri: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"write {uri}, or ./{path} if")):
        resolve(path, tmp_path)
    with pytest.raises(InvalidJob, match=re.escape(uri)):
        resolve_output(path, None, None, None, None)
    assert resolve(f"./{path}", tmp_path) == os.path.normpath(tmp_path / path)
    (tmp_path / path).mkdir(parents=True)
    assert resolve(path, tmp_path) == os.path.normpath(tmp_path / path)


@pytest.mark.parametrize("bucket", ["My Bucket", "a\tb", "m\u00fcnchen", "a{b}", "buck*", "a%20b", "a?b"])
def test_buckets_that_no_store_has_are_refused_before_a_client_sees_them(tmp_path: Path, bucket: str) -> None:
    for scheme in ("s3", "gs", "az"):
        with pytest.raises(InvalidJob, match="names the bucket"):
            Reader().read(f"{scheme}://{bucket}/a.png")
        (tmp_path / "m.csv").write_text(f"path\na.png\n{scheme}://{bucket}/a.png\n")
        source = ManifestSource(uri=f"{tmp_path}/m.csv", uri_column="path")
        with pytest.raises(InvalidJob, match=r"row 2: .* names the bucket"):
            list(source.refs(Reader(), Cursor()))


@pytest.mark.parametrize("bucket", ["lake", "my.lake-1", "Old_Bucket", "$web", "c@account.dfs.core.windows.net"])
def test_buckets_with_every_name_that_stores_allow_are_read(bucket: str) -> None:
    assert explain_bad_bucket(bucket) is None
    assert Reader().explain_refusal(f"az://{bucket}/a.png", "/m.csv") is None


@pytest.mark.parametrize("path", ["s3/lake", "s3", "s3.csv", "gs-data//x", "https", "data/s3:/x", "azure:x"])
def test_names_that_begin_like_a_scheme_are_paths(path: str) -> None:
    assert resolve(path) == os.path.normpath(f"/job/{path}")


def test_file_uri_names_bytes_that_are_not_utf8() -> None:
    path = Path(os.fsdecode(b"/in/caf\xe9.png"))
    assert local_path(path.as_uri()) == path


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("file://otherhost/x", "'otherhost'"),
        ("file://in/x.png", "file:///folder"),
        ("file:x.png", "absolute"),
        ("file://", "absolute"),
    ],
)
def test_file_uri_of_another_host_or_without_a_path_is_refused(uri: str, word: str) -> None:
    with pytest.raises(UnaddressableKey, match=word):
        local_path(uri)
    with pytest.raises(ValueError, match=word):
        resolve(uri)
    with pytest.raises(InvalidJob, match=word):
        open_store(uri)
    with pytest.raises(InvalidJob, match=word):
        resolve_output(uri, None, None, None, None)
    with pytest.raises(InvalidJob, match=word):
        Job.from_file(uri)
    assert word in (Reader().explain_refusal(uri, "/m.csv") or "")


@pytest.mark.parametrize("home", ["~", "$HOME", "${HOME}"])
def test_home_folder_is_expanded_at_the_beginning_only(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    assert resolve(f"{home}/in") == "/home/anna/in"
    assert resolve(home) == "/home/anna"
    assert resolve(f"in/{home}/x") == f"/job/in/{home}/x"
    assert resolve("$HOMEWORK/x") == "/job/$HOMEWORK/x"
    assert resolve("zip://::$HOME/x.zip") == "zip://::/home/anna/x.zip"
    assert resolve_output(f"{home}/out", None, None, None, None) == ("/home/anna/out", {})


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("S3://Lake/In/A.jpg", "s3://Lake/In/A.jpg"),
        ("s3a://lake/in", "s3a://lake/in"),
        ("WASBS://c@acct.blob.core.windows.net/x", "wasbs://c@acct.blob.core.windows.net/x"),
        ("abfss://c@acct.dfs.core.windows.net/x", "abfss://c@acct.dfs.core.windows.net/x"),
        ("s3://lake/50%25/a%20b.png", "s3://lake/50%25/a%20b.png"),
        ("zip://a b.png::x.zip", "zip://a b.png::/job/x.zip"),
        ("zip://a%20b.png::file:///x.zip", "zip://a%20b.png::file:///x.zip"),
    ],
)
def test_scheme_is_lower_case_and_keys_stay(uri: str, expected: str) -> None:
    assert resolve(uri) == expected


@pytest.mark.parametrize(
    ("uri", "prefix", "below"),
    [
        ("s3a://lake/in/a.jpg", "s3://lake/in", True),
        ("S3N://lake/in/a.jpg", "s3://", True),
        ("s3://lake/in2/a.jpg", "s3a://lake/in", False),
        ("gcs://lake/a", "gs://lake/", True),
        ("gs://lake/a", "s3://lake/", False),
        ("abfss://c@acct.dfs.core.windows.net/a", "az://c", True),
        ("abfss://c@acct.dfs.core.windows.net/a", "wasbs://c@acct.blob.core.windows.net/", True),
        ("abfss://c@acct.dfs.core.windows.net/a", "abfss://c@other.dfs.core.windows.net/", False),
        ("HTTPS://Images.example.com/A", "https://images.example.com", True),
        ("file:///a%20b/c", "/a b", True),
        ("/a/b", "/a/bc", False),
    ],
)
def test_prefixes_hold_every_spelling(uri: str, prefix: str, below: bool) -> None:
    assert is_below(uri, prefix) is below
    named = StorageOptions(region="named")
    assert (options_for(uri, {prefix: named}) is named) is below


def test_misspelt_scheme_is_answered_with_the_one_that_is_meant() -> None:
    assert suggest_scheme("s4") == "; did you mean s3://?"
    for uri in ("abfssx://c@a.dfs.core.windows.net/x", "htps://example.com/x.jpg", "s33://lake/x"):
        with pytest.raises(InvalidJob, match="did you mean"):
            Reader().read(uri)
    with pytest.raises(InvalidJob, match="did you mean s3://"):
        open_store("s4://lake/out")


@pytest.mark.parametrize(
    ("url", "uri"),
    [
        ("https://acct.blob.core.windows.net/c/a b/x.jpg", "abfss://c@acct.dfs.core.windows.net/a b/x.jpg"),
        ("https://lake.s3.eu-west-1.amazonaws.com/in/x.jpg", "s3://lake/in/x.jpg"),
        ("https://s3.amazonaws.com/lake/in/", "s3://lake/in/"),
        ("https://storage.googleapis.com/lake/in/x.jpg", "gs://lake/in/x.jpg"),
    ],
)
def test_web_address_of_a_bucket_names_its_uri(url: str, uri: str) -> None:
    assert suggest_bucket_uri(url) == f"; did you mean {uri}?"
    with pytest.raises(InvalidJob, match="did you mean"):
        open_store(url)
    assert uri in (Reader().explain_refusal(url, "/m.csv") or "")
    assert suggest_bucket_uri("https://example.com/c/x.jpg") == ""


def test_archives_are_split_and_buckets_are_not() -> None:
    assert split_chain("zip://in/a.png::/x.zip") == ("zip://in/a.png", "::/x.zip")
    assert split_chain("s3://lake/a::b.png") == ("s3://lake/a::b.png", "")
    assert split_chain("/in/a::b.png") == ("/in/a::b.png", "")
    assert split_chain("https://example.com/a::b.png") == ("https://example.com/a::b.png", "")


def test_listing_of_a_file_uri_reads_back_and_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    for name in ("50%.png", "a%20b.png", "c d.png"):
        (folder / name).write_bytes(name.encode())
    for base in (f"{folder}/", f"{folder.as_uri()}/", f"file:{tmp_path}/a%20b/"):
        found = [one.uri for one in Reader().list(base)]
        assert [Reader().read(uri).data for uri in found] == [b"50%.png", b"a%20b.png", b"c d.png"]
        assert [one.uri for one in Reader().list(base, found[0])] == found[1:]


def test_job_file_and_outputs_are_named_by_file_uris(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    (folder / "in").mkdir(parents=True)
    (folder / "job.yaml").write_text(
        f"input: {{type: prefix, uri: {(folder / 'in').as_uri()}}}\nmodel: {{type: python, target: 'net:build'}}\n"
        f"task: {{type: raw}}\noutput: {{uri: 'file:{tmp_path}/a%20b/out'}}\n"
    )
    uri = (folder / "job.yaml").as_uri()
    job = Job.from_file(uri)
    assert (job.folder, job.input.uri, job.output.uri) == (folder, str(folder / "in"), str(folder / "out"))
    assert resolve_output(uri, None, None, None, None)[0] == str(folder / "out")
    with pytest.raises(InvalidJob, match=f"{folder}/out"):
        api.status((folder / "out").as_uri())


def test_home_folder_in_a_job_file_is_no_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    text = (
        "input: {type: prefix, uri: '${HOME}/in'}\nmodel: {type: python, target: 'net:build'}\n"
        "task: {type: raw}\noutput: {uri: $HOME/out}\n"
    )
    (tmp_path / "job.yaml").write_text(text)
    job = Job.from_file(tmp_path / "job.yaml")
    assert (job.input.uri, job.output.uri) == ("/home/anna/in", "/home/anna/out")
    (tmp_path / "job.yaml").write_text(text.replace("{HOME}", "{HOMES}"))
    with pytest.raises(InvalidJob, match="no parameter"):
        Job.from_file(tmp_path / "job.yaml")


def test_output_below_a_deleted_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert resolve_output("/out", None, None, None, None) == ("/out", {})
    for refused in (lambda: resolve_output("out", None, None, None, None), lambda: "out"):
        with pytest.raises(InvalidJob, match="working directory"):
            open_store(str(refused()))
