"""The egress rules: every block of addresses that is private or special is refused, and its neighbours are not, on
every Python.
"""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdaemon.config.egress import CARRIERS, SPECIAL, private_address

# The first and last address of each row of IANA's special-purpose registries (even if the row lies within another one),
# and of the other blocks that are refused
INSIDE = [
    ("this network", "0.0.0.0", "0.255.255.255"),
    ("private use", "10.0.0.0", "10.255.255.255"),
    ("shared address space", "100.64.0.0", "100.127.255.255"),
    ("Alibaba's metadata", "100.100.100.200", "100.100.100.200"),
    ("loopback", "127.0.0.0", "127.255.255.255"),
    ("link local", "169.254.0.0", "169.254.255.255"),
    ("metadata", "169.254.169.254", "169.254.170.2"),
    ("private use", "172.16.0.0", "172.31.255.255"),
    ("IETF protocol assignments", "192.0.0.0", "192.0.0.255"),
    ("IPv4 service continuity", "192.0.0.0", "192.0.0.7"),
    ("dummy", "192.0.0.8", "192.0.0.8"),
    ("Port Control Protocol", "192.0.0.9", "192.0.0.9"),
    ("relays around NAT", "192.0.0.10", "192.0.0.10"),
    ("discovery of NAT64", "192.0.0.170", "192.0.0.171"),
    ("Oracle's metadata", "192.0.0.192", "192.0.0.192"),
    ("documentation", "192.0.2.0", "192.0.2.255"),
    ("AS112", "192.31.196.0", "192.31.196.255"),
    ("AMT", "192.52.193.0", "192.52.193.255"),
    ("6to4 relay", "192.88.99.0", "192.88.99.255"),
    ("6a44 relay", "192.88.99.2", "192.88.99.2"),
    ("private use", "192.168.0.0", "192.168.255.255"),
    ("AS112, direct", "192.175.48.0", "192.175.48.255"),
    ("benchmarks", "198.18.0.0", "198.19.255.255"),
    ("documentation", "198.51.100.0", "198.51.100.255"),
    ("documentation", "203.0.113.0", "203.0.113.255"),
    ("reserved", "240.0.0.0", "255.255.255.255"),
    ("limited broadcast", "255.255.255.255", "255.255.255.255"),
    ("multicast", "224.0.0.0", "239.255.255.255"),
    ("Azure's host agent", "168.63.129.16", "168.63.129.16"),
    ("unspecified", "::", "::"),
    ("loopback", "::1", "::1"),
    ("mapped", "::ffff:0.0.0.0", "::ffff:255.255.255.255"),
    ("translated", "64:ff9b::0.0.0.0", "64:ff9b::255.255.255.255"),
    ("translated, local", "64:ff9b:1::", "64:ff9b:1:ffff:ffff:ffff:ffff:ffff"),
    ("discard", "100::", "100::ffff:ffff:ffff:ffff"),
    ("dummy", "100:0:0:1::", "100::1:ffff:ffff:ffff:ffff"),
    ("IETF protocol assignments", "2001::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("Teredo", "2001::", "2001:0:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("Port Control Protocol", "2001:1::1", "2001:1::1"),
    ("relays around NAT", "2001:1::2", "2001:1::2"),
    ("service registration", "2001:1::3", "2001:1::3"),
    ("benchmarks", "2001:2::", "2001:2:0:ffff:ffff:ffff:ffff:ffff"),
    ("AMT", "2001:3::", "2001:3:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("AS112", "2001:4:112::", "2001:4:112:ffff:ffff:ffff:ffff:ffff"),
    ("ORCHID", "2001:10::", "2001:1f:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("ORCHIDv2", "2001:20::", "2001:2f:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("remote ids of drones", "2001:30::", "2001:3f:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("documentation", "2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("6to4", "2002::", "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("AS112, direct", "2620:4f:8000::", "2620:4f:8000:ffff:ffff:ffff:ffff:ffff"),
    ("documentation", "3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("SRv6", "5f00::", "5f00:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("unique local", "fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("Amazon's metadata", "fd00:ec2::254", "fd00:ec2::254"),
    ("Google's metadata", "fd20:ce::254", "fd20:ce::254"),
    ("link local", "fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("site local", "fec0::", "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("multicast", "ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("not given out", "::2", "1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("not given out", "4000::", "fbff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    # IPv6 addresses that contain a private IPv4 address
    ("mapped", "::ffff:127.0.0.1", "::ffff:168.63.129.16"),
    ("compatible", "::127.0.0.1", "::8.8.8.8"),
    ("translated by SIIT", "::ffff:0:127.0.0.1", "::ffff:0:8.8.8.8"),
    ("translated by NAT64", "64:ff9b::10.0.0.1", "64:ff9b::192.0.0.192"),
    ("6to4", "2002:7f00:1::", "2002:c000:c0::1"),
    ("ISATAP", "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:127.0.0.1"),
    ("ISATAP in 6to4", "2002:808:808::5efe:10.0.0.1", "2002:808:808::5efe:10.0.0.1"),
    ("ISATAP, as a group", "2606:4700::100:5efe:10.0.0.1", "2606:4700::300:5efe:10.0.0.1"),
    ("Teredo of a public client", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:0:808:808::"),
]

OUTSIDE = [
    *(
        "1.0.0.0",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
    ),
    *("169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "191.255.255.255", "192.0.1.0", "192.0.3.0"),
    *(
        "192.88.98.255",
        "192.88.100.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
    ),
    *("168.63.129.15", "168.63.129.17", "203.0.112.255", "203.0.114.0"),
    *(
        "2000::1",
        "2001:200::1",
        "2001:db7:ffff::1",
        "2001:db9::1",
        "2606:4700::1111",
        "2003::1",
        "3ffe::1",
        "3fff:1000::1",
    ),
    *("::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"),
    *("2606:4700::5efe:8.8.8.8", "2606:4700::200:5efe:808:808", "2606:4700::5eff:10.0.0.1"),
]


def test_a_block_is_refused_from_its_first_to_its_last_address() -> None:
    for name, first, last in INSIDE:
        for address in (first, last, f"[{first}]" if ":" in first else first):
            assert private_address(address), (name, address)


def test_the_neighbours_of_a_block_are_not() -> None:
    assert [address for address in OUTSIDE if private_address(address)] == []


def test_every_row_of_the_list_has_a_case_above() -> None:
    cases = {_normal(row) for row in INSIDE}
    blocks = [ipaddress.ip_network(block) for block in (*SPECIAL, *CARRIERS)]
    assert [block for block in blocks if (str(block[0]), str(block[-1])) not in cases] == []


def _normal(row: tuple[str, str, str]) -> tuple[str, str]:
    return str(ipaddress.ip_address(row[1])), str(ipaddress.ip_address(row[2]))


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST.", "op.localhost", "127.1", "2130706433", "0x7f000001", "0X7F.1"]
)
def test_what_the_resolver_takes_for_an_address_is_refused(name: str) -> None:
    """Tested are names and numbers that the resolver reads as addresses."""
    assert private_address(name)


@pytest.mark.parametrize("name", ["operator.example", "localhost.example", "4711.example", "xn--0x-0.example"])
def test_names_are_judged_when_they_are_resolved(name: str) -> None:
    assert not private_address(name)


@given(st.ip_addresses())
def test_what_this_python_calls_not_global_is_refused(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    """Every address that any Python counts as not global must be refused. Addresses of 6to4 and NAT64 are judged by the
    IPv4 address in them instead.
    """
    carried = any(address in ipaddress.ip_network(block) for block in CARRIERS)
    if not address.is_global and not carried:
        assert private_address(str(address))
