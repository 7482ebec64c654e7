"""`sh shell/quickstart.sh --demo`: the product on one machine in under a minute.

Two homes behind two NAT routers and a public server, all namespaces of this machine; three joins with tokens, hole punching,
pings between private addresses, the status of each node. Everything is gone at the end.
"""

from __future__ import annotations

import sys
import time

from lab import Lab, LabError, adjacency, unfit, wait_for
from mesh import Member, Mesh


def tell(text: str) -> None:
    print(text, flush=True)


def step(text: str) -> None:
    tell(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}")


def show(host_name: str, command: str, output: str) -> None:
    """A command as a user would type it, and what it printed."""
    tell(f"{host_name}# {command}")
    for line in output.rstrip().splitlines():
        tell(f"    {line}")


def meshed(members: list[Member]) -> bool:
    return all(peer["path"] != "none" for member in members for peer in member.status["peers"])


def main() -> int:
    unable = unfit("wg")
    if unable:
        print(f"the demo cannot run here: {unable}", file=sys.stderr)
        return 1
    begin = time.monotonic()
    try:
        with Lab() as lab:
            story(lab)
    except LabError as bad:
        print(f"the demo failed: {bad}", file=sys.stderr)
        return 1
    step(f"Done in {time.monotonic() - begin:.0f} s; nothing of it is left on this machine.")
    return 0


def story(lab: Lab) -> None:
    step("A public server, and a network on it")
    mesh = Mesh(lab, "demo")
    show("server", "netmaker-lite network list", mesh.admin("network", "list"))
    step("Two homes: each a LAN behind a router that masquerades and lets nothing unasked in")
    nas = lab.site("nas", lab.router("home1", "203.0.113.21", lan="192.168.1.0/24"))
    camera = lab.site("camera", lab.router("home2", "203.0.113.22", lan="192.168.100.0/24"))
    tell(f"    nas     {nas.ip} behind 203.0.113.21\n    camera  {camera.ip} behind 203.0.113.22")
    step("Three joins, each with a token")
    members = []
    for host in (mesh.host, nas, camera):
        token = mesh.token()
        said = host.agent("join", "-t", token, "--daemon", "off")
        show(host.name, f"netclient_lite.py join -t {token[:24]}… --daemon off", said.stdout)
        members.append(Member(mesh, host, "demo"))
        members[-1].daemon()
    since = time.monotonic()
    wait_for(lambda: meshed(members), 40, "the mesh to be whole")
    step(f"The mesh is whole {time.monotonic() - since:.1f} s after the last join: both NATs are punched, no port was opened")
    for (here, there), loss in sorted(adjacency({m.host: m.address for m in members}).items()):
        tell(f"    {here:>7} -> {there:<7} {loss.received}/{loss.sent} answers")
        if loss.lost:
            raise LabError(f"{here} does not reach {there}")
    for member in members:
        show(member.name, "netclient_lite.py status", member.host.agent("status").stdout)
    step("The server dies; the mesh does not")
    mesh.kill()
    loss = nas.ping(members[2].address, count=10, interval=0.1)
    tell(f"    nas -> camera  {loss.received}/{loss.sent} answers")


if __name__ == "__main__":
    sys.exit(main())
