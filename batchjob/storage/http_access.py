"""Rules of web access: URLs and addresses that a job may read, and those that it never may."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

from batchjob.errors import AddressRefused, UnaddressableKey
from batchjob.storage.options import OptionsByPrefix, StorageOptions
from batchjob.uris import suggest_bucket_uri

__all__ = [
    "HttpTarget",
    "explain_address_refusal",
    "explain_url_refusal",
    "is_http_uri",
    "parse_target",
    "resolve_host",
]

_DEFAULT_PORTS = {"http": 80, "https": 443}
# Where clouds give credentials to their machines. Some of these addresses look like ordinary ones.
_METADATA_ADDRESSES = {
    ip_address(text)
    for text in (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "168.63.129.16", "100.100.100.200", "192.0.0.192"),
        *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fe80::a9fe:a9fe"),
    )
}
# NAT64 (RFC 6052, RFC 8215): the last 32 bits of the IPv6 address are an IPv4 address.
_NAT64_NETWORKS = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))


@dataclass(frozen=True)
class HttpTarget:
    """A URL that the job may read, taken apart.

    For example, `https://Images.example.com:8443/a.jpg?s=1` has the scheme `https`, host `images.example.com`, port
    8443, host header `images.example.com:8443` and path `/a.jpg?s=1`.

    Attributes:
        url: URL as it was given.
        scheme: `http` or `https`.
        host: Host name in ASCII lower case, or an address.
        port: Port, the scheme's own if the URL names none.
        host_header: Value of the `Host` header.
        path: Path and query.
        options: Storage options of the host.
    """

    url: str
    scheme: str
    host: str
    port: int
    host_header: str
    path: str
    options: StorageOptions


def is_http_uri(uri: str) -> bool:
    """Return True if a URI is an HTTP or HTTPS URL."""
    return uri[:8].lower().startswith(("http://", "https://"))


def parse_target(url: str, options: OptionsByPrefix) -> HttpTarget:
    """Take apart a URL that the job may read.

    Raises:
        AddressRefused: The job may not read the URL.
        UnaddressableKey: The text is not a URL.
    """
    try:
        found = _examine_url(url, options)
    except ValueError as error:
        raise UnaddressableKey(f"{url}: no URL that can be read ({error})") from error
    if isinstance(found, str):
        raise AddressRefused(f"{url}: {found}")
    return found


def explain_url_refusal(uri: str, options: OptionsByPrefix) -> str | None:
    """Return why the job may not read a URL, as a clause after "which"; None if the URL alone is no reason.

    The addresses of a host name are checked later, by `explain_address_refusal`.

    Raises:
        ValueError: The text is not a URL.
    """
    found = _examine_url(uri, options)
    return found if isinstance(found, str) else None


def _examine_url(uri: str, options: OptionsByPrefix) -> HttpTarget | str:
    """Return the URL taken apart, or why the job may not read it. Raises ValueError for a text that is no URL."""
    if not is_http_uri(uri):
        return "is neither http nor https"
    parts = _split_url(uri)
    host, port = _ascii_host(parts), parts.port
    if "@" in parts.netloc:
        return "holds user information before '@'"
    host_header = _host_header(parts.scheme, host, port)
    host_options = _host_options(parts.scheme, host_header, options)
    if host_options is None:
        prefix = f"{parts.scheme}://{host_header}"
        advice = f"storage: {{'{prefix}': {{}}}}{suggest_bucket_uri(uri)}"
        return f"is on the web, which is read only where the job names the host, {advice}"
    if _is_address(host) and (reason := explain_address_refusal(host, host_options.private)):
        return reason
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return HttpTarget(uri, parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], host_header, path, host_options)


def resolve_host(host: str, port: int) -> list[str]:
    """Return all addresses of a host, each once. Raises OSError if it has none, or no name server answers."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def explain_address_refusal(address: str, allow_private: bool) -> str | None:
    """Return why nothing is read from an address, as a clause after "it"; None if it may be read.

    Args:
        address: IPv4 or IPv6 address, also with a zone such as `fe80::1%eth0`.
        allow_private: True if the job allows private networks and this machine itself. Link-local addresses, and those
            where clouds give out credentials, are never allowed.
    """
    unwrapped = _unwrap_ipv4(ip_address(address.partition("%")[0]))
    if unwrapped in _METADATA_ADDRESSES or unwrapped.is_link_local:
        return f"leads to {address}, where a cloud hands credentials to its machines"
    if unwrapped.is_multicast or unwrapped.is_unspecified or (unwrapped.is_reserved and not unwrapped.is_loopback):
        return f"leads to {address}, which is no address of a server"
    if not unwrapped.is_global and not allow_private:
        return f"leads to {address} in a private network; if that is meant, say private: true for this host in storage"
    return None


def _unwrap_ipv4(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the IPv4 address inside an IPv6 one, if there is one: `64:ff9b::7f00:1` holds 127.0.0.1."""
    if isinstance(address, IPv4Address):
        return address
    if any(address in network for network in _NAT64_NETWORKS):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
    return inner or address


def _split_url(url: str) -> SplitResult:
    # urlsplit ignores some of these characters: the host that it sees would not be the one that a client sees.
    if any(char < " " or char in "\x7f\\" for char in url):
        raise ValueError("a control character or backslash in it")
    return urlsplit(url)


def _ascii_host(parts: SplitResult) -> str:
    host = (parts.hostname or "").rstrip(".")
    if not host:
        raise ValueError("no host in it")
    return host if host.isascii() else host.encode("idna").decode()


def _host_header(scheme: str, host: str, port: int | None) -> str:
    bracketed = f"[{host}]" if ":" in host else host
    return bracketed if port in (None, _DEFAULT_PORTS[scheme]) else f"{bracketed}:{port}"


def _host_options(scheme: str, host_header: str, options: OptionsByPrefix) -> StorageOptions | None:
    """Return the options of a host, or of all hosts (`https://`); None if the job names neither."""
    normalized = {prefix.lower().rstrip("/"): found for prefix, found in options.items()}
    return normalized.get(f"{scheme}://{host_header}") or normalized.get(f"{scheme}:")


def _is_address(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
