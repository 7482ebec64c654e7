"""Run the agent and kill it, as a power cut does, at the Nth of its effects: `python crash.py N FILE VERB …`.

An effect is what the three doors let out: a process started, a file written or removed, a message sent; each counts twice, before
and after. N 0 kills nothing. The number of effects until the end is written to FILE.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import netclient_lite as agent

COUNT = 0
LAST = int(sys.argv[1])


def tick() -> None:
    global COUNT
    COUNT += 1
    if COUNT == LAST:
        os.kill(os.getpid(), signal.SIGKILL)


def counted(effect: Callable[..., Any]) -> Callable[..., Any]:
    def effect_between_ticks(*args: Any, **kw: Any) -> Any:
        tick()
        done = effect(*args, **kw)
        tick()
        return done

    return effect_between_ticks


CHANGING = ("set", "add", "del", "replace", "-batch", "nm-demo")


def run_counted(self: agent.Run, *argv: str, **kw: Any) -> str:
    """Commands that only read are no effects."""
    changes = argv[0] in agent.USERSPACE or (any(word in CHANGING for word in argv[1:4]) and "show" not in argv)
    call: Callable[..., Any] = counted(RUN) if changes else RUN
    text: str = call(self, *argv, **kw)
    return text


RUN = agent.Run.__call__
agent.Run.__call__ = run_counted  # type: ignore[method-assign]
for name in ("write", "remove", "volatile"):
    setattr(agent.Files, name, counted(getattr(agent.Files, name)))
agent.Session._send = counted(agent.Session._send)  # type: ignore[method-assign]

status = agent.main(sys.argv[3:])
Path(sys.argv[2]).write_text(str(COUNT), encoding="utf-8")
sys.exit(status)
