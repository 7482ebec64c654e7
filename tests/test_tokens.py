# SPDX-License-Identifier: Apache-2.0
"""Tokens, names and keys as people copy them, and the curve beneath.

Parts: TOKENS - 0.8 - BOUNDS - B64 - X25519 - SEALING
"""

from __future__ import annotations

import base64
import hashlib
import json
import string
import sys

import pytest
from agentkit import PRIVATE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel import key_like

import netclient_lite as agent
from netclient_lite import (
    BadAnswer,
    Invalid,
    Token,
    b64,
    check_address,
    check_key,
    check_name,
    check_network,
    check_port,
    key_proof,
    ladder,
    make_token,
    parse_token,
    public_key,
    secret_box,
    unb64,
    unseal,
    x25519,
)

usual = settings(max_examples=100, deadline=None)
keys32 = st.binary(min_size=32, max_size=32)

PIN = bytes(range(32))
KEY = "k1." + b64(b"0123456789abcdef")
TOKEN = Token(("http://203.0.113.10:8081",), PIN, "default", KEY)
TEXT = make_token(TOKEN)


# ---------------------------------------------------------------------------------------------------------------------
# TOKENS
# ---------------------------------------------------------------------------------------------------------------------

servers = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(("http", "https")),
    st.sampled_from(("203.0.113.10", "vpn.example.org", "[2001:db8::1]")),
    st.sampled_from(("", ":8081", ":443")),
    st.sampled_from(("", "/mesh")),
)
networks = st.from_regex(r"[a-z0-9](\.?[a-z0-9_-]){0,5}", fullmatch=True).filter(
    lambda name: name != "all" and name[-4:] != ".tmp"
)
access_keys = st.one_of(
    st.just(""),
    st.builds("{}.{}".format, st.text("abcdef0123456789", min_size=1, max_size=32), st.binary(min_size=16, max_size=64).map(b64)),
)


@usual
@given(st.lists(servers, min_size=1, max_size=3).map(tuple), keys32, networks, access_keys)
def test_a_token_comes_back_as_it_was(places, pin, network, key):
    token = Token(places, pin, network, key)
    assert parse_token(make_token(token)) == token


@usual
@given(st.lists(st.tuples(st.integers(0, len(TEXT)), st.sampled_from((" ", "\n", "\r\n", "\t"))), max_size=4))
def test_blanks_and_line_breaks_of_copying_do_no_harm(breaks):
    text = TEXT
    for at, blank in breaks:
        text = text[:at] + blank + text[at:]
    assert parse_token(text) == TOKEN


def test_a_token_is_what_the_protocol_says():
    raw = unb64(TEXT).decode()
    fields = json.loads(raw)
    assert list(fields) == ["v", "server", "pin", "network", "key", "sum"]
    assert fields["v"] == 1
    body = raw[: raw.index(',"sum"')] + "}"
    assert fields["sum"] == hashlib.blake2b(body.encode(), digest_size=4).hexdigest()
    assert raw == body[:-1] + ',"sum":"' + fields["sum"] + '"}'
    assert "\n" not in TEXT


def refusal(text):
    """The sentence with which a token is refused."""
    with pytest.raises(Invalid) as caught:
        parse_token(text)
    assert caught.value.status == agent.ExitStatus.USAGE
    return str(caught.value)


# of all three lengths that base64 knows: where it is no multiple of four, the last character has bits to spare
LENGTHS = [make_token(TOKEN._replace(network=name)) for name in ("demo", "demo1", "demo12")]


def test_the_three_lengths():
    assert {len(text) % 4 for text in LENGTHS} == {0, 2, 3}


@pytest.mark.parametrize("text", LENGTHS)
def test_every_truncation_is_called_damaged(text):
    for cut in range(len(text)):
        assert "damaged" in refusal(text[:cut])
    for start in range(1, len(text)):
        refusal(text[start:])


@pytest.mark.parametrize("text", LENGTHS)
def test_every_single_change_is_refused(text):
    letters = string.ascii_letters + string.digits + "-_+/=!.é "
    for at in range(len(text)):
        for letter in letters:
            if letter != text[at]:
                refusal(text[:at] + letter + text[at + 1 :])


