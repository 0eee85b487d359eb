"""Objects on the web, by http and https: off unless the job names the host, and never a door to a private network.

A name is resolved once, every address of it is looked at, and the connection is made to an address that was looked at;
the same holds for each redirect. Proxies are not used: behind one, nobody could tell where a name leads.
"""

from __future__ import annotations

import copy
import io
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from batchjob.errors import AddressRefused, InvalidJob, ObjectTooLarge, UnaddressableKey
from batchjob.storage.address_check import explain_address_refusal, resolve_host
from batchjob.storage.backend import READ_THREADS, unquote_etag
from batchjob.storage.client_errors import (
    check_etag,
    read_timeout,
    retry_transient,
    translate_errors,
    treat_416_as_empty,
)
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.options import OptionsByPrefix, StorageOptions
from batchjob.storage.outage import Outage

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, HTTPConnectionPool

__all__ = ["HttpBackend", "explain_url_refusal", "is_http_uri"]

T = TypeVar("T")
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = {301, 302, 303, 307, 308}
_HOPS = 5
_NAME_SECONDS = 60.0  # that an address is remembered
_NAMES, _POOLS = 10_000, 64
_CHUNK = 1 << 16
_NO_REFUSALS = {404, 408, 410, 429}  # of 4xx: not there, and not now
_CONNECT_SECONDS = 5.0


class HttpBackend:
    """Any host that the job's `storage` names. Keys are whole URLs.

    Args:
        options: of the job; those whose prefix is `https://host` count.
        patience: seconds that transient faults of one request are retried.
        outage: see there.
        names: addresses of a host; a seam for tests.
    """

    def __init__(
        self,
        options: OptionsByPrefix,
        retry_timeout: float,
        outage: Outage,
        resolver: Callable[[str, int], Sequence[str]] = resolve_host,
    ) -> None:
        self._options, self._patience, self._outage = options, retry_timeout, outage
        self._connections = _Connections(resolver)

    def with_timeouts(self, retry_timeout: float, outage: Outage) -> HttpBackend:
        """The same, over the same connections, for who has another patience."""
        other = copy.copy(self)
        other._patience, other._outage = retry_timeout, outage
        return other

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        answer = self._ask(key, lambda: self._whole(key, {}, limit))
        check_etag(etag, answer.etag, key)
        return ObjectData(answer.data, answer.etag)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        def ask() -> bytes:
            answer = self._whole(key, {"Range": f"bytes={start}-{end - 1}"})
            # A server may answer with all there is, which its status tells.
            return answer.data if answer.version == "206" else answer.data[start:end]

        return self._ask(key, lambda: treat_416_as_empty(ask))

    def head(self, key: str) -> ObjectInfo:
        found = self.get(key)  # many servers answer HEAD otherwise than GET
        return ObjectInfo(key, len(found.data), found.etag)

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:  # noqa: ARG002 - as all places
        raise InvalidJob(f"{prefix}: the web has no listing; name its images in a manifest")

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.get(key).data)

    def _ask(self, key: str, question: Callable[[], T]) -> T:
        def once() -> T:
            with translate_errors(key):
                try:
                    return retry_transient(self._patience, question)
                except (
                    HttpStatusError
                ) as error:  # no credentials are sent that could be renewed: it is the image's fault
                    if 400 <= error.status < 500 and error.status not in _NO_REFUSALS:
                        raise AddressRefused(f"{key}: the host refuses it ({error})") from error
                    raise

        return self._outage.retry_until_answered(once)

    def _whole(self, url: str, headers: Mapping[str, str], limit: int | None = None) -> ObjectData:
        """The answer's body; its status in place of a version."""
        target = _target(url, self._options)
        deadline = time.monotonic() + target.options.seconds
        response = self._answered(target, headers, deadline)
        try:
            if not _is_good(response):
                raise HttpStatusError(response.status, response.reason)
            given = response.headers.get("ETag")
            strong = given if given and not given.startswith("W/") else None
            return ObjectData(_body(response, target, deadline, limit), unquote_etag(strong), str(response.status))
        finally:
            response.release_conn() if _is_good(response) else response.close()

    def _answered(self, target: _Target, headers: Mapping[str, str], deadline: float) -> BaseHTTPResponse:
        """The first answer that is no redirect; each step is looked at as the first was."""
        first = target.url
        for _ in range(_HOPS + 1):
            response = self._sent(target, headers, deadline)
            where = response.headers.get("Location")
            if response.status not in _REDIRECTS or not where:
                return response
            response.close()
            there = urljoin(target.url, where)
            try:
                target = _target(there, self._options)
            except (AddressRefused, UnaddressableKey) as error:
                raise AddressRefused(f"{first}: redirects to {error.message}") from error
        raise AddressRefused(f"{first}: redirects more than {_HOPS} times")

    def _sent(self, target: _Target, headers: Mapping[str, str], deadline: float) -> BaseHTTPResponse:
        from urllib3 import Timeout
        from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

        trouble: Exception | None = None
        for address in self._connections.addresses(target):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                return self._connections.pool(target, address).urlopen(
                    "GET",
                    target.path,
                    headers={"Host": target.site, "User-Agent": "batchjob", "Accept-Encoding": "identity", **headers},
                    timeout=Timeout(connect=min(_CONNECT_SECONDS, left), read=min(read_timeout(self._patience), left)),
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                )
            except (NewConnectionError, ConnectTimeoutError) as error:
                trouble = error
            except HTTPError as error:
                raise _ended(error, target, deadline) from error
        raise (_lost(trouble) if trouble else _too_slow(target)) from trouble


