"""`python -m webapp.serve`: gunicorn as a container runs it; further arguments go to gunicorn."""

import os
import signal
import sys

from webapp.environment import NUMBERS, set_number


def main() -> None:
    """Become gunicorn.

    Process 1 of a container would lose a SIGTERM that arrives before gunicorn has a handler for
    it, and would be killed at the end of its grace period. So the signal is blocked, also across
    exec, until there is a handler.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for name in NUMBERS:
        set_number(name)
    gunicorn = [sys.executable, "-m", "gunicorn", "--config", "webapp/gunicorn.conf.py"]
    os.execv(sys.executable, [*gunicorn, *sys.argv[1:], "webapp:create_app()"])  # noqa: S606


if __name__ == "__main__":
    main()
