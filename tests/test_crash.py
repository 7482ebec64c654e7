"""kill -9 at every step of a join and of a check-in that applies a change: the next run heals."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Iterator

import pytest
from lab import Host, Lab, unfit
from mesh import Member, Mesh

UNFIT = unfit("wg")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(300)]
CRASH = str(Path(__file__).resolve().parent / "crash.py")
COUNTED = "/root/effects"
SHARES = 4  # every fourth step in one test, so that they can run at once


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with Lab() as lab:
        mesh = Mesh(lab)
        mesh.join(mesh.host)
        yield mesh


def crash(host: Host, at: int, *verb: str) -> subprocess.CompletedProcess[str]:
    return host.run(host.lab.python, CRASH, str(at), COUNTED, *verb, check=False)


@pytest.mark.parametrize("share", range(SHARES))
def test_a_join_killed_at_any_step_is_healed_by_the_same_command(mesh: Mesh, share: int) -> None:
    host = mesh.lab.public("nas", "203.0.113.30")
    at = share + 1 - SHARES
    while True:
        at += SHARES
        token = mesh.token(uses=1)
        join = ("join", "-t", token, "--daemon", "off")
        killed = crash(host, at, *join)
        if killed.returncode == 0:
            break
        assert killed.returncode in (-9, 137), (at, killed.stderr)
        # every other time cron comes first: it must do no harm, and finish what can be finished
        if at % 2:
            host.agent("checkin", check=False)
        healed = host.agent(*join, check=False)
        assert healed.returncode == 0, (at, killed.stderr, healed.stderr)
        assert sorted(node["name"] for node in mesh.nodes()) == ["nas", "server"], at
        assert len(Member(mesh, host, "demo").peers()) == 1, at
        host.agent("leave", "-n", "demo")
        assert host.run("ls", "-A", "/etc/netclient/config").stdout == "", at
        assert len(mesh.nodes()) == 1, at
    assert at > 20


def test_a_checkin_killed_at_any_step_is_healed_by_the_next(mesh: Mesh) -> None:
    member = mesh.join(mesh.lab.public("nas", "203.0.113.30"))
    other = mesh.lab.public("other", "203.0.113.31")
    at = 0
    while True:
        at += 1
        joins = at % 2 == 1
        if joins:
            mesh.join(other)
        else:
            other.agent("leave", "-n", "demo")
        killed = crash(member.host, at, "checkin")
        member.checkin()
        assert len(member.peers()) == (2 if joins else 1), (at, killed.stderr)
        assert member.checkin().stderr == "", at
        if killed.returncode == 0:
            break
        assert killed.returncode in (-9, 137), (at, killed.stderr)
    assert at > 8
