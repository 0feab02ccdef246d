from __future__ import annotations

import ipaddress
import string
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
import yarl
from hypothesis import example, given
from hypothesis import strategies as st

from gpu_byoc.core.origins import Origin, Policy, forbidden, parse, parse_origin, plain

LABEL = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=12)
HOST = st.one_of(
    st.lists(LABEL, min_size=1, max_size=4).map(".".join),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
    st.from_regex(r"[0-9a-fx.]{1,20}", fullmatch=True),
)
SCHEME = st.sampled_from(["http", "https", "HTTP", "file", "ftp", "gopher", "concat", "javascript", ""])
REST = st.text(string.printable + "é\u2024\u3002\uff0f", max_size=12)
URL = st.builds(
    lambda scheme, user, host, dot, port, rest: f"{scheme}://{user}{host}{dot}{port}{rest}",
    SCHEME,
    st.sampled_from(["", "", "", "user@", "a:b@", "localhost@", "localhost:80#@"]),
    HOST,
    st.sampled_from(["", "", ".", "..", "%2e", "%00"]),
    st.one_of(st.just(""), st.integers(-1, 70_000).map(lambda port: f":{port}"), st.sampled_from([":", ":0", ":٣"])),
    REST.map(lambda rest: "/" + rest) | REST,
)


@given(URL | st.text(max_size=40))
@example("http://localhost\\@10.0.0.1/")
@example("http://localhost#@10.0.0.1/")
@example("http://[::1]%25eth0/")
@example("http://a/\n")
@example("http://a\n")
@example("http://0x7f000001./")
def test_what_is_taken_is_read_alike_by_the_http_client(text: str) -> None:
    """Whatever is not refused has, for the library that opens it, the very origin that was checked; and says so again
    when it is read once more."""
    try:
        url = parse(text)
    except ValueError:
        return
    opened = yarl.URL(str(url))
    assert (opened.scheme, opened.raw_host, opened.port) == (url.origin.scheme, url.origin.host, url.origin.port)
    assert opened.user is None
    assert not opened.query_string
    assert not opened.fragment
    assert parse(str(url)) == url


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("http://Localhost", Origin("http", "localhost", 80)),
        ("HTTPS://orch.example.:8935/ai/trickle/x", Origin("https", "orch.example", 8935)),
        ("https://orch:443/", Origin("https", "orch", 443)),
        ("http://[0:0::1]:7/", Origin("http", "::1", 7)),
        ("http://10.0.0.1:80/a%20b;c=d/..", Origin("http", "10.0.0.1", 80)),
        ("http://xn--bcher-kva.example/", Origin("http", "xn--bcher-kva.example", 80)),
    ],
)
def test_origins(text: str, origin: Origin) -> None:
    assert parse(text).origin == origin


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "/a",
            "//host/a",
            "host/a",
            "http:/host/a",
            "http:host",
            "http://",
            "http:///a",
            "http://:80/",
            "http://a:/",
        ),
        *("file:///etc/passwd", "concat:http://a/|b", "unix://a", "ftp://a/", "http+unix://a/", "httpss://a/"),
        *("http://user@a/", "http://u:p@a/", "http://@a/", "http://a@b@c/", "http://a%40b/"),
        *("http://a?b", "http://a/?b", "http://a/#b", "http://a#b", "http://a\\b/", "http://a/b\\c"),
        *("http://a b/", "http://a/b c", " http://a/", "http://a/\n", "http://a/\x00", "http://a\t/"),
        *("http://a:0/", "http://a:65536/", "http://a:+80/", "http://a:٨٠/", "http://a:80:80/", "http://a:999999/"),
        *("http://127.1/", "http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.0.0.01/"),
        *("http://1.2.3.4.5/", "http://256.1.1.1/", "http://0x7f000001/", "http://a.0x10/", "http://1.2.3.4../"),
        *(
            "http://[::1/",
            "http://::1/",
            "http://[::1]x/",
            "http://[fe80::1%25eth0]/",
            "http://[127.0.0.1]/",
            "http://[]/",
        ),
        *(
            "http://bücher.example/",
            "http://\uff11\uff12\uff17.0.0.1/",
            "http://a。b/",
            "http://ⓛocalhost/",
            "http://a/ü",
        ),
        *("http://-a/", "http://a-/", "http://a..b/", "http://.a/", "http://./", f"http://{'a' * 64}/", "http://%61/"),
        "http://" + ".".join(["a" * 50] * 6) + "/",
    ],
)
def test_no_urls(text: str) -> None:
    with pytest.raises(ValueError, match=r"^it|port$"):
        parse(text)


