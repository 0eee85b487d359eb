"""Images on the web: only from hosts that the job names, and never by way of a name to where workers alone may go."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from http_server import HttpServer, Response, run_http_server

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

OPEN = StorageOptions(private=True)


@pytest.fixture(scope="module")
def site() -> Iterator[HttpServer]:
    with run_http_server() as running:
        yield running


def reader(site: HttpServer, **options: Any) -> Reader:
    return Reader({site.url: StorageOptions(private=True, **options)}, retry_timeout=0.0)


def test_the_web_is_off_unless_the_job_names_the_host(site: HttpServer) -> None:
    site.responses["/a.jpg"] = Response(b"bytes", headers={"ETag": '"v1"'})
    for options in (
        {},
        {"https://127.0.0.1": OPEN},
        {"http://127.0.0.1": OPEN},
        {"http://other": OPEN},
        {"s3://": OPEN},
    ):
        with pytest.raises(
            AddressRefused, match=r"on the web, which is read only where the job names the host, storage: \{'http"
        ):
            Reader(options, retry_timeout=0.0).read(f"{site.url}/a.jpg")
    asked = len(site.requests)
    assert reader(site).read(f"{site.url}/a.jpg") == ObjectData(b"bytes", "v1")
    assert len(site.requests) == asked + 1
    headers = site.requests[-1][1]
    assert headers["Host"] == site.url.removeprefix("http://")
    assert not {"Authorization", "Cookie"} & set(headers)


def test_a_name_that_only_looks_like_the_host_is_another(site: HttpServer) -> None:
    options = {"https://good.example": OPEN}
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
    ("address", "said"),
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
def test_addresses_that_no_name_may_lead_to(address: str, said: str) -> None:
    assert said in str(explain_address_refusal(address, allow_private=False))
    allowed = explain_address_refusal(address, allow_private=True)
    assert (allowed is None) == (said == "private network")
    assert explain_address_refusal("93.184.215.14", allow_private=False) is None
    assert explain_address_refusal("2606:2800:21f:cb07:6820:80da:af6b:8b2c", allow_private=False) is None


def test_every_address_of_a_name_is_looked_at_and_the_one_that_was_is_used(site: HttpServer) -> None:
    site.responses["/a.jpg"] = Response(b"bytes")
    answers = [["127.0.0.1"], ["169.254.169.254"]]

    def rebinding(host: str, port: int) -> list[str]:
        assert (host, port) == ("images.example", site.port)
        return answers.pop(0)

    options = {f"http://images.example:{site.port}": OPEN}
    url = f"http://images.example:{site.port}/a.jpg"
    web = HttpBackend(options, RetryPolicy(0.0, Outage(0.0)), rebinding)
    asked = len(site.requests)
    assert web.get(url).data == b"bytes"
    assert web.get(url).data == b"bytes", "no second question to the name server in between"
    assert site.requests[asked][1]["Host"] == f"images.example:{site.port}"
    for addresses in (["127.0.0.1", "169.254.169.254"], ["93.184.215.14", "fe80::1"]):
        with pytest.raises(AddressRefused, match="where a cloud hands credentials"):
            HttpBackend(options, RetryPolicy(0.0, Outage(0.0)), lambda *_, found=addresses: found).get(url)
    with pytest.raises(AddressRefused, match="private: true for this host in storage"):
        HttpBackend(
            {key: StorageOptions() for key in options}, RetryPolicy(0.0, Outage(0.0)), lambda *_: ["127.0.0.1"]
        ).get(url)
    assert len(site.requests) == asked + 2


@pytest.mark.parametrize(
    "spelled", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "[::ffff:127.0.0.1]", "localhost"]
)
def test_odd_spellings_of_this_machine_are_seen_through(spelled: str) -> None:
    with pytest.raises((AddressRefused, Unavailable)) as caught:
        Reader({"http://": StorageOptions()}, retry_timeout=0.0).read(f"http://{spelled}/latest/meta-data/")
    assert "private network" in caught.value.message or isinstance(caught.value, Unavailable)


def test_each_redirect_is_looked_at_as_the_first_step(site: HttpServer) -> None:
    with run_http_server() as other:
        other.responses["/secret"] = Response(b"inside")
        site.responses["/moved"] = Response(status=302, headers={"Location": "/here.jpg"})
        site.responses["/here.jpg"] = Response(b"bytes")
        site.responses["/out"] = Response(status=301, headers={"Location": f"{other.url}/secret"})
        site.responses["/inside"] = Response(
            status=307, headers={"Location": "http://169.254.169.254/latest/meta-data/"}
        )
        site.responses["/file"] = Response(status=302, headers={"Location": "file:///etc/passwd"})
        site.responses["/user"] = Response(
            status=302, headers={"Location": f"http://me:hunter2hunter2@127.0.0.1:{site.port}/x"}
        )
        site.responses["/round"] = Response(status=302, headers={"Location": "/round"})
        assert reader(site).read(f"{site.url}/moved").data == b"bytes"
        for path, said in (
            ("/out", "the web, which is read only where"),
            ("/inside", "the web, which is read only where"),
            ("/file", "is neither http nor https"),
            ("/user", "holds user information"),
            ("/round", "redirects more than 5 times"),
        ):
            with pytest.raises(AddressRefused, match=said) as caught:
                reader(site).read(f"{site.url}{path}")
            assert "hunter2" not in str(caught.value)
        assert other.requests == []
        every = Reader({site.url: OPEN, "http://": StorageOptions()}, retry_timeout=0.0)
        for path, said in (("/out", "in a private network"), ("/inside", "where a cloud hands credentials")):
            with pytest.raises(AddressRefused, match=said):
                every.read(f"{site.url}{path}")
        assert other.requests == []


def test_bytes_and_seconds_have_limits(site: HttpServer) -> None:
    site.responses["/large"] = Response(b"x" * 5001)
    site.responses["/slow"] = Response(pieces=tuple(b"x" for _ in range(100)), pause=0.1)
    assert len(reader(site, max_bytes=5001).read(f"{site.url}/large").data) == 5001
    with pytest.raises(AddressRefused, match="has more than 5,000 bytes"):
        reader(site, max_bytes=5000).read(f"{site.url}/large")
    for patience in (0.0, 30.0):
        slow = Reader({site.url: StorageOptions(private=True, seconds=0.5)}, patience)
        asked = len(site.requests)
        with pytest.raises(AddressRefused, match=r"longer than 0\.5 s"):
            slow.read(f"{site.url}/slow")
        assert len(site.requests) == asked + 1


def test_answers_are_told_apart(site: HttpServer) -> None:
    site.responses |= {
        "/gone": Response(status=410),
        "/denied": Response(status=403),
        "/broken": Response(status=500),
        "/short": Response(b"abc", length=10),
        "/weak": Response(b"abc", headers={"ETag": 'W/"x"'}),
        "/tagged": Response(b"abc", headers={"ETag": '"x"'}),
    }
    refused = (400, 401, 402, 403, 405, 451)
    site.responses |= {f"/{status}": Response(status=status) for status in (*refused, 408, 429)}
    kinds = [("/absent", NotFound), ("/gone", NotFound), ("/denied", AddressRefused), ("/broken", Unavailable)]
    kinds += [(f"/{status}", AddressRefused) for status in refused]
    for path, kind in (*kinds, ("/408", Unavailable), ("/429", Unavailable), ("/short", Unavailable)):
        with pytest.raises(kind):
            reader(site).read(f"{site.url}{path}")
    assert reader(site).read(f"{site.url}/weak").etag is None
    with pytest.raises(PreconditionFailed):
        reader(site).read(f"{site.url}/tagged", etag="y")
    assert reader(site).stat(f"{site.url}/tagged").size == 3
    with reader(site).open(f"{site.url}/tagged") as file:
        assert file.read() == b"abc"
    with pytest.raises(InvalidJob, match="the web has no listing"):
        list(reader(site).list(f"{site.url}/"))


def test_a_fault_that_passes_is_asked_again(site: HttpServer) -> None:
    answers = iter([Response(status=503), Response(status=429), Response(b"bytes")])
    site.responses["/flaky"] = lambda _: next(answers)
    assert Reader({site.url: OPEN}, retry_timeout=20.0).read(f"{site.url}/flaky").data == b"bytes"


def certified(folder: Path, name: str) -> ssl.SSLContext:
    """A server's certificate for a name, which nobody has signed but itself; the file is `name.pem`."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    whose = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder(whose, whose, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    forms = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / f"{name}.pem").write_bytes(pem)
    (folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *forms))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


