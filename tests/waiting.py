"""Waiting for what other threads and processes do, and ports for them."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress


def until(condition: Callable[[], object], seconds: float = 10.0, pause: float = 0.005) -> None:
    """Wait until *condition* holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(pause)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on.

    It is below those that systems give to clients: none takes it while its server is down.
    """
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
