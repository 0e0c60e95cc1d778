"""Which addresses result files may be fetched from: public ones, and none of the worker's own networks."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: IPv6 addresses that networks translate to IPv4, or once did: the last 32 bits are the address.
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::ffff:0:0:0/96", "::/96")))
#: What versions of Python do not know as private, or not all of them: site-local addresses, NAT64 and segment routing
#: within a network, documentation, and what clouds have of their own at addresses that look public.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ("fec0::/10", "64:ff9b:1::/48", "5f00::/16", "3fff::/20", "192.0.0.0/24", "168.63.129.16/32"),
    )
)


def is_public(address: str) -> bool:
    """
    Whether an IP address is public.

    Loopback, link-local, private, shared (100.64.0.0/10, where some clouds have their metadata service), unspecified,
    reserved and multicast addresses are not, nor are IPv6 addresses that stand for one of these.

    :param address: as ``getaddrinfo`` returns it, perhaps with a zone.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    embedded = _embedded(found)
    if embedded is not None:
        return is_public(str(embedded))
    # An address is in no network of the other version.
    return found.is_global and not found.is_multicast and not any(found in network for network in _NOT_PUBLIC)


def _embedded(address: _Address) -> ipaddress.IPv4Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if any(address in network for network in _TRANSLATED):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)


def is_private_name(host: str) -> bool:
    """
    Whether a host is itself a private address, however it is written.

    :param host: the host of a URL: a name, an address, or what resolvers take for one (``2130706433``, ``0x7f.1``).
    """
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            host = socket.inet_ntoa(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return False
    return not is_public(host)


def leads_to_private(url: str) -> bool:
    """
    Whether the host of a URL is a private address, or resolves to one.

    :param url: the connection's base URL. A name that cannot be resolved here, as behind a proxy, counts as public.
    """
    host = urlsplit(url).hostname or ""
    if is_private_name(host):
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(not is_public(str(entry[4][0])) for entry in found)