def test_a_certificate_is_that_of_the_name_though_an_address_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def secure(host: str) -> HttpBackend:
        place = f"https://{host}:{secured.port}"
        return HttpBackend({place: OPEN}, RetryPolicy(0.0, Outage(0.0)), lambda *_: ["127.0.0.1"])

    with run_http_server(certified(tmp_path, "images.example")) as secured:
        secured.responses["/a.jpg"] = Response(b"bytes")
        with pytest.raises(Unavailable, match="certificate verify failed"):
            secure("images.example").get(f"https://images.example:{secured.port}/a.jpg")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "images.example.pem"))
        assert secure("images.example").get(f"https://images.example:{secured.port}/a.jpg").data == b"bytes"
        with pytest.raises(Unavailable, match=r"certificate verify failed|doesn't match|not valid for"):
            secure("other.example").get(f"https://other.example:{secured.port}/a.jpg")


def test_many_reads_answer_each_for_itself(site: HttpServer) -> None:
    site.responses |= {f"/{number}.jpg": Response(f"{number}".encode()) for number in range(50)}
    uris = [f"{site.url}/{number}.jpg" for number in range(50)]
    found = reader(site).read_many([*uris, f"{site.url}/absent", "http://elsewhere.example/a.jpg"])
    assert [answer.data for answer in found[:50] if isinstance(answer, ObjectData)] == [
        f"{n}".encode() for n in range(50)
    ]
    assert [type(answer) for answer in found[50:]] == [NotFound, AddressRefused]


