# SPDX-License-Identifier: Apache-2.0
"""Keys are refreshed make-before-break: SPEC §8. The lab's stories, and the rules one by one."""

from __future__ import annotations

import contextlib
import json
from typing import Callable, Iterator

import pytest
from lab import CODE, Lab, Loss, unfit, wait_for
from mesh import Cron, Mesh

UNFIT = unfit("wg")
MARKS = (pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(300))
INTERVAL = 4  # seconds between two check-ins in these stories
DATA = "/var/lib/netmaker-lite"

ORDER = f"""
import sys
import netmaker_lite as server
core = server.open_core(server.Settings({{}}, {{"NETMAKER_DATA": "{DATA}"}}))
"""


class Refresh:
    """A public node and two homes behind NAT, meshed; and what an administrator does and sees of a refresh."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.mesh = mesh = Mesh(lab, "demo", "--checkin-interval", str(INTERVAL))
        homes = lab.router("home1", "203.0.113.21"), lab.router("home2", "203.0.113.22", lan="192.168.100.0/24")
        self.hub = mesh.join(lab.public("hub", "203.0.113.30"))
        self.left = mesh.join(lab.site("left", homes[0]))
        self.right = mesh.join(lab.site("right", homes[1]))
        self.all = [self.hub, self.left, self.right]
        mesh.settle(self.all)
        self.addresses = {member: member.address for member in self.all}

    def do(self, line: str) -> str:
        """A line of Python beside the server, as the command line would do it."""
        return self.mesh.host.run(self.lab.python, "-c", ORDER + line, env={"PYTHONPATH": str(CODE)}).stdout

    def order(self, name: str = "") -> None:
        if name:
            self.do(f"server.refresh_key(core, server.need_node(core, 'demo', '{name}'))")
        else:
            self.do("server.refresh_keys(core, 'demo')")

    def states(self) -> dict[str, str]:
        told = self.do("import json; print(json.dumps({n['name']: n['refresh'] for n in server.nodes(core, 'demo')}))")
        states: dict[str, str] = json.loads(told)
        return states

    def keys(self) -> dict[str, str]:
        told = self.do("import json; print(json.dumps({n['name']: n['key'] for n in server.nodes(core, 'demo')}))")
        keys: dict[str, str] = json.loads(told)
        return keys

    def reach(self, name: str, *states: str, timeout: float = 60) -> None:
        wait_for(lambda: self.states()[name] in states, timeout, f"{name} to be {states}")

    def over(self, timeout: float = 120) -> None:
        wait_for(lambda: not any(self.states().values()), timeout, "the refresh to be over")

    @contextlib.contextmanager
    def pings(self) -> Iterator[Callable[[], dict[tuple[str, str], Loss]]]:
        """A hundred a second between each pair; what they lost."""
        pairs = [(a, b) for a in self.all for b in self.all if a is not b]
        with contextlib.ExitStack() as stack:
            sent = {(a.name, b.name): stack.enter_context(a.host.pinging(self.addresses[b])) for a, b in pairs}
            yield lambda: {pair: ping.stop() for pair, ping in sent.items()}


def story(test: Callable[..., None]) -> Callable[..., None]:
    for mark in MARKS:
        test = mark(test)
    return test


@pytest.fixture
def refresh(lab: Lab) -> Refresh:
    return Refresh(lab)


@story
@pytest.mark.parametrize("way", ["cron", "daemon"])
def test_all_keys_of_a_network_change_and_hardly_a_packet_is_lost(refresh: Refresh, way: str) -> None:
    before = refresh.keys()
    with contextlib.ExitStack() as stack:
        if way == "cron":
            stack.enter_context(Cron(refresh.all, INTERVAL))
        else:
            for member in refresh.all:
                member.daemon()
        lost = stack.enter_context(refresh.pings())
        refresh.order()
        refresh.over()
        losses = lost()
    after = refresh.keys()
    assert not set(before.values()) & set(after.values())
    print({pair: loss.lost for pair, loss in losses.items()})
    assert all(loss.lost <= 200 and loss.sent > 500 for loss in losses.values()), losses  # each tunnel is refreshed twice
    for member in refresh.all:
        assert member.peers() == set(after.values()) - {after[member.name]}
        assert member.host.run("stat", "-c", "%a", "/etc/netclient/config/wgkey-demo").stdout.strip() == "600"
        assert len(member.host.read("/etc/netclient/config/wgkey-demo").split()) == 1
