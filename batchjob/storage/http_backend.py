"""Objects on the web by HTTP and HTTPS, only from hosts that the job names, never from a metadata address of a cloud.

A host name is resolved once, every address is checked, and the connection is made to a checked address; the same holds
for each redirect. Proxies are not used: behind one, batchjob cannot see to which address a name leads.
"""

from __future__ import annotations

import copy
import io
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from urllib.parse import urljoin

from batchjob.errors import AddressRefused, InvalidJob, UnaddressableKey
from batchjob.storage.backend import READ_THREADS, unquote_etag
from batchjob.storage.client_errors import check_etag, check_size, treat_416_as_empty
from batchjob.storage.http_access import HttpTarget, explain_address_refusal, parse_target, resolve_host
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.options import OptionsByPrefix
from batchjob.storage.retry_policy import CONNECT_TIMEOUT, RetryPolicy
from batchjob.uris import suggest_bucket_uri

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, HTTPConnectionPool, PoolManager

__all__ = ["HttpBackend"]

T = TypeVar("T")

_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5
# Of the statuses 4xx, these are no refusals: 404 and 410 are not there, 408 and 429 may pass.
_NOT_REFUSALS = {404, 408, 410, 429}
_PARTIAL_CONTENT = 206
_ADDRESS_SECONDS = 60.0  # for which the addresses of a host are kept
_MAX_HOSTS, _MAX_POOLS = 10_000, 64
_CHUNK_BYTES = 1 << 16