@pytest.mark.parametrize("text", LENGTHS)
def test_every_lost_doubled_and_swapped_character_is_refused(text):
    for at in range(len(text)):
        refusal(text[:at] + text[at + 1 :])
        if text[at : at + 2] != text[at : at + 2][::-1]:
            refusal(text[:at] + text[at : at + 2][::-1] + text[at + 2 :])
        refusal(text[: at + 1] + text[at:])


@usual
@given(st.text(), st.binary())
@example("", b"[" * 100_000)
@example("null", b"null")
@example("W10", b'{"v":1}')
@example("eyJ2IjoxfQ", b'{"v":1,"sum":"00000000"}')
def test_what_is_no_token_is_refused(text, raw):
    refusal(text)
    refusal(b64(raw))


def crafted(**change):
    """A whole token that says what its maker wants."""
    fields = {"v": 1, "server": ["http://203.0.113.10:8081"], "pin": b64(PIN), "network": "default", "key": KEY, **change}
    raw = json.dumps({name: value for name, value in fields.items() if value is not ...}, separators=(",", ":"))
    check = hashlib.blake2b(raw.encode(), digest_size=4).hexdigest()
    return b64(f'{raw[:-1]},"sum":"{check}"}}'.encode())


def test_a_crafted_token_is_a_token():
    assert parse_token(crafted()) == TOKEN
    assert parse_token(crafted(color="blue")) == TOKEN  # of a newer server
    assert parse_token(crafted(network="DEFAULT")) == TOKEN
    assert parse_token(crafted(key="")).key == ""


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_token_of_another_version_says_so(version):
    assert "version" in refusal(crafted(v=version))


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"server": []},
            {"server": "http://x"},
            {"server": 5},
            {"server": [5]},
            {"server": ["ftp://x"]},
            {"server": ["x:8081"]},
        ),
        *({"server": ["http://a b"]}, {"server": [""]}, {"server": ...}),
        *({"pin": ""}, {"pin": b64(b"short")}, {"pin": b64(PIN) + "="}, {"pin": 5}, {"pin": None}, {"pin": ...}),
        *({"network": ""}, {"network": "all"}, {"network": "x" * 13}, {"network": "a b"}, {"network": 5}, {"network": ...}),
        *({"key": "x"}, {"key": "a.b"}, {"key": 5}, {"key": None}, {"key": ["a"]}, {"key": KEY + "\n"}, {"key": ...}),
    ],
    ids=str,
)
def test_a_whole_token_that_says_something_impossible_says_so(change):
    assert "impossible" in refusal(crafted(**change))


def test_a_token_without_its_sum_at_the_end_is_called_damaged():
    fields = json.loads(unb64(TEXT))
    for order in (["sum", "v", "server", "pin", "network", "key"], ["v", "server", "pin", "network", "key"]):
        raw = json.dumps({name: fields[name] for name in order}, separators=(",", ":"))
        assert "damaged" in refusal(b64(raw.encode()))


def test_the_private_parts_of_a_token_are_in_no_sentence():
    for text in (TEXT[:-3], crafted(network="a b"), crafted(pin="x"), crafted(server=["x"])):
        assert KEY.split(".")[1] not in refusal(text)


# ---------------------------------------------------------------------------------------------------------------------
# 0.8
# ---------------------------------------------------------------------------------------------------------------------

ORIGINAL = {
    **{"corednsaddr": "", "apiconn": "203.0.113.10:8081", "apihost": "203.0.113.10", "apiport": "8081"},
    **{"grpcconn": "203.0.113.10:50051", "grpchost": "203.0.113.10", "grpcport": "50051", "grpcssl": "off"},
    **{"checkininterval": "15", "network": "Demo", "key": KEY, "localrange": "", "grpcwg": "off"},
}


def original(**change):
    return base64.b64encode(json.dumps({**ORIGINAL, **change}).encode()).decode()


def test_the_originals_token_is_read():
    assert parse_token(original()) == Token(("http://203.0.113.10:8081",), b"", "demo", KEY)
    assert parse_token(original(key="")).key == ""
    assert parse_token(original(apiconn="https://vpn.example.org")).servers == ("https://vpn.example.org",)


