"""Wait for other threads and processes, and find free ports."""

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
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(pause)


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1.

    It is below the range for outgoing connections, so none of these takes it while its server is
    down.
    """
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