def test_what_is_refused_while_reading_is_an_error_row(site: HttpServer) -> None:
    site.responses["/inside.jpg"] = Response(status=302, headers={"Location": "http://10.0.0.1/x.jpg"})
    site.responses["/fine.jpg"] = Response(b"bytes")
    locations = [f"{site.url}/{name}.jpg" for name in ("fine", "inside")]
    fine, inside = Fetcher(reader(site)).fetch([ImageRef(n, uri, uri) for n, uri in enumerate(locations)])
    assert isinstance(fine, ObjectData)
    assert isinstance(inside, ErrorRecord)
    assert (inside.stage, inside.type) == ("fetch", "refused")


def refs(*locations: str) -> list[ImageRef]:
    return [ImageRef(position, uri, uri) for position, uri in enumerate(locations)]


def test_a_host_that_is_gone_is_the_fault_of_its_images_while_another_answers(site: HttpServer) -> None:
    site.responses |= {"/a.jpg": Response(b"a"), "/b.jpg": Response(b"b"), "/broken.jpg": Response(status=500)}
    with run_http_server() as other, socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and does not listen
        dead = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        other.responses["/c.jpg"] = Response(b"c")
        fetcher = Fetcher(Reader({site.url: OPEN, other.url: OPEN, dead: OPEN}, retry_timeout=0.05))
        read = fetcher.fetch(refs(f"{site.url}/a.jpg", f"{other.url}/c.jpg"))
        assert [type(answer) for answer in read] == [ObjectData, ObjectData]
        found, *faults = fetcher.fetch(refs(f"{site.url}/b.jpg", f"{site.url}/broken.jpg", f"{dead}/d.jpg"))
        assert isinstance(found, ObjectData)
        other.responses["/c.jpg"] = Response(status=500)  # the last that was read
        faults += fetcher.fetch(refs(f"{other.url}/c.jpg"))
        for fault in faults:
            assert isinstance(fault, ErrorRecord)
            assert (fault.stage, fault.type) == ("fetch", "unreadable")
            assert "others on the web can be read" in fault.message
        with pytest.raises(Unavailable, match="does not answer"):
            Fetcher(Reader({dead: OPEN}, retry_timeout=0.05)).fetch(refs(f"{dead}/d.jpg"))


def test_an_image_that_is_too_large_is_not_read(site: HttpServer) -> None:
    site.responses["/huge.jpg"] = Response(b"", length=20_000_000_000)
    (fault,) = Fetcher(reader(site), max_bytes=1000).fetch(refs(f"{site.url}/huge.jpg"))
    assert fault == ErrorRecord("fetch", "too_large", "the file has 20,000,000,000 bytes, over decode.max_bytes 1,000")