@pytest.mark.parametrize(
    "change",
    [
        {"apiconn": ""},
        {"apiconn": None},
        {"apiconn": "ftp://x"},
        {"apiconn": "a b"},
        {"network": ""},
        {"network": "a b"},
        {"network": "all"},
    ],
    ids=str,
)
def test_an_original_token_that_names_nothing_usable_says_so(change):
    assert "no usable server or network" in refusal(original(**change))


# ---------------------------------------------------------------------------------------------------------------------
# BOUNDS
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (
            check_network,
            ["a", "default", "A.b_c-1", "x" * 12, "0"],
            ["", "x" * 13, "-a", ".a", "a.", "a..b", "a.tmp", "a b", "a/b", "ä", "all", "ALL", "a\n"],
        ),
        (check_name, ["a", "router-1", "X" * 62, "0"], ["", "x" * 63, "-a", "a-", "a.b", "a_b", "a b", "ä", "a\n"]),
        (
            check_key,
            [key_like("a")],
            ["", "x", key_like("a")[:-1], key_like("a") + "=", "A" * 43 + "=", key_like("a") + "\n", "ä" * 44],
        ),
        (
            check_address,
            ["10.0.0.1", "fd00::1", "::"],
            ["", "10.0.0", "10.0.0.1/24", "10.0.0.256", "x", "fe80::1%eth0", "10.0.0.01", "1"],
        ),
        (check_port, [1024, 65535], [0, 1023, 65536, "51821", True, None, 1024.0]),
    ],
    ids=["network", "name", "key", "address", "port"],
)
def test_what_is_in_bounds_is_taken_and_the_rest_gets_a_sentence(check, good, bad):
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(Invalid) as caught:
            check(value)
        assert len(str(caught.value)) > 15
        assert "Traceback" not in str(caught.value)


def test_each_kind_of_bad_value_has_its_own_sentence():
    said = set()
    cases = [
        (check_network, "a b"),
        (check_network, "all"),
        (check_name, "a b"),
        (check_key, "a b"),
        (check_address, "a b"),
        (check_port, 80),
    ]
    for check, value in cases:
        with pytest.raises(Invalid) as caught:
            check(value)
        said.add(str(caught.value).replace(repr(value), ""))
    assert len(said) == len(cases)


def test_an_address_of_the_other_kind_says_which_was_wanted():
    for version, address in ((4, "fd00::1"), (6, "10.0.0.1")):
        with pytest.raises(Invalid, match=f"IPv{version}"):
            check_address(address, version)
    assert check_address("::ffff:10.0.0.1") == "10.0.0.1"
    assert check_address("::ffff:10.0.0.1", 4) == "10.0.0.1"
    assert check_address("2001:DB8:0::1") == "2001:db8::1"


@usual
@given(keys32)
def test_a_key_has_one_spelling(raw):
    text = base64.b64encode(raw).decode()
    if any(raw):
        assert check_key(text) == text
    last = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    for other in last:  # the last character carries four bits: three of four spellings are none
        if other != text[42]:
            try:
                check_key(text[:42] + other + "=")
            except Invalid:
                continue
            assert base64.b64decode(text[:42] + other + "=") != raw


# ---------------------------------------------------------------------------------------------------------------------
# B64
# ---------------------------------------------------------------------------------------------------------------------


@usual
@given(st.binary())
def test_b64_comes_back_as_it_was(data):
    text = b64(data)
    assert unb64(text) == data
    assert text == base64.urlsafe_b64encode(data).decode().rstrip("=")


@usual
@given(st.text("AQgwxyz09-_+/=. \n", max_size=12))
def test_b64_has_one_spelling(text):
    try:
        data = unb64(text)
    except ValueError:
        return
    assert b64(data) == text


@pytest.mark.parametrize("text", ["A", "AB", "AAB", "AA==", "AA=", "A+8", "A/8", " AA", "AA\n", "Ä", "A A", "AAAAA"])
def test_what_is_not_b64(text):
    with pytest.raises(ValueError, match="base64url"):
        unb64(text)


# ---------------------------------------------------------------------------------------------------------------------
# X25519
# ---------------------------------------------------------------------------------------------------------------------

