"""`python -m webapp.serve`: gunicorn as a container runs it; options of gunicorn's may follow."""

import os
import sys

from webapp.environment import NUMBERS, set_number


def main() -> None:
    """Become gunicorn."""
    for name in NUMBERS:
        set_number(name)
    gunicorn = [sys.executable, "-m", "gunicorn", "--config", "webapp/gunicorn.conf.py"]
    os.execv(sys.executable, [*gunicorn, *sys.argv[1:], "webapp:create_app()"])  # noqa: S606


if __name__ == "__main__":
    main()