class _Connections:
    """The addresses known and the connections held, of all who share them."""

    def __init__(self, names: Callable[[str, int], Sequence[str]]) -> None:
        self._names = names
        self._known: dict[tuple[str, int], tuple[Sequence[str], float]] = {}
        self._pools: OrderedDict[tuple[str, str, str, int], HTTPConnectionPool] = OrderedDict()
        self._lock = Lock()

    def addresses(self, target: _Target) -> Sequence[str]:
        """Where the host may be reached. Raises Refused where one of its addresses is forbidden."""
        place = target.host, target.port
        found, until = self._known.get(place, ([], 0.0))
        if time.monotonic() >= until:
            found = self._names(*place)
            if len(self._known) >= _NAMES:
                self._known.clear()
            self._known[place] = found, time.monotonic() + _NAME_SECONDS
        for address in found:
            if why := explain_address_refusal(address, target.options.private):
                raise AddressRefused(f"{target.url}: {target.host} {why}")
        return found

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        """The certificates that this machine trusts; reading them takes a while."""
        return ssl.create_default_context()

    def pool(self, target: _Target, address: str) -> HTTPConnectionPool:
        from urllib3 import HTTPConnectionPool, HTTPSConnectionPool

        name = target.scheme, target.host, address, target.port
        with self._lock:
            if name not in self._pools:
                pool = (
                    HTTPSConnectionPool(
                        address,
                        target.port,
                        maxsize=READ_THREADS,
                        ssl_context=self._trusted,
                        server_hostname=target.host,
                    )
                    if target.scheme == "https"
                    else HTTPConnectionPool(address, target.port, maxsize=READ_THREADS)
                )
                self._pools[name] = pool
                if len(self._pools) > _POOLS:
                    self._pools.popitem(last=False)[1].close()
            self._pools.move_to_end(name)
            return self._pools[name]


@dataclass(frozen=True)
class _Target:
    """A URL that may be asked, taken apart: `site` is what stands in the Host header."""

    url: str
    scheme: str
    host: str
    port: int
    site: str
    path: str
    options: StorageOptions


class HttpStatusError(Exception):
    """A status that is no success."""

    def __init__(self, status: int, reason: str | None) -> None:
        super().__init__(f"{status} {reason or ''}".strip())
        self.status = status


def is_http_uri(uri: str) -> bool:
    """Whether a URI is one of this place."""
    return uri[:8].lower().startswith(("http://", "https://"))


