"""Images on the web: only from hosts that the job names, never from private networks or metadata services."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchjob.errors import (
    AddressRefused,
    InvalidJob,
    NotFound,
    PreconditionFailed,
    StorageError,
    UnaddressableKey,
    Unavailable,
)
from batchjob.loader.fetch import Fetcher
from batchjob.sources.manifest import ManifestSource
from batchjob.sources.prefix import PrefixSource
from batchjob.storage.http_access import explain_address_refusal, explain_url_refusal
from batchjob.storage.http_backend import HttpBackend
from batchjob.storage.objects import ObjectData
from batchjob.storage.options import StorageOptions
from batchjob.storage.outage import Outage
from batchjob.storage.reader import Reader
from batchjob.storage.retry_policy import RetryPolicy
from batchjob.types import Cursor, ErrorRecord, ImageRef
from tests.support.http_server import HttpServer, Response, run_http_server

PRIVATE = StorageOptions(private=True)


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with run_http_server() as running:
        yield running


def reader(server: HttpServer, **options: Any) -> Reader:
    return Reader({server.url: StorageOptions(private=True, **options)}, retry_timeout=0.0)


def test_host_is_read_only_if_the_job_names_it(server: HttpServer) -> None:
    server.responses["/a.jpg"] = Response(b"bytes", headers={"ETag": '"v1"'})
    for options in (
        {},
        {"https://127.0.0.1": PRIVATE},
        {"http://127.0.0.1": PRIVATE},
        {"http://other": PRIVATE},
        {"s3://": PRIVATE},
    ):
        with pytest.raises(
            AddressRefused, match=r"on the web, which is read only where the job names the host, storage: \{'http"
        ):
            Reader(options, retry_timeout=0.0).read(f"{server.url}/a.jpg")
    sent = len(server.requests)
    assert reader(server).read(f"{server.url}/a.jpg") == ObjectData(b"bytes", "v1")
    assert len(server.requests) == sent + 1
    headers = server.requests[-1][1]
    assert headers["Host"] == server.url.removeprefix("http://")
    assert not {"Authorization", "Cookie"} & set(headers)


def test_similar_host_names_are_refused(server: HttpServer) -> None:
    options = {"https://good.example": PRIVATE}
    for url in (
        "https://good.example.evil.example/a.jpg",
        "https://good.example:8443/a.jpg",
        "https://good.example@evil.example/a.jpg",
        "https://evil.example/https://good.example/a.jpg",
        "https://evil.example\u2044good.example/a.jpg",
        "http://good.example/a.jpg",
    ):
        with pytest.raises((AddressRefused, UnaddressableKey)):
            Reader(options, retry_timeout=0.0).read(url)
    assert explain_url_refusal("HTTPS://Good.Example./a.jpg", options) is None
    assert explain_url_refusal("https://good.example:443/a b.jpg", options) is None
    for url in ("https://good.example\\@evil.example/a", "https://good.example/a\r\nX: y", "https:///a", "https://[/a"):
        with pytest.raises(UnaddressableKey, match="no URL that can be read"):
            Reader(options, retry_timeout=0.0).read(url)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", "private network"),
        ("10.1.2.3", "private network"),
        ("192.168.0.1", "private network"),
        ("100.64.0.1", "private network"),
        ("::1", "private network"),
        ("fd12::1", "private network"),
        ("::ffff:10.0.0.1", "private network"),
        ("64:ff9b::7f00:1", "private network"),
        ("2002:7f00:1::", "private network"),
        ("169.254.169.254", "credentials"),
        ("169.254.1.1", "credentials"),
        ("::ffff:169.254.169.254", "credentials"),
        ("64:ff9b::a9fe:a9fe", "credentials"),
        ("fe80::1%eth0", "credentials"),
        ("fd00:ec2::254", "credentials"),
        ("100.100.100.200", "credentials"),
        ("168.63.129.16", "credentials"),
        ("0.0.0.0", "no address of a server"),
        ("::", "no address of a server"),
        ("224.0.0.1", "no address of a server"),
        ("255.255.255.255", "no address of a server"),
    ],
)
def test_forbidden_addresses_are_refused(address: str, expected: str) -> None:
    assert expected in str(explain_address_refusal(address, allow_private=False))
    allowed = explain_address_refusal(address, allow_private=True)
    assert (allowed is None) == (expected == "private network")
    assert explain_address_refusal("93.184.215.14", allow_private=False) is None
    assert explain_address_refusal("2606:2800:21f:cb07:6820:80da:af6b:8b2c", allow_private=False) is None


def test_every_address_of_a_host_is_checked_and_reused(server: HttpServer) -> None:
    server.responses["/a.jpg"] = Response(b"bytes")
    answers = [["127.0.0.1"], ["169.254.169.254"]]

    def rebinding(host: str, port: int) -> list[str]:
        assert (host, port) == ("images.example", server.port)
        return answers.pop(0)

    options = {f"http://images.example:{server.port}": PRIVATE}
    url = f"http://images.example:{server.port}/a.jpg"
    web = HttpBackend(options, RetryPolicy(0.0, Outage(0.0)), rebinding)
    sent = len(server.requests)
    assert web.get(url).data == b"bytes"
    assert web.get(url).data == b"bytes", "no second question to the name server in between"
    assert server.requests[sent][1]["Host"] == f"images.example:{server.port}"
    for addresses in (["127.0.0.1", "169.254.169.254"], ["93.184.215.14", "fe80::1"]):
        with pytest.raises(AddressRefused, match="where a cloud hands credentials"):
            HttpBackend(options, RetryPolicy(0.0, Outage(0.0)), lambda *_, found=addresses: found).get(url)
    with pytest.raises(AddressRefused, match="private: true for this host in storage"):
        HttpBackend(
            {key: StorageOptions() for key in options}, RetryPolicy(0.0, Outage(0.0)), lambda *_: ["127.0.0.1"]
        ).get(url)
    assert len(server.requests) == sent + 2


@pytest.mark.parametrize(
    "spelled", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "[::ffff:127.0.0.1]", "localhost"]
)
def test_unusual_spellings_of_loopback_are_refused(spelled: str) -> None:
    with pytest.raises((AddressRefused, Unavailable)) as caught:
        Reader({"http://": StorageOptions()}, retry_timeout=0.0).read(f"http://{spelled}/latest/meta-data/")
    assert "private network" in caught.value.message or isinstance(caught.value, Unavailable)


def test_each_redirect_is_checked_like_the_first_url(server: HttpServer) -> None:
    with run_http_server() as other:
        other.responses["/secret"] = Response(b"inside")
        server.responses["/moved"] = Response(status=302, headers={"Location": "/here.jpg"})
        server.responses["/here.jpg"] = Response(b"bytes")
        server.responses["/out"] = Response(status=301, headers={"Location": f"{other.url}/secret"})
        server.responses["/inside"] = Response(
            status=307, headers={"Location": "http://169.254.169.254/latest/meta-data/"}
        )
        server.responses["/file"] = Response(status=302, headers={"Location": "file:///etc/passwd"})
        server.responses["/user"] = Response(
            status=302, headers={"Location": f"http://me:hunter2hunter2@127.0.0.1:{server.port}/x"}
        )
        server.responses["/round"] = Response(status=302, headers={"Location": "/round"})
        assert reader(server).read(f"{server.url}/moved").data == b"bytes"
        for path, expected in (
            ("/out", "the web, which is read only where"),
            ("/inside", "the web, which is read only where"),
            ("/file", "is neither http nor https"),
            ("/user", "holds user information"),
            ("/round", "redirects more than 5 times"),
        ):
            with pytest.raises(AddressRefused, match=expected) as caught:
                reader(server).read(f"{server.url}{path}")
            assert "hunter2" not in str(caught.value)
        assert other.requests == []
        every = Reader({server.url: PRIVATE, "http://": StorageOptions()}, retry_timeout=0.0)
        for path, expected in (("/out", "in a private network"), ("/inside", "where a cloud hands credentials")):
            with pytest.raises(AddressRefused, match=expected):
                every.read(f"{server.url}{path}")
        assert other.requests == []


def test_size_and_time_of_an_answer_are_limited(server: HttpServer) -> None:
    server.responses["/large"] = Response(b"x" * 5001)
    server.responses["/slow"] = Response(pieces=tuple(b"x" for _ in range(100)), pause=0.1)
    assert len(reader(server, max_bytes=5001).read(f"{server.url}/large").data) == 5001
    with pytest.raises(AddressRefused, match="has more than 5,000 bytes"):
        reader(server, max_bytes=5000).read(f"{server.url}/large")
    for patience in (0.0, 30.0):
        slow = Reader({server.url: StorageOptions(private=True, seconds=0.5)}, patience)
        sent = len(server.requests)
        with pytest.raises(AddressRefused, match=r"longer than 0\.5 s"):
            slow.read(f"{server.url}/slow")
        assert len(server.requests) == sent + 1


def test_http_statuses_map_to_errors(server: HttpServer) -> None:
    server.responses |= {
        "/gone": Response(status=410),
        "/denied": Response(status=403),
        "/broken": Response(status=500),
        "/short": Response(b"abc", length=10),
        "/weak": Response(b"abc", headers={"ETag": 'W/"x"'}),
        "/tagged": Response(b"abc", headers={"ETag": '"x"'}),
    }
    refused = (400, 401, 402, 403, 405, 451)
    server.responses |= {f"/{status}": Response(status=status) for status in (*refused, 408, 429)}
    kinds = [("/absent", NotFound), ("/gone", NotFound), ("/denied", AddressRefused), ("/broken", Unavailable)]
    kinds += [(f"/{status}", AddressRefused) for status in refused]
    for path, kind in (*kinds, ("/408", Unavailable), ("/429", Unavailable), ("/short", Unavailable)):
        with pytest.raises(kind):
            reader(server).read(f"{server.url}{path}")
    assert reader(server).read(f"{server.url}/weak").etag is None
    with pytest.raises(PreconditionFailed):
        reader(server).read(f"{server.url}/tagged", etag="y")
    assert reader(server).stat(f"{server.url}/tagged").size == 3
    with reader(server).open(f"{server.url}/tagged") as file:
        assert file.read() == b"abc"
    with pytest.raises(InvalidJob, match="the web has no listing"):
        list(reader(server).list(f"{server.url}/"))


def test_transient_status_is_retried(server: HttpServer) -> None:
    answers = iter([Response(status=503), Response(status=429), Response(b"bytes")])
    server.responses["/flaky"] = lambda _: next(answers)
    assert Reader({server.url: PRIVATE}, retry_timeout=20.0).read(f"{server.url}/flaky").data == b"bytes"


def create_tls_context(folder: Path, name: str) -> ssl.SSLContext:
    """Self-signed certificate of a server, for a name; the file is `name.pem`."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    formats = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / f"{name}.pem").write_bytes(pem)
    (folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *formats))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


