"""Addresses that the web backend may connect to: none where a cloud hands out credentials, private ones on request."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

__all__ = ["explain_address_refusal", "resolve_host"]

_Address = IPv4Address | IPv6Address
# Where clouds hand their machines credentials. Some of these look like ordinary addresses.
_METADATA = {
    ip_address(text)
    for text in (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "168.63.129.16", "100.100.100.200", "192.0.0.192"),
        *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fe80::a9fe:a9fe"),
    )
}
_TRANSLATED = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))  # an IPv4 address stands in the last bits


def resolve_host(host: str, port: int) -> list[str]:
    """All addresses of a host, each once. Raises OSError where it has none, or nobody tells."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def explain_address_refusal(address: str, allow_private: bool) -> str | None:
    """Why nothing is fetched from an address, to follow "it"; None where something may be.

    Args:
        private: whether the job allows private networks and this machine itself. Link-local addresses, and those where
            clouds hand out credentials, are never allowed.
    """
    meant = _meant(ip_address(address.partition("%")[0]))
    if meant in _METADATA or meant.is_link_local:
        return f"leads to {address}, where a cloud hands credentials to its machines"
    if meant.is_multicast or meant.is_unspecified or (meant.is_reserved and not meant.is_loopback):
        return f"leads to {address}, which is no address of a server"
    if not meant.is_global and not allow_private:
        return f"leads to {address} in a private network; if that is meant, say private: true for this host in storage"
    return None


def _meant(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 one wraps, where it does."""
    if isinstance(address, IPv4Address):
        return address
    if any(address in network for network in _TRANSLATED):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
    return inner or address