def explain_url_refusal(uri: str, options: OptionsByPrefix) -> str | None:
    """Why a URL is not read, as far as it tells by itself, to follow "which"; None where it may be.

    Raises ValueError for what is no URL.
    """
    if not is_http_uri(uri):
        return "is neither http nor https"
    parts = _split(uri)
    host, port = _host(parts), parts.port
    if "@" in parts.netloc:
        return "holds user information before '@'"
    site = _site(parts.scheme, host, port)
    found = _named(parts.scheme, site, options)
    if found is None:
        place = f"{parts.scheme}://{site}"
        return f"is on the web, which is read only where the job names the host, storage: {{'{place}': {{}}}}"
    return explain_address_refusal(host, found.private) if _is_address(host) else None


def _target(url: str, options: OptionsByPrefix) -> _Target:
    """Raises Refused, or Unaddressable for what is no URL."""
    try:
        why = explain_url_refusal(url, options)
    except ValueError as error:
        raise UnaddressableKey(f"{url}: no URL that can be read ({error})") from error
    if why:
        raise AddressRefused(f"{url}: {why}")
    parts = _split(url)
    host = _host(parts)
    site = _site(parts.scheme, host, parts.port)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    found = _named(parts.scheme, site, options)
    assert found is not None
    return _Target(url, parts.scheme, host, parts.port or _PORTS[parts.scheme], site, path, found)


def _split(url: str) -> SplitResult:
    if any(char < " " or char in "\x7f\\" for char in url):  # urlsplit would pass over some of them
        raise ValueError("a control character or backslash in it")
    return urlsplit(url)


def _host(parts: SplitResult) -> str:
    """In lower case and ASCII. Raises ValueError where there is none."""
    host = (parts.hostname or "").rstrip(".")
    if not host:
        raise ValueError("no host in it")
    return host if host.isascii() else host.encode("idna").decode()


def _site(scheme: str, host: str, port: int | None) -> str:
    bracketed = f"[{host}]" if ":" in host else host
    return bracketed if port in (None, _PORTS[scheme]) else f"{bracketed}:{port}"


def _named(scheme: str, site: str, options: OptionsByPrefix) -> StorageOptions | None:
    """What the job says of a host, or of all hosts (`https://`); None where it says nothing."""
    spelled = {prefix.lower().rstrip("/"): found for prefix, found in options.items()}
    return spelled.get(f"{scheme}://{site}") or spelled.get(f"{scheme}:")


def _is_address(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_good(response: BaseHTTPResponse) -> bool:
    return 200 <= response.status < 300


def _body(response: BaseHTTPResponse, target: _Target, deadline: float, most: int | None) -> bytes:
    """All of it. Raises Refused beyond the host's limits of bytes and time, TooLarge beyond `most` bytes."""
    from urllib3.exceptions import HTTPError

    limit, found = target.options.max_bytes, io.BytesIO()
    size = int(response.headers.get("Content-Length") or 0)
    if most is not None and size > most:
        response.close()
        raise ObjectTooLarge(target.url, size, most)
    if size > limit:
        response.close()
        raise AddressRefused(f"{target.url}: has more than {limit:,} bytes, the host's max_bytes in storage")
    try:
        while chunk := response.read1(_CHUNK, decode_content=False):  # what has come, without waiting for more
            found.write(chunk)
            if found.tell() > limit:
                response.close()
                raise AddressRefused(f"{target.url}: has more than {limit:,} bytes, the host's max_bytes in storage")
            if time.monotonic() > deadline:
                response.close()
                raise _too_slow(target)
    except HTTPError as error:
        response.close()
        raise _ended(error, target, deadline) from error
    return found.getvalue()


def _ended(error: Exception, target: _Target, deadline: float) -> Exception:
    """What an answer that broke off is to us: too slow, where its time was over."""
    return _too_slow(target) if time.monotonic() >= deadline else _lost(error)


def _too_slow(target: _Target) -> AddressRefused:
    return AddressRefused(f"{target.url}: took longer than {target.options.seconds:g} s, the host's seconds in storage")


def _lost(error: Exception) -> OSError:
    """The client's fault as what it is to us: one that may pass."""
    return error if isinstance(error, OSError) else ConnectionError(f"{type(error).__name__}: {error}")