def test_certificate_is_verified_for_the_host_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def https_backend(host: str) -> HttpBackend:
        place = f"https://{host}:{secured.port}"
        return HttpBackend({place: PRIVATE}, RetryPolicy(0.0, Outage(0.0)), lambda *_: ["127.0.0.1"])

    with run_http_server(create_tls_context(tmp_path, "images.example")) as secured:
        secured.responses["/a.jpg"] = Response(b"bytes")
        with pytest.raises(Unavailable, match="certificate verify failed"):
            https_backend("images.example").get(f"https://images.example:{secured.port}/a.jpg")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "images.example.pem"))
        assert https_backend("images.example").get(f"https://images.example:{secured.port}/a.jpg").data == b"bytes"
        with pytest.raises(Unavailable, match=r"certificate verify failed|doesn't match|not valid for"):
            https_backend("other.example").get(f"https://other.example:{secured.port}/a.jpg")


def test_read_many_returns_results_and_errors_in_order(server: HttpServer) -> None:
    server.responses |= {f"/{number}.jpg": Response(f"{number}".encode()) for number in range(50)}
    uris = [f"{server.url}/{number}.jpg" for number in range(50)]
    found = reader(server).read_many([*uris, f"{server.url}/absent", "http://elsewhere.example/a.jpg"])
    assert [answer.data for answer in found[:50] if isinstance(answer, ObjectData)] == [
        f"{n}".encode() for n in range(50)
    ]
    assert [type(answer) for answer in found[50:]] == [NotFound, AddressRefused]


