"""Which URLs a caller may make this worker open: the five channels of a live stream come from outside.

A URL is taken apart here once, by a grammar so narrow that no two parsers can read it differently, and put together
again: what is opened is what was checked. Then two questions::

    its origin (scheme, host, port)     one of those that the operator allows; where none is, the host has to be the
                                        caller itself
    each address that the host has      not one that nobody may be sent to: link-local, metadata services, multicast

Who resolves names, and holds on to the addresses, is ``transport/origins.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address

PORTS: Final = {"http": 80, "https": 443}

_URL = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?(/[!-~]*)?", re.IGNORECASE)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

_NEVER: Final = tuple(
    ip_network(each)
    for each in (
        "0.0.0.0/8",  # "this network", RFC 1122 3.2.1.3; Linux takes 0.0.0.0 for its own loopback
        "169.254.0.0/16",  # link-local, RFC 3927; clouds' metadata services are at 169.254.169.254
        "100.100.100.200/32",  # Alibaba Cloud's metadata
        "168.63.129.16/32",  # Azure's platform services
        "192.0.0.0/24",  # RFC 6890; Oracle Cloud's metadata is at 192.0.0.192
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and the broadcast address
        "::/128",
        "fe80::/10",  # link-local
        "fec0::/10",  # what link-local and private were before RFC 3879
        "ff00::/8",  # multicast
        "fd00:ec2::/32",  # AWS's metadata and credentials
        "fd20:ce::254/128",  # Google Cloud's metadata
        "64:ff9b:1::/48",  # RFC 8215: where an IPv4 address is in it only the network's own translator knows
    )
)
_COMPATIBLE: Final = IPv6Network("::/96")  # RFC 4291 2.5.5.1
_TRANSLATED: Final = (IPv6Network("64:ff9b::/96"), IPv6Network("::ffff:0:0:0/96"))  # RFC 6052 2.1, RFC 2765 2.1
_LOOPBACK_6: Final = IPv6Address("::1")


@dataclass(frozen=True, slots=True)
class Origin:
    """``host`` in lower case and without a last dot; an IPv6 address without brackets."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == PORTS[self.scheme] else f":{self.port}")

    @property
    def address(self) -> Address | None:
        """What ``host`` says, where it is no name."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None


@dataclass(frozen=True, slots=True)
class ChannelUrl:
    """``str`` of it is what is to be opened."""

    origin: Origin
    path: str

    def __str__(self) -> str:
        return f"{self.origin}{self.path}"


def parse(text: str) -> ChannelUrl:
    """http(s)://host[:port][/path], in ASCII, without user, query and fragment.

    Raises:
        ValueError: it is something else; the text says what, and repeats nothing of the URL.
    """
    if not text.isascii():
        raise ValueError("it has letters that are not ASCII: a host is to be written as xn--..., a path with %XX")
    found = _URL.fullmatch(text)
    if found is None or any(letter in (found[4] or "") for letter in "?#\\"):
        raise ValueError("it is not http://host:port/path or https://..., without user, query and fragment")
    scheme, host, port, path = found[1].lower(), found[2].lower(), found[3], found[4] or ""
    number = int(port) if port else PORTS[scheme]
    if not 1 <= number <= 65535:
        raise ValueError(f"{number} is no port")
    return ChannelUrl(Origin(scheme, _host(host), number), path)


def parse_origin(text: str) -> Origin:
    """As an operator writes it: ``https://orchestrator:8935``, a path of "/" at most.

    Raises:
        ValueError: says what is wrong.
    """
    url = parse(text)
    if url.path not in ("", "/"):
        raise ValueError("an origin is a scheme, a host and a port, without a path")
    address = url.origin.address
    if address is not None and forbidden(address):
        raise ValueError("that is an address nobody may make the worker connect to")
    return url.origin


def _host(host: str) -> str:
    """A name or an address in its one form. Raises ValueError."""
    if host.startswith("["):
        try:
            return str(IPv6Address(host[1:-1]))
        except ValueError:
            raise ValueError("its host is no IPv6 address") from None
    host = host.removesuffix(".")
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):  # 127.1, 0x7f000001 and 017700000001 are addresses to some, and names to others
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise ValueError("its host is no address of four decimal numbers") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("its host is no name")
    return host


def forbidden(address: Address) -> bool:
    """Whether nobody may make the worker connect there, whatever the operator allows. An IPv4 address inside of an IPv6
    one counts as itself."""
    return any(each in network for each in _meanings(address) for network in _NEVER if each.version == network.version)


def _meanings(address: Address) -> Iterable[Address]:
    """The address, and those of IPv4 to which it may be translated on its way."""
    yield address
    if isinstance(address, IPv4Address):
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if any(address in network for network in _TRANSLATED) or (address in _COMPATIBLE and address != _LOOPBACK_6):
        yield IPv4Address(int(address) & 0xFFFFFFFF)


def plain(address: Address) -> Address:
    """::ffff:1.2.3.4 is 1.2.3.4, as sockets of both kinds have it."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def peer(text: str) -> Address | None:
    """A socket's other side, as the system writes it; None for what is no IP address, such as the name of a Unix
    socket's file. Of a link-local one the interface (``fe80::1%eth0``) does not count."""
    try:
        return plain(ip_address(text.partition("%")[0]))
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Policy:
    """``allowed`` is the operator's list. Empty: a caller may name itself, at any port, and nobody else."""

    allowed: frozenset[Origin] = frozenset()

    def refusal(self, origin: Origin) -> str:
        """What is wrong with the origin by itself, before any name is resolved; "" if nothing is."""
        if origin.address is not None and forbidden(origin.address):
            return "nobody may make this worker connect to that address"
        if self.allowed and _alike(origin) not in map(_alike, self.allowed):
            return f"this worker does not talk to it. If it should: --allow-origin {origin} (GPU_BYOC_ALLOW_ORIGIN)"
        return ""

    def addresses(self, origin: Origin, found: Iterable[Address], caller: Address | None) -> list[Address]:
        """Those of the host's addresses that may be connected to, in their order."""
        usable = [each for each in found if not forbidden(each)]
        return usable if self.allowed else [each for each in usable if _same(each, caller)]


def _alike(origin: Origin) -> Origin:
    """This machine has several names for itself, and an operator who writes one means all."""
    here = origin.host == "localhost" or (origin.address is not None and plain(origin.address).is_loopback)
    return replace(origin, host="localhost") if here else origin


def _same(address: Address, caller: Address | None) -> bool:
    """The caller's own address; for a caller on this machine, all of loopback."""
    if caller is None:
        return False
    address, caller = plain(address), plain(caller)
    return address == caller or (address.is_loopback and caller.is_loopback)
