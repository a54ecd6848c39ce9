"""Server hooks for gunicorn: `from dbpool.gunicorn import *` in a `gunicorn.conf.py`.

They make the directory in which the workers' statistics meet, let a pool be as large as its
worker has threads unless that is set, and close the pools when a worker exits. A hook of your
own with the same name takes the place of one of these; call the one here from it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from dbpool._files import start_time
from dbpool._fork import close_all, pools
from dbpool.processes import VARIABLE

__all__ = ["on_exit", "on_starting", "post_worker_init", "worker_exit"]

_NAME: Final = re.compile(r"dbpool-stats-(\d+)-(\d+)")


def on_starting(server: Any) -> None:
    """Make the directory for statistics, and remove those that dead masters left behind."""
    if os.environ.get(VARIABLE):
        return
    for parent in _candidates(server.cfg.worker_tmp_dir):
        _sweep(parent)
        path = parent / f"dbpool-stats-{os.getpid()}-{start_time(os.getpid())}"
        try:
            path.mkdir(mode=0o700)
            if (server.cfg.uid, server.cfg.gid) != (os.geteuid(), os.getegid()):
                os.chown(path, server.cfg.uid, server.cfg.gid)
        except OSError:
            continue
        os.environ[VARIABLE] = str(path)
        return
    server.log.warning("no directory for dbpool's statistics: each worker answers for itself")


def post_worker_init(worker: Any) -> None:
    """Let the pools of this worker be as large as it has threads, unless their size is set.

    Not by the environment, which would win over a `.env` and contradict a larger min_size.
    """
    for pool in list(pools):
        if "max_size" not in pool.settings.explicit:
            pool.resize(pool.min_size, max(pool.min_size, worker.cfg.threads))


def worker_exit(server: Any, worker: Any) -> None:
    """Close the pools of a worker that exits."""
    close_all(timeout=1.0)


def on_exit(server: Any) -> None:
    """Remove the directory that `on_starting` made."""
    path = Path(os.environ.get(VARIABLE, ""))
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) == os.getpid():
        shutil.rmtree(path, ignore_errors=True)


def _candidates(worker_tmp_dir: str | None) -> list[Path]:
    """Where the directory may be, memory first: a write to a disk can stall."""
    named = (worker_tmp_dir, "/dev/shm", tempfile.gettempdir())  # noqa: S108  # made 0700 inside
    return [Path(name) for name in named if name and os.access(name, os.W_OK | os.X_OK)]


def directories() -> list[Path]:
    """Return the directories for statistics of the masters that run now, and are this user's."""
    found = []
    for parent in _candidates(None):
        for path in parent.glob("dbpool-stats-*-*"):
            match = _NAME.fullmatch(path.name)
            if match and start_time(int(match[1])) == match[2] and os.access(path, os.R_OK):
                found.append(path)
    return found


def _sweep(parent: Path) -> None:
    for path in parent.glob("dbpool-stats-*-*"):
        match = _NAME.fullmatch(path.name)
        if match and start_time(int(match[1])) != match[2] and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