def test_all_hosts_share_one_set_of_trusted_certificates(site: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ssl.SSLContext] = []
    create = ssl.create_default_context

    def counted() -> ssl.SSLContext:
        made.append(create())
        return made[-1]

    monkeypatch.setattr(ssl, "create_default_context", counted)
    hosts = [f"https://{host}:{site.port}" for host in ("127.0.0.1", "localhost")]
    one = Reader(dict.fromkeys(hosts, OPEN), retry_timeout=0.0)
    for host in hosts:  # which speaks no TLS
        with pytest.raises(Unavailable):
            one.read(f"{host}/a.jpg")
    assert {type(answer) for answer in one.read_many([f"{host}/a.jpg" for host in hosts])} == {Unavailable}
    assert len(made) == 1


def planned(folder: Path, uris: list[str], options: dict[str, StorageOptions] | None = None) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "m.csv").write_text("image\n" + "\n".join(uris) + "\n")
    source = ManifestSource.model_validate({"uri": str(folder / "m.csv"), "uri_column": "image"})
    batches = pa.Table.from_batches(list(source.refs(Reader(options), Cursor())))
    return [str(uri) for uri in batches.column("location").to_pylist()]


@pytest.mark.parametrize(
    ("uri", "said"),
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
def test_a_plan_refuses_rows_that_carry_secrets_or_lead_elsewhere(tmp_path: Path, uri: str, said: str) -> None:
    options = {"https://named.example": StorageOptions()}
    with pytest.raises(InvalidJob, match=said) as caught:
        planned(tmp_path, ["a.jpg", uri], options)
    assert "hunter2" not in str(caught.value)
    assert "abcdef0123" not in str(caught.value)


def test_a_plan_takes_rows_of_hosts_and_protocols_that_the_job_names(tmp_path: Path) -> None:
    uris = [
        "https://named.example/a.jpg?width=100",
        "zip://a.jpg::s3://bucket/a.zip",
        "s3://bucket/k@2x.jpg",
        "/a?sig=1.jpg",
    ]
    options = {"https://named.example": StorageOptions(), "zip://": StorageOptions()}
    assert planned(tmp_path, uris, options) == uris
    assert planned(tmp_path, ["https://any.example/a.jpg"], {"https://": StorageOptions()})
    with pytest.raises(InvalidJob, match=r"row 1: http://10\.0\.0\.1/a\.jpg leads to 10\.0\.0\.1 in a private network"):
        planned(tmp_path, ["http://10.0.0.1/a.jpg"], {"http://": StorageOptions()})


def test_other_protocols_do_not_lead_to_the_web_either() -> None:
    for uri in ("simplecache://::https://named.example/a.jpg", "zip://a::http://named.example/a.zip"):
        with pytest.raises(StorageError, match="reaches the web through another protocol"):
            Reader({"https://": OPEN}, retry_timeout=0.0).read(uri)


def test_a_manifest_on_the_web_is_read_where_its_host_is_named(site: HttpServer) -> None:
    site.responses["/index/m.csv"] = Response(b"image\na.jpg\n../b.jpg\n")
    site.responses["/index/moved.csv"] = Response(status=302, headers={"Location": "http://10.0.0.1/m.csv"})
    source = ManifestSource.model_validate({"uri": f"{site.url}/index/m.csv", "uri_column": "image"})
    rows = pa.Table.from_batches(list(source.refs(reader(site), Cursor())))
    assert rows.column("location").to_pylist() == [f"{site.url}/index/a.jpg", f"{site.url}/b.jpg"]
    with pytest.raises(
        InvalidJob, match=r"input\.uri http://127.*: is on the web, which is read only where the job names"
    ):
        source.check(Reader(retry_timeout=0.0))
    moved = ManifestSource.model_validate({"uri": f"{site.url}/index/moved.csv", "uri_column": "image"})
    with pytest.raises(InvalidJob, match=r"redirects to http://10\.0\.0\.1/m\.csv"):
        moved.check(reader(site))


def test_a_folder_on_the_web_cannot_be_listed(site: HttpServer) -> None:
    with pytest.raises(InvalidJob, match="the web has no listing; name its images in a manifest"):
        PrefixSource.model_validate({"uri": f"{site.url}/images/"}).check(reader(site))