class HttpBackend:
    """All hosts that the job's storage options name. Keys are whole URLs.

    Args:
        options: Storage options of the job; those of the prefixes `http://host` and `https://host` count.
        policy: Retries and timeouts.
        resolver: Returns the addresses of a host and port; replaced in tests.
    """

    def __init__(
        self,
        options: OptionsByPrefix,
        policy: RetryPolicy,
        resolver: Callable[[str, int], Sequence[str]] = resolve_host,
    ) -> None:
        self._options, self._policy = options, policy
        self._connections = _Connections(resolver)

    def with_policy(self, policy: RetryPolicy) -> HttpBackend:
        """Return a backend with other retries and timeouts that shares the connections of this one."""
        other = copy.copy(self)
        other._policy = policy
        return other

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        """Return an object. See `Backend.get`; AddressRefused if the job may not read it, or the host refuses."""
        response = self._send(key, lambda: self._request(key, {}, limit))
        check_etag(etag, response.etag, key)
        return ObjectData(response.data, response.etag)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`."""

        def request() -> bytes:
            response = self._request(key, {"Range": f"bytes={start}-{end - 1}"})
            # A server may ignore the range and answer 200 with the whole object.
            return response.data if response.status == _PARTIAL_CONTENT else response.data[start:end]

        return self._send(key, lambda: treat_416_as_empty(request))

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag of an object, which is read: many servers answer HEAD differently from GET."""
        data = self.get(key)
        return ObjectInfo(key, len(data.data), data.etag)

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:  # noqa: ARG002 - Backend
        """Raise InvalidJob: the web has no listing."""
        advice = suggest_bucket_uri(prefix) or "; name its images in a manifest"
        raise InvalidJob(f"{prefix}: the web has no listing{advice}")

    def open(self, key: str) -> BinaryIO:
        """Return an object, read whole, as a seekable file."""
        return io.BytesIO(self.get(key).data)

    def _send(self, url: str, request: Callable[[], T]) -> T:
        def send_once() -> T:
            try:
                return request()
            except HttpStatusError as error:
                # No credentials are sent that could be renewed: a refusal is a fault of this image.
                if 400 <= error.status < 500 and error.status not in _NOT_REFUSALS:
                    raise AddressRefused(f"{url}: the host refuses it ({error})") from error
                raise

        return self._policy.send(url, send_once)

    def _request(self, url: str, headers: Mapping[str, str], limit: int | None = None) -> _Response:
        target = parse_target(url, self._options)
        deadline = time.monotonic() + target.options.seconds
        response = self._follow_redirects(target, headers, deadline)
        try:
            if not 200 <= response.status < 300:
                raise HttpStatusError(response.status, response.reason)
            data = _read_body(response, target, deadline, limit)
        except BaseException:
            response.close()
            raise
        response.release_conn()
        etag = response.headers.get("ETag", "")
        return _Response(data, None if etag.startswith("W/") else unquote_etag(etag), response.status)

    def _follow_redirects(self, target: HttpTarget, headers: Mapping[str, str], deadline: float) -> BaseHTTPResponse:
        """Return the first answer that is no redirect; each redirect is checked like the first URL."""
        first_url = target.url
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._get_once(target, headers, deadline)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                return response
            response.close()
            next_url = urljoin(target.url, location)
            try:
                target = parse_target(next_url, self._options)
            except (AddressRefused, UnaddressableKey) as error:
                raise AddressRefused(f"{first_url}: redirects to {error.message}") from error
        raise AddressRefused(f"{first_url}: redirects more than {_MAX_REDIRECTS} times")

    def _get_once(self, target: HttpTarget, headers: Mapping[str, str], deadline: float) -> BaseHTTPResponse:
        """Send one GET to the first address of the host that accepts a connection."""
        from urllib3 import Timeout
        from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

        headers = {"Host": target.host_header, "User-Agent": "batchjob", "Accept-Encoding": "identity", **headers}
        connect_error: Exception | None = None
        for address in self._connections.checked_addresses(target):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                return self._connections.pool(target, address).urlopen(
                    "GET",
                    target.path,
                    headers=headers,
                    timeout=Timeout(connect=min(CONNECT_TIMEOUT, left), read=min(self._policy.read_timeout, left)),
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                )
            except (NewConnectionError, ConnectTimeoutError) as error:
                connect_error = error
            except HTTPError as error:
                raise _read_error(error, target, deadline) from error
        raise (_as_os_error(connect_error) if connect_error else _too_slow(target)) from connect_error


class HttpStatusError(Exception):
    """An HTTP status that is no success."""

    def __init__(self, status: int, reason: str | None) -> None:
        super().__init__(f"{status} {reason or ''}".strip())
        self.status = status


@dataclass(frozen=True)
class _Response:
    """The body of a successful answer, with its strong ETag, if it has one, and its status."""

    data: bytes
    etag: str | None
    status: int


class _Connections:
    """Known addresses of hosts and open connections, shared by all policies."""

    def __init__(self, resolver: Callable[[str, int], Sequence[str]]) -> None:
        self._resolver = resolver
        self._addresses: dict[tuple[str, int], tuple[Sequence[str], float]] = {}

    def checked_addresses(self, target: HttpTarget) -> Sequence[str]:
        """Return the addresses of the target's host. Raises AddressRefused if one of them is forbidden."""
        host = target.host, target.port
        addresses, expires = self._addresses.get(host, ([], 0.0))
        if time.monotonic() >= expires:
            addresses = self._resolver(*host)
            if len(self._addresses) >= _MAX_HOSTS:
                self._addresses.clear()
            self._addresses[host] = addresses, time.monotonic() + _ADDRESS_SECONDS
        for address in addresses:
            if reason := explain_address_refusal(address, target.options.private):
                raise AddressRefused(f"{target.url}: {target.host} {reason}")
        return addresses

    @cached_property
    def _pools(self) -> PoolManager:
        from urllib3 import PoolManager

        return PoolManager(_MAX_POOLS, maxsize=READ_THREADS)

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        # Cached, because reading the certificates that this machine trusts takes a while.
        return ssl.create_default_context()

    def pool(self, target: HttpTarget, address: str) -> HTTPConnectionPool:
        """Return the connections to a host at one of its addresses; the least recently used ones are forgotten."""
        tls: dict[str, object] = {}
        if target.scheme == "https":
            # The certificate must be that of the host, although the connection is made to an address.
            tls = {"ssl_context": self._ssl_context, "server_hostname": target.host}
        return self._pools.connection_from_host(address, target.port, target.scheme, tls)


def _read_body(response: BaseHTTPResponse, target: HttpTarget, deadline: float, limit: int | None) -> bytes:
    """Read the body, within the caller's limit of bytes and the host's own limits of bytes and time."""
    from urllib3.exceptions import HTTPError

    max_bytes, body = target.options.max_bytes, io.BytesIO()
    size = int(response.headers.get("Content-Length") or 0)
    check_size(limit, size, target.url)
    if size > max_bytes:
        raise _over_max_bytes(target)
    try:
        # read1 returns what has arrived, without waiting for more, so that the deadline is checked in time.
        while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
            body.write(chunk)
            if body.tell() > max_bytes:
                raise _over_max_bytes(target)
            if time.monotonic() > deadline:
                raise _too_slow(target)
    except HTTPError as error:
        raise _read_error(error, target, deadline) from error
    return body.getvalue()


def _read_error(error: Exception, target: HttpTarget, deadline: float) -> Exception:
    return _too_slow(target) if time.monotonic() >= deadline else _as_os_error(error)


def _over_max_bytes(target: HttpTarget) -> AddressRefused:
    limit = target.options.max_bytes
    return AddressRefused(f"{target.url}: has more than {limit:,} bytes, the host's max_bytes in storage")


def _too_slow(target: HttpTarget) -> AddressRefused:
    return AddressRefused(f"{target.url}: took longer than {target.options.seconds:g} s, the host's seconds in storage")


def _as_os_error(error: Exception) -> OSError:
    # An OSError is transient to the retry policy.
    return error if isinstance(error, OSError) else ConnectionError(f"{type(error).__name__}: {error}")
