"""Starts the door's server again if it ends, and ends when the process that started it is gone.

This uses only the standard library. Each process holds a pipe to the one that it started. The end
of that file, which also comes at a SIGKILL, tells the other to end.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

from dbpool.door import WRONG_SETTINGS

_PAUSES: Final = (0.1, 0.5, 1.0, 5.0)  # seconds between two starts
_STABLE_AFTER: Final = 60.0  # seconds of life after which the pauses begin anew
_END_TIMEOUT: Final = 45.0  # seconds that the server may take to end


def supervise(arguments: Sequence[str], watched: int = 0) -> int:
    """Run `python -m dbpool serve` with *arguments* until the file *watched* ends; return 0."""
    failures = 0
    while True:
        started = time.monotonic()
        server = subprocess.Popen(
            [sys.executable, "-m", "dbpool", "serve", "--until-eof", *arguments],
            stdin=subprocess.PIPE,
        )
        is_wanted = _wait(server, watched)
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        if not is_wanted:
            return 0
        if server.returncode == WRONG_SETTINGS:  # it has said which
            return WRONG_SETTINGS
        failures = 0 if time.monotonic() - started > _STABLE_AFTER else failures + 1
        pause = _PAUSES[min(failures, len(_PAUSES) - 1)]
        if not _is_open(watched, pause):
            return 0


def _wait(server: subprocess.Popen[bytes], watched: int) -> bool:
    """Wait until the server ends; return whether it is still wanted."""
    while server.poll() is None:
        if not _is_open(watched, 0.2):
            return False
    return True


def _is_open(watched: int, seconds: float) -> bool:
    """Wait that long; return false at once when the pipe ends."""
    readable, _, _ = select.select([watched], [], [], seconds)
    return not readable or os.read(watched, 1) != b""


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