def test_refused_image_is_an_error_row(server: HttpServer) -> None:
    server.responses["/inside.jpg"] = Response(status=302, headers={"Location": "http://10.0.0.1/x.jpg"})
    server.responses["/fine.jpg"] = Response(b"bytes")
    locations = [f"{server.url}/{name}.jpg" for name in ("fine", "inside")]
    fine, inside = Fetcher(reader(server)).fetch([ImageRef(n, uri, uri) for n, uri in enumerate(locations)])
    assert isinstance(fine, ObjectData)
    assert isinstance(inside, ErrorRecord)
    assert (inside.stage, inside.type) == ("fetch", "refused")


def refs(*locations: str) -> list[ImageRef]:
    return [ImageRef(position, uri, uri) for position, uri in enumerate(locations)]


def test_dead_host_fails_its_images_if_another_host_answers(server: HttpServer) -> None:
    server.responses |= {"/a.jpg": Response(b"a"), "/b.jpg": Response(b"b"), "/broken.jpg": Response(status=500)}
    with run_http_server() as other, socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and does not listen
        dead = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        other.responses["/c.jpg"] = Response(b"c")
        fetcher = Fetcher(Reader({server.url: PRIVATE, other.url: PRIVATE, dead: PRIVATE}, retry_timeout=0.05))
        read = fetcher.fetch(refs(f"{server.url}/a.jpg", f"{other.url}/c.jpg"))
        assert [type(answer) for answer in read] == [ObjectData, ObjectData]
        found, *faults = fetcher.fetch(refs(f"{server.url}/b.jpg", f"{server.url}/broken.jpg", f"{dead}/d.jpg"))
        assert isinstance(found, ObjectData)
        other.responses["/c.jpg"] = Response(status=500)  # the last that was read
        faults += fetcher.fetch(refs(f"{other.url}/c.jpg"))
        for fault in faults:
            assert isinstance(fault, ErrorRecord)
            assert (fault.stage, fault.type) == ("fetch", "unreadable")
            assert "others on the web can be read" in fault.message
        with pytest.raises(Unavailable, match="does not answer"):
            Fetcher(Reader({dead: PRIVATE}, retry_timeout=0.05)).fetch(refs(f"{dead}/d.jpg"))