@pytest.mark.parametrize(
    "address",
    [
        *("169.254.169.254", "169.254.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255", "240.0.0.1"),
        *("100.100.100.200", "168.63.129.16", "192.0.0.192"),
        *("fe80::1", "febf::1", "fec0::1", "ff02::1", "::", "fd00:ec2::254", "fd20:ce::254"),
        *(
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "2002:a9fe:a9fe::1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::a9fe:a9fe",
            "64:ff9b:1:a9fe:a9:fe00::",  # the same by RFC 6052 with a prefix of 48 bits
            "64:ff9b:1:0:a9:fe01:100:0",  # 169.254.1.1 behind one of 64
            "::ffff:0:169.254.169.254",
            "::ffff:0:a9fe:1",
            "64:ff9b::169.254.0.1",
            "64:ff9b::100.100.100.200",
            "2002:6464:64c8::",
        ),
        "2001:0:a9fe:a9fe::1",  # Teredo, its server
        str(IPv6Address((0x2001 << 112) | (0x01010101 << 64) | (0xFFFFFFFF ^ int(IPv4Address("169.254.1.1"))))),
    ],
)
def test_addresses_that_nobody_is_sent_to(address: str) -> None:
    assert forbidden(ip_address(address))
    for policy in (Policy(), Policy(frozenset([Origin("http", address, 80)]))):
        assert policy.refusal(Origin("http", str(ip_address(address)), 80))
        assert policy.addresses(Origin("http", "a", 80), [ip_address(address)], ip_address(address)) == []
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(ValueError, match="nobody may"):
        parse_origin(f"http://{host}")


@given(st.ip_addresses())
def test_what_the_standard_library_calls_unfit_is_forbidden(address: ipaddress.IPv4Address | IPv6Address) -> None:
    meant = plain(address)
    if meant.is_link_local or meant.is_multicast or meant.is_unspecified:
        assert forbidden(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "::1", "::ffff:127.0.0.1", "10.1.2.3", "8.8.8.8", "fd12::1", "2a00::1"),
        *("64:ff9b::8.8.8.8", "::ffff:0:8.8.8.8", "2002:808:808::1", "64:ff9b:2::a9fe:a9fe"),
    ],
)
def test_other_addresses_are_for_the_policy_to_decide(address: str) -> None:
    assert not forbidden(ip_address(address))


def test_only_what_the_operator_lists() -> None:
    policy = Policy(frozenset([parse_origin("https://orch:8935/"), parse_origin("http://10.0.0.7:80")]))
    for allowed in ("https://orch:8935/ai/x", "https://ORCH.:8935", "http://10.0.0.7/a"):
        assert policy.refusal(parse(allowed).origin) == ""
    for other in ("http://orch:8935", "https://orch", "https://orch:8936", "https://orch.evil:8935", "http://10.0.0.8"):
        assert f"--allow-origin {parse(other).origin}" in policy.refusal(parse(other).origin)
    # Its addresses do not matter then, nor does who calls.
    found = [ip_address("10.0.0.1"), ip_address("169.254.1.1"), ip_address("127.0.0.1")]
    assert policy.addresses(parse("https://orch:8935").origin, found, None) == [found[0], found[2]]


def test_this_machine_by_any_of_its_names() -> None:
    policy = Policy(frozenset([parse_origin("http://localhost:8935")]))
    for name in ("localhost", "127.0.0.1", "[::1]", "127.9.9.9", "[::ffff:127.0.0.1]"):
        assert policy.refusal(parse(f"http://{name}:8935/x").origin) == ""
        assert policy.refusal(parse(f"http://{name}:8936/x").origin)
        assert Policy(frozenset([parse_origin(f"http://{name}:1")])).refusal(parse("http://localhost:1").origin) == ""
    assert policy.refusal(parse("http://localhost.example:8935").origin)


@pytest.mark.parametrize(
    ("caller", "address", "same"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "::1", True),
        ("::ffff:127.0.0.1", "127.8.9.1", True),
        ("10.0.0.5", "10.0.0.5", True),
        ("::ffff:10.0.0.5", "10.0.0.5", True),
        ("10.0.0.5", "10.0.0.6", False),
        ("10.0.0.5", "127.0.0.1", False),
        ("127.0.0.1", "10.0.0.5", False),
        ("fd12::1", "fd12::2", False),
        ("169.254.1.1", "169.254.1.1", False),
    ],
)
def test_without_a_list_a_caller_may_name_itself(caller: str, address: str, same: bool) -> None:
    origin = Origin("http", "name", 1234)
    assert bool(Policy().addresses(origin, [ip_address(address)], ip_address(caller))) == same
    assert Policy().addresses(origin, [ip_address(address)], None) == []


@pytest.mark.parametrize("text", ["https://a/b", "a:80", "*", "https://a/?x", "http://169.254.169.254"])
def test_what_an_operator_cannot_allow(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_origin(text)
