# SPDX-License-Identifier: Apache-2.0
"""PostUp and PostDown: root's own files run; what the server says runs only where root has accepted that."""

from __future__ import annotations

import json

import pytest
from lab import Lab, unfit
from mesh import Member, Mesh

UNFIT = unfit("wg")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT)]

FOLDER = "/etc/netclient/hooks/demo"


def said(member: Member, file: str) -> list[str]:
    return member.host.run("sh", "-c", f"cat {file} 2>/dev/null; rm -f {file}").stdout.splitlines()


def shown(mesh: Mesh, member: Member) -> str:
    return str(json.loads(mesh.admin("node", "show", "demo", member.name, "--json"))["hooks"])


def test_hooks_from_the_first_to_the_last(lab: Lab) -> None:
    mesh = Mesh(lab)
    host = lab.public("nas", "203.0.113.30")
    for name in ("postup", "postdown"):
        host.write(
            f"{FOLDER}/{name}", f'#!/bin/sh\necho "{name} $*" >>/tmp/local\nsleep 300 &\n'
        )  # what stays must not hold us up
        host.run("chmod", "755", f"{FOLDER}/{name}")
    nas = mesh.join(host)
    assert said(nas, "/tmp/local") == ["postup nm-demo demo"]

    mesh.admin("node", "set", "demo", "nas", "postup=echo up %i >>/tmp/told", "postdown=echo down %i >>/tmp/told")
    nas.checkin()
    nas.checkin()
    assert shown(mesh, nas) == "not accepted" and said(nas, "/tmp/told") == []

    host.agent("join", "-t", mesh.token(), "--accept-hooks", "yes")
    nas.checkin()
    assert said(nas, "/tmp/told") == ["up nm-demo"] and shown(mesh, nas) == "accepted; "
    nas.checkin()
    mesh.admin("node", "set", "demo", "nas", "postup=echo again %i >>/tmp/told; exit 3")
    assert "a hook failed" in nas.checkin().stderr
    nas.checkin()
    assert said(nas, "/tmp/told") == ["down nm-demo", "again nm-demo"]
    assert "exit" in shown(mesh, nas)
    assert said(nas, "/tmp/local") == [], "the interface has not come up anew"

    host.run("ip", "link", "del", "nm-demo")
    host.run("chmod", "775", f"{FOLDER}/postup")
    assert "others than root can write it" in nas.checkin().stderr
    assert said(nas, "/tmp/local") == [] and said(nas, "/tmp/told") == ["again nm-demo"]
    host.run("chmod", "755", f"{FOLDER}/postup")
    assert (
        "postup nm-demo demo"
        in host.run("sh", "-c", f"ip link del nm-demo; {' '.join(lab.agent_argv)} checkin -n all; cat /tmp/local").stdout
    )
    said(nas, "/tmp/local")
    said(nas, "/tmp/told")

    nas.leave()
    assert said(nas, "/tmp/local") == ["postdown nm-demo demo"]
    assert said(nas, "/tmp/told") == ["down nm-demo"]
