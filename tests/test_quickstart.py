"""The README's first command as a newcomer runs it, in a lab host without a network, with packages laid ready; and the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import CODE, Host, Lab, unfit, wait_for

UNFIT = unfit("wg", "setpriv")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(300)]
WHEELS = Path(sys.prefix) / "wheels"
PYTHON = os.path.realpath(sys.executable)
NO_PACKAGES = not WHEELS.is_dir() or PYTHON.startswith("/root/")


def quickstart(host: Host, *arguments: str, check: bool = True, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS), "NM_HOST": host.ip, "NM_PYTHON": PYTHON, **settings}
    return host.run("sh", str(CODE / "shell/quickstart.sh"), *arguments, check=check, env=env, timeout=240)


@pytest.mark.skipif(NO_PACKAGES, reason="shell/test.sh lays the packages ready, for a Python that every user may run")
def test_two_runs_a_join_and_a_stop() -> None:
    with Lab() as lab:
        vps, nas = lab.public("vps", "203.0.113.10"), lab.site("nas", lab.router("home", "203.0.113.21"))
        vps.run("rm", "-rf", "/opt/netmaker-lite", "/var/lib/netmaker-lite")
        refused = quickstart(vps, check=False, NM_RANGE="203.0.113.0/24")
        assert refused.returncode == 1
        assert "overlaps a route" in refused.stderr
        assert vps.run("ls", "/opt").stdout.count("netmaker-lite") == 0
        first, second = (quickstart(vps).stdout.strip() for _ in range(2))
        assert first.startswith("python3 netclient_lite.py join -t ")
        assert "nm-default" in vps.run("ip", "link").stdout
        withdrawn = nas.agent("join", "-t", first.split()[-1], "--daemon", "off", check=False)
        assert withdrawn.returncode == 1
        nas.agent("join", "-t", second.split()[-1], "--daemon", "off")
        peer = json.loads(nas.agent("list").stdout)[0]["peers"][0]
        first_node = peer["address"]
        assert peer["name"] == "netmaker"
        wait_for(lambda: not nas.ping(first_node, count=1).lost, 15, "the first node to be reached")
        assert "netmaker-lite" in vps.run("ps", "-o", "user:20,args", "-e").stdout
        quickstart(vps, "--stop")
        assert "netmaker-lite serve" not in vps.run("ps", "-o", "args", "-e").stdout
        assert "no server" in quickstart(vps, "--stop").stderr


def test_the_demo_tells_its_story_and_leaves_nothing() -> None:
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    told = subprocess.run([sys.executable, str(CODE / "tests/demo.py")], capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "The mesh is whole" in told.stdout
    assert "10/10 answers" in told.stdout
    assert subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout == links