def test_too_large_image_is_not_read(server: HttpServer) -> None:
    server.responses["/huge.jpg"] = Response(b"", length=20_000_000_000)
    (fault,) = Fetcher(reader(server), max_bytes=1000).fetch(refs(f"{server.url}/huge.jpg"))
    assert fault == ErrorRecord("fetch", "too_large", "the file has 20,000,000,000 bytes, over decode.max_bytes 1,000")


def test_all_hosts_share_one_ssl_context(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[ssl.SSLContext] = []
    create = ssl.create_default_context

    def create_and_count() -> ssl.SSLContext:
        contexts.append(create())
        return contexts[-1]

    monkeypatch.setattr(ssl, "create_default_context", create_and_count)
    hosts = [f"https://{host}:{server.port}" for host in ("127.0.0.1", "localhost")]
    one = Reader(dict.fromkeys(hosts, PRIVATE), retry_timeout=0.0)
    for host in hosts:  # which speaks no TLS
        with pytest.raises(Unavailable):
            one.read(f"{host}/a.jpg")
    assert {type(answer) for answer in one.read_many([f"{host}/a.jpg" for host in hosts])} == {Unavailable}
    assert len(contexts) == 1


def list_manifest(folder: Path, uris: list[str], options: dict[str, StorageOptions] | None = None) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "m.csv").write_text("image\n" + "\n".join(uris) + "\n")
    source = ManifestSource.model_validate({"uri": str(folder / "m.csv"), "uri_column": "image"})
    batches = pa.Table.from_batches(list(source.refs(Reader(options), Cursor())))
    return [str(uri) for uri in batches.column("location").to_pylist()]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://images.example/a.jpg", "row 2: https://images.example/a.jpg is on the web, which is read only where"),
        ("https://me:hunter2hunter2@named.example/a.jpg", r"row 2: https://…@named.example/a.jpg holds credentials"),
        (
            "https://named.example/a.jpg?X-Amz-Signature=abcdef0123",
            r"row 2: https://named.example/a.jpg\?… is a presigned",
        ),
        ("s3://bucket/a.jpg?x=1&X-Amz-Signature=abcdef0123", r"row 2: s3://bucket/a.jpg\?… is a presigned URL"),
        ("az://container/a.jpg?sv=2024&sig=abcdef0123", r"row 2: az://container/a.jpg\?… is a presigned URL"),
        ("http://169.254.169.254/latest", "row 2: http://169.254.169.254/latest is on the web"),
        ("zip://a.jpg::https://named.example/a.zip", "reaches the web through another protocol"),
        (
            "zip://a.jpg::s3://bucket/a.zip",
            r"is of a protocol that data may name only where the job does, storage: \{'zip://",
        ),
        ("webhdfs://10.0.0.1/a.jpg", "is of a protocol that data may name only where the job does"),
        ("ftp://10.0.0.1/a.jpg", "is of a protocol that data may name only where the job does"),
    ],
)
def test_manifest_rows_with_secrets_or_foreign_hosts_are_refused(tmp_path: Path, uri: str, expected: str) -> None:
    options = {"https://named.example": StorageOptions()}
    with pytest.raises(InvalidJob, match=expected) as caught:
        list_manifest(tmp_path, ["a.jpg", uri], options)
    assert "hunter2" not in str(caught.value)
    assert "abcdef0123" not in str(caught.value)


