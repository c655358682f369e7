"""The addresses to which a request to an operator must not go: this machine's, those of its network, and special ones.

Literal addresses in a URL are checked, and each address to which a name resolves. The list is made by hand, because
Python 3.11.2 and 3.13 differ in which addresses they call global. It cannot know public addresses that lead into the
local network: a NAT64 prefix of that network (RFC 6052, section 2.2), or a public address of this machine or of a
proxy.
"""

import ipaddress
from collections.abc import Iterator, Mapping

# Every block of IANA's special-purpose registries, also those called globally reachable: no operator's server is at a
# relay, a sink or a protocol's anycast address. Sources, both as of 2025-10-09:
# https://www.iana.org/assignments/iana-ipv4-special-registry
# https://www.iana.org/assignments/iana-ipv6-special-registry
# Blocks inside another block of the list are left out.
SPECIAL: Mapping[str, str] = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private use",
    "100.64.0.0/10": "shared address space (CGNAT)",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link local; metadata services",
    "172.16.0.0/12": "private use",
    "192.0.0.0/24": "IETF protocol assignments; metadata of Oracle's cloud (192.0.0.192)",
    "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112",
    "192.52.193.0/24": "AMT",
    "192.88.99.0/24": "6to4 and 6a44 relays",
    "192.168.0.0/16": "private use",
    "192.175.48.0/24": "AS112, delegated directly",
    "198.18.0.0/15": "benchmarks",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "240.0.0.0/4": "reserved; limited broadcast",
    "::/128": "unspecified",
    "::1/128": "loopback",
    "64:ff9b:1::/48": "translation from IPv4, local use",
    "100::/64": "discard only",
    "100:0:0:1::/64": "dummy",
    "2001::/23": "IETF protocol assignments; Teredo, benchmarks, AMT, AS112, ORCHID",
    "2001:db8::/32": "documentation",
    "2620:4f:8000::/48": "AS112, delegated directly",
    "3fff::/20": "documentation",
    "5f00::/16": "segment identifiers (SRv6)",
    "fc00::/7": "unique local; metadata services (fd00:ec2::254, fd20:ce::254)",
    "fe80::/10": "link local",
    # In other registries of IANA
    "224.0.0.0/4": "multicast",
    "ff00::/8": "multicast",
    "fec0::/10": "site local (RFC 3879)",
    # In none of IANA's registries
    "168.63.129.16/32": "the host agent of Azure, with secrets of its machines",
}
# Blocks whose addresses contain the IPv4 address that they lead to, and the number of bits after it.
CARRIERS = {"::ffff:0:0/96": 0, "64:ff9b::/96": 0, "2002::/16": 80}

_SPECIAL_4 = [ipaddress.IPv4Network(block) for block in SPECIAL if "." in block]
_SPECIAL_6 = [ipaddress.IPv6Network(block) for block in SPECIAL if ":" in block]
_CARRIERS = [(ipaddress.IPv6Network(block), behind) for block, behind in CARRIERS.items()]
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # the only part of IPv6 that IANA has assigned to the public


def private_address(host: str) -> bool:
    """Whether `host` is a literal address at which no server can be reached over the Internet.

    Numbers that the system's resolver reads as an address, such as 127.1 and 0x7f000001, count as addresses too.
    """
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        last = host.lower().rstrip(".").rpartition(".")[2]  # no top-level domain is a number (RFC 3696, section 2)
        return last == "localhost" or last.isdigit() or last.startswith("0x")
    return not (_public_4(address) if isinstance(address, ipaddress.IPv4Address) else _public_6(address))


def _public_4(address: ipaddress.IPv4Address) -> bool:
    return not any(address in block for block in _SPECIAL_4)


def _public_6(address: ipaddress.IPv6Address) -> bool:
    if not all(map(_public_4, _carried(address))):
        return False
    if any(address in block for block, _ in _CARRIERS):
        return True
    return address in _GLOBAL_UNICAST and not any(address in block for block in _SPECIAL_6)


def _carried(address: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address leads to on some networks."""
    number = int(address)
    for block, behind in _CARRIERS:
        if address in block:
            yield ipaddress.IPv4Address(number >> behind & 0xFFFFFFFF)
    if number >> 32 & 0xFCFFFFFF == 0x5EFE:  # ISATAP, whatever its universal and group bits say (RFC 5214, section 6.1)
        yield ipaddress.IPv4Address(number & 0xFFFFFFFF)
