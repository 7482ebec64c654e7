# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest
from serverkit import Clock, Server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def home(tmp_path: Path, clock: Clock) -> Iterator[Server]:
    """A running server with the network `default`."""
    running = Server(str(tmp_path / "data"), clock)
    running.network()
    yield running
    running.stop()
