# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/protocol.md: `python tests/make_vectors.py > tests/data/vectors.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import netclient_lite as agent

LABELS = ("request mac", "answer mac", "seal", "proof")


def pattern(start: int, size: int) -> bytes:
    """Bytes that are no secret: start, start + 1, …"""
    return bytes((start + each) % 256 for each in range(size))


def vectors() -> dict[str, object]:
    """Every construction, from fixed keys and nonces."""
    import nacl.secret

    a, s, network = pattern(1, 32), pattern(101, 32), "default"
    public, pin = agent.public_key(a), agent.public_key(s)
    z = agent.x25519(a, pin)
    assert z == agent.ladder(s, public)
    keys = {label: agent.label_key(z, label, public, pin, network) for label in LABELS}
    secret, nonce = pattern(201, 16), pattern(51, 16)
    token = agent.Token(("http://203.0.113.10:8081",), pin, network, "a1b2c3d4." + agent.b64(secret))
    incarnation = agent.b64(pattern(11, 8))
    proof = agent.key_proof(secret, keys["proof"], nonce)
    joined = json.dumps({"proof": {"key": "a1b2c3d4", "mac": proof}, "facts": {}}, separators=(",", ":")).encode()
    fields = (agent.b64(public), network, "p", incarnation, agent.b64(nonce))
    join = agent.signed(keys["request mac"], agent.JOIN_PATH, fields, joined)
    body = b'{"facts":{"os":"OpenWrt"}}'
    box = nacl.secret.SecretBox(keys["seal"])
    sealed = bytes(box.encrypt(body, pattern(31, 24)))
    numbers = ("0123456789abcdef", "s", incarnation, "2.17", "-", "12.5b0c9a41", agent.b64(nonce))
    exchange = agent.signed(keys["request mac"], agent.EXCHANGE_PATH, numbers, sealed)
    head = "1 204 203.0.113.7 1800000000 15"
    request_mac = exchange.rpartition(" ")[2]
    answer = head + " " + agent.mac(keys["answer mac"], head.encode(), request_mac.encode(), b"")
    return {
        "agent private": a.hex(),
        "agent public": agent.b64(public),
        "server private": s.hex(),
        "pin": agent.b64(pin),
        "network": network,
        "shared": z.hex(),
        "keys": {label: key.hex() for label, key in keys.items()},
        "access key": token.key,
        "token": agent.make_token(token),
        "nonce": nonce.hex(),
        "proof": proof,
        "join body": joined.decode(),
        "join line": join,
        "sealed body": {"plain": body.decode(), "nonce": pattern(31, 24).hex(), "sealed": sealed.hex()},
        "exchange line, with the sealed body": exchange,
        "answer line, without a body": answer,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(vectors(), indent=2) + "\n")