BASE = b"\x09" + bytes(31)
RFC_7748 = [
    (
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ),
    (
        "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
        "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
        "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    ),
]
# u = 0, 1, two points of order 8, p - 1, p, p + 1, and their spellings with the top bit: all lead to the neutral element
SMALL_ORDER = [
    *(bytes(32), b"\x01" + bytes(31)),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    *((agent.CURVE_P + more).to_bytes(32, "little") for more in (-1, 0, 1)),
    *((agent.CURVE_P + more | 1 << 255).to_bytes(32, "little") for more in (-1, 0, 1)),
]


@pytest.fixture(params=["PyNaCl", "ladder"])
def curve(request, monkeypatch):
    """x25519 with PyNaCl, and as it is on a router without it."""
    if request.param == "ladder":
        monkeypatch.setitem(sys.modules, "nacl.bindings", None)
    else:
        pytest.importorskip("nacl.bindings")
    return x25519


@pytest.mark.parametrize(("scalar", "point", "shared"), RFC_7748)
def test_the_vectors_of_rfc_7748(curve, scalar, point, shared):
    assert curve(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == shared
    assert ladder(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == shared


def test_the_iterated_vector_of_rfc_7748():
    expected = {
        1: "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079",
        1000: "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51",
    }
    k = u = BASE
    for number in range(1, 1001):
        k, u = ladder(k, u), k
        if number in expected:
            assert k.hex() == expected[number]


@usual
@given(keys32, keys32)
@example(bytes(32), BASE)
@example(b"\xff" * 32, b"\xff" * 32)
@example(bytes(32), (agent.CURVE_P + 9).to_bytes(32, "little"))
def test_the_ladder_does_what_pynacl_does(scalar, point):
    bindings = pytest.importorskip("nacl.bindings")
    try:
        expected = bindings.crypto_scalarmult(scalar, point)
    except RuntimeError:  # all-zero
        expected = bytes(32)
    assert ladder(scalar, point) == expected


@settings(max_examples=15, deadline=None)
@given(keys32, keys32)
def test_two_sides_agree(ours, theirs):
    assert x25519(ours, public_key(theirs)) == x25519(theirs, public_key(ours))


@pytest.mark.parametrize("point", SMALL_ORDER, ids=bytes.hex)
def test_an_all_zero_outcome_is_refused(curve, point):
    with pytest.raises(Invalid, match="curve point"):
        curve(hashlib.sha256(b"some scalar").digest(), point)


def test_public_keys_are_wireguards():
    # `wg pubkey`, and tests/data holds what it printed: the interface's own public key is no field of the dump that we keep
    assert agent.derived_public(PRIVATE) == base64.b64encode(ladder(base64.b64decode(PRIVATE), BASE)).decode()
    private = agent.new_private()
    raw = base64.b64decode(private)
    assert (raw[0] & 7, raw[31] & 128, raw[31] & 64) == (0, 0, 64)
    assert check_key(private) == private
    assert agent.new_private() != private


# ---------------------------------------------------------------------------------------------------------------------
# SEALING
# ---------------------------------------------------------------------------------------------------------------------


@usual
@given(keys32, st.binary(max_size=200), st.data())
def test_what_is_sealed_opens_and_nothing_else_does(key, body, data):
    pytest.importorskip("nacl.secret")
    box = secret_box(key)
    sealed = bytes(box.encrypt(body))
    assert unseal(box, sealed) == body
    at, bit = data.draw(st.integers(0, len(sealed) - 1)), data.draw(st.integers(0, 7))
    for other in (sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :], sealed[: max(at, 1)], body or b"x"):
        with pytest.raises(BadAnswer):
            unseal(box, other)
    assert unseal(box, b"") == b""


def test_without_pynacl_there_is_no_box(monkeypatch):
    monkeypatch.setitem(sys.modules, "nacl.secret", None)
    assert secret_box(bytes(32)) is None


def test_the_proof_of_an_access_key_depends_on_all_that_it_is_made_of():
    proofs = {
        key_proof(secret, key, nonce) for secret in (b"s" * 16, b"t" * 16) for key in (b"k", b"l") for nonce in (b"n", b"m")
    }
    assert len(proofs) == 8
    assert key_proof(b"s" * 16, b"k" * 32, b"n" * 16) == b64(
        hashlib.blake2b(b"k" * 32 + b"n" * 16, key=b"s" * 16, digest_size=32).digest()
    )