def test_manifest_rows_of_named_hosts_and_protocols_are_accepted(tmp_path: Path) -> None:
    uris = [
        "https://named.example/a.jpg?width=100",
        "zip://a.jpg::s3://bucket/a.zip",
        "s3://bucket/k@2x.jpg",
        "/a?sig=1.jpg",
    ]
    options = {"https://named.example": StorageOptions(), "zip://": StorageOptions()}
    assert list_manifest(tmp_path, uris, options) == uris
    assert list_manifest(tmp_path, ["https://any.example/a.jpg"], {"https://": StorageOptions()})
    with pytest.raises(InvalidJob, match=r"row 1: http://10\.0\.0\.1/a\.jpg leads to 10\.0\.0\.1 in a private network"):
        list_manifest(tmp_path, ["http://10.0.0.1/a.jpg"], {"http://": StorageOptions()})


def test_other_protocols_cannot_reach_the_web() -> None:
    for uri in ("simplecache://::https://named.example/a.jpg", "zip://a::http://named.example/a.zip"):
        with pytest.raises(StorageError, match="reaches the web through another protocol"):
            Reader({"https://": PRIVATE}, retry_timeout=0.0).read(uri)


def test_manifest_on_the_web_is_read_if_its_host_is_named(server: HttpServer) -> None:
    server.responses["/index/m.csv"] = Response(b"image\na.jpg\n../b.jpg\n")
    server.responses["/index/moved.csv"] = Response(status=302, headers={"Location": "http://10.0.0.1/m.csv"})
    source = ManifestSource.model_validate({"uri": f"{server.url}/index/m.csv", "uri_column": "image"})
    rows = pa.Table.from_batches(list(source.refs(reader(server), Cursor())))
    assert rows.column("location").to_pylist() == [f"{server.url}/index/a.jpg", f"{server.url}/b.jpg"]
    with pytest.raises(
        InvalidJob, match=r"input\.uri http://127.*: is on the web, which is read only where the job names"
    ):
        source.check(Reader(retry_timeout=0.0))
    moved = ManifestSource.model_validate({"uri": f"{server.url}/index/moved.csv", "uri_column": "image"})
    with pytest.raises(InvalidJob, match=r"redirects to http://10\.0\.0\.1/m\.csv"):
        moved.check(reader(server))


def test_folder_on_the_web_cannot_be_listed(server: HttpServer) -> None:
    with pytest.raises(InvalidJob, match="the web has no listing; name its images in a manifest"):
        PrefixSource.model_validate({"uri": f"{server.url}/images/"}).check(reader(server))
