"""Fakes of Google Cloud Storage's XML API and of Azure's blob service: PUT, GET, HEAD, DELETE and listings in pages.

For tests without a real server. Both ignore "start after", as real servers do, and check the conditions of a PUT.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.loopback import serve_in_thread

__all__ = ["FakeCloud", "run_fake_cloud"]

_DATE = "Sat, 21 Nov 2026 01:00:00 GMT"


@dataclass
class FakeCloud:
    """A running fake with one bucket.

    Attributes:
        provider: `gs` or `az`.
        endpoint: URL of the server.
        objects: Bytes by key.
        page_size: Keys per page of a listing.
        cut: Called with the number of each listing request, from 1; True breaks the connection.
        requests: Method and path with query of each request so far.
    """

    provider: str
    endpoint: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    page_size: int = 1000
    cut: Callable[[int], bool] = lambda number: False
    requests: list[str] = field(default_factory=list)
    listings: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def uri(self) -> str:
        """URI of the bucket."""
        return f"{self.provider}://lake/"

    def render_listing(self, query: dict[str, str]) -> bytes:
        """Return one page as XML."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        token = query.get("marker") or query.get("continuation-token") or ""
        keys, folders = [], set()
        for key in sorted(self.objects, key=str.encode):
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and delimiter and delimiter in name:
                folders.add(prefix + name.partition(delimiter)[0] + delimiter)
            elif key.startswith(prefix) and key > token:
                keys.append(key)
        page, more = keys[: self.page_size], len(keys) > self.page_size
        following = escape(page[-1]) if more else ""
        if self.provider == "az":
            blobs = "".join(
                f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{_DATE}</Last-Modified>"
                f"<Content-Length>{len(self.objects[key])}</Content-Length><Content-Type>a/b</Content-Type>"
                f"<Etag>{self.etag(key)}</Etag></Properties></Blob>"
                for key in page
            ) + "".join(f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>" for folder in sorted(folders))
            body = f"<Blobs>{blobs}</Blobs><NextMarker>{following}</NextMarker>"
            return f"<EnumerationResults>{body}</EnumerationResults>".encode()
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key])}</Size><ETag>{self.etag(key)}</ETag>"
            "<LastModified>2026-11-21T01:00:00.000Z</LastModified></Contents>"
            for key in page
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders))
        token_field = f"<NextContinuationToken>{following}</NextContinuationToken>" if more else ""
        truncated = str(more).lower()
        body = f"<IsTruncated>{truncated}</IsTruncated>{token_field}{contents}"
        return f"<ListBucketResult>{body}</ListBucketResult>".encode()

    def etag(self, key: str) -> str:
        """Return the tag of an object's bytes."""
        return f'"{hashlib.md5(self.objects[key], usedforsecurity=False).hexdigest()}"'

    def generation(self, key: str) -> str:
        """Return the generation of an object, which changes with its bytes."""
        return str(int(self.etag(key)[1:12], 16) + 1)

    def may_write(self, key: str, headers: dict[str, str]) -> bool:
        """Check the conditions of a PUT or DELETE."""
        exists = key in self.objects
        if "x-goog-if-generation-match" in headers:
            return headers["x-goog-if-generation-match"] == (self.generation(key) if exists else "0")
        if headers.get("if-none-match") == "*":
            return not exists
        if "if-match" in headers:
            return exists and headers["if-match"].strip('"') == self.etag(key).strip('"')
        return True


class _CloudRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cloud: FakeCloud

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def handle_any(self) -> None:
        """Answer a request of any method."""
        cloud, parts = self.cloud, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        _, _, key = unquote(parts.path).lstrip("/").partition("/")
        with cloud.lock:
            cloud.requests.append(f"{self.command} {self.path}")
            if query.get("comp") == "list" or "list-type" in query:
                cloud.listings += 1
                if cloud.cut(cloud.listings):
                    self.close_connection = True
                    self.connection.close()
                    return
                self._answer(200, cloud.render_listing(query), {"content-type": "application/xml"})
            elif self.command == "POST":
                self._delete_batch(body)
            elif self.command == "PUT":
                if not cloud.may_write(key, headers):
                    conflict = cloud.provider == "az" and headers.get("if-none-match") == "*"
                    self._answer(409 if conflict else 412, b"<Error><Code>Refused</Code></Error>")
                    return
                cloud.objects[key] = body
                self._answer(201 if cloud.provider == "az" else 200, b"", self._tags(key))
            elif key not in cloud.objects:
                self._answer(404, b"<Error><Code>NotFound</Code></Error>")
            elif self.command == "DELETE":
                del cloud.objects[key]
                self._answer(202 if cloud.provider == "az" else 204, b"")
            else:
                self._send_object(key, headers)

    def __getattr__(self, name: str) -> Any:
        if name in ("do_GET", "do_PUT", "do_HEAD", "do_DELETE", "do_POST"):
            return self.handle_any
        raise AttributeError(name)

    def _delete_batch(self, body: bytes) -> None:
        """Answer Azure's batch of DELETE requests: one part for each."""
        parts = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP", body)):
            key = unquote(urlsplit(path.decode()).path).lstrip("/").partition("/")[2]
            status = "202 Accepted" if self.cloud.objects.pop(key, None) is not None else "404 The blob is not there"
            head = f"--part\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
            parts.append(f"{head}HTTP/1.1 {status}\r\nx-ms-request-id: {number}\r\n\r\n")
        answer = "".join(parts) + "--part--\r\n"
        self._answer(202, answer.encode(), {"content-type": "multipart/mixed; boundary=part"})

    def _send_object(self, key: str, headers: dict[str, str]) -> None:
        data, status, more = self.cloud.objects[key], 200, self._tags(key)
        wanted = headers.get("range") or headers.get("x-ms-range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first = int(start) if start else max(0, len(data) - int(end))
            last = min(int(end), len(data) - 1) if start and end else len(data) - 1
            more["content-range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._answer(status, data, more)

    def _tags(self, key: str) -> dict[str, str]:
        tags = {"etag": self.cloud.etag(key), "last-modified": _DATE}
        return tags | ({"x-goog-generation": self.cloud.generation(key)} if self.cloud.provider == "gs" else {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def run_fake_cloud(provider: str) -> Iterator[FakeCloud]:
    """Run a fake on a free port of the loopback interface."""
    cloud = FakeCloud(provider)
    request_class = type("Request", (_CloudRequest,), {"cloud": cloud})
    server = ThreadingHTTPServer(("127.0.0.1", 0), request_class)
    cloud.endpoint = f"http://127.0.0.1:{server.server_port}"
    with serve_in_thread(server):
        yield cloud
