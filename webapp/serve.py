"""`python -m webapp.serve`: gunicorn as a container runs it; options of gunicorn's may follow."""

import os
import signal
import sys

from webapp.environment import NUMBERS, set_number


def main() -> None:
    """Become gunicorn.

    Process 1 of a container would lose a SIGTERM that comes before gunicorn has a handler for it,
    and be killed at the end of its grace. So it waits, across exec, until there is one.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for name in NUMBERS:
        set_number(name)
    gunicorn = [sys.executable, "-m", "gunicorn", "--config", "webapp/gunicorn.conf.py"]
    os.execv(sys.executable, [*gunicorn, *sys.argv[1:], "webapp:create_app()"])  # noqa: S606


if __name__ == "__main__":
    main()
