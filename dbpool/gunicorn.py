"""Server hooks for gunicorn: `from dbpool.gunicorn import *` in a `gunicorn.conf.py`.

They make the directory through which the workers share their statistics, size the pools by what
their worker serves at once, publish a worker's statistics from its start, and close the pools
when it exits. A hook of your own with the same name takes the place of one of these; call the
one here from it.

The master imports this. It gets the standard library and `_files` from it, nothing else: what
the master imports is not reloaded, and comes before gevent patches the standard library.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os.path import samestat
from pathlib import Path
from typing import Any, Final, NamedTuple

from dbpool._files import STATS_DIR, LifeSign, is_held, start_time

__all__ = ["on_exit", "on_starting", "post_fork", "post_worker_init", "worker_exit"]

_NAME: Final = re.compile(r"dbpool-stats-\d+-[0-9a-f]{12}")
_LIFE_SIGN: Final = ".master"
_OURS: Final = frozenset({"dbpool", "dbpool.gunicorn", "dbpool._files"})
_THREADED: Final = frozenset({"gunicorn.workers.sync", "gunicorn.workers.gthread"})
_GREENLETS: Final = "gunicorn.workers.base_async"  # what gevent's and eventlet's are made of


class _Directory(NamedTuple):
    """The directory that a master made: it goes with the process *pid*, not with its children."""

    path: Path
    pid: int
    sign: LifeSign


_made: _Directory | None = None


def on_starting(server: Any) -> None:
    """Make the directory for statistics, and remove those that dead masters left behind.

    Without one each worker reports on itself alone, which is a warning.
    """
    global _made  # noqa: PLW0603  # there is one master in a process
    given = os.environ.pop(STATS_DIR, "")
    if given and not _NAME.fullmatch(Path(given).name):  # not another master's, before SIGUSR2
        os.environ[STATS_DIR] = given
        return
    failed: dict[str, str] = {}
    for parent in _parents(server.cfg.worker_tmp_dir):
        try:
            _sweep(parent, server.cfg.uid)
            _made = _make(parent, server.cfg.uid, server.cfg.gid)
        except OSError as ex:
            failed[str(parent)] = ex.strerror or str(ex)
        else:
            os.environ[STATS_DIR] = str(_made.path)
            return
    reasons = "; ".join(f"{parent}: {reason}" for parent, reason in failed.items())
    server.log.warning(
        "dbpool: no directory can be made for the statistics (%s), so that each worker reports on"
        " itself alone. Set worker_tmp_dir or DBPOOL_STATS_DIR to a writable one",
        reasons,
    )


def post_fork(server: Any, worker: Any) -> None:
    """Let the worker import dbpool anew, unless the master has imported more of it than this.

    After an upgrade or a change, a reload is then one of the whole library.
    """
    names = {name for name in sys.modules if name.partition(".")[0] == "dbpool"}
    if names <= _OURS:
        for name in names:
            del sys.modules[name]


def post_worker_init(worker: Any) -> None:
    """Size the pools by what the worker serves at once, and publish its statistics from now on.

    A `max_size` that is set stays. Else it is one more than the worker's threads, so that one of
    them can hold two connections. A worker that does not serve by threads, gevent's say, keeps
    the default. This is not done by the environment, which would win over a `.env`.

    The first worker then compares what all may open with what the servers allow: see
    `python -m dbpool plan`.
    """
    from dbpool import processes

    modules = {cls.__module__ for cls in type(worker).__mro__}
    threads = worker.cfg.threads
    if _GREENLETS not in modules and (threads > 1 or modules & _THREADED):
        _size(threads + 1)
    # Said once, not by each worker.
    if "gunicorn.workers.ggevent" in modules and worker.age == 1 and _is_patched_too_late():
        worker.log.warning(
            "dbpool: psycopg or dbpool was imported before gevent patched the standard library: a"
            " query stops a whole worker, and requests take connections from one another. Import"
            " the application in the workers alone (no preload_app), or call"
            " gevent.monkey.patch_all() at the top of gunicorn's configuration, before every"
            " other import"
        )
    processes.publish_from_the_start()
    if worker.age == 1:  # one worker asks for all
        check = threading.Thread(None, _check_sizes, "dbpool-sizes", (worker,), daemon=True)
        check.start()


def worker_exit(server: Any, worker: Any) -> None:
    """Close the pools of a worker that exits."""
    # gunicorn calls this in the master too, when it finds a worker gone.
    if os.getpid() != getattr(server, "pid", None):
        from dbpool._fork import close_all

        close_all(timeout=1.0)


def on_exit(server: Any) -> None:
    """Remove the directory that `on_starting` made."""
    if _made is not None and _made.pid == os.getpid():
        with suppress(OSError), _opened(_made.path) as fd:
            if samestat(os.stat(_LIFE_SIGN, dir_fd=fd), os.fstat(_made.sign.fd)):
                _empty(fd)
                _made.path.rmdir()
        _made.sign.close()


def directories() -> list[Path]:
    """Return the directories for statistics of the masters that run now, and are this user's.

    Those of masters in other containers only where none runs in this one.
    """
    parents = dict.fromkeys(_parents(None))
    paths = [path for parent in parents for path in _named(parent)]
    found = [path for path in paths if is_held(path / _LIFE_SIGN) and os.access(path, os.R_OK)]
    return [path for path in found if _is_of_a_process_here(path)] or found


def _parents(worker_tmp_dir: str | None) -> Iterator[Path]:
    """Where the directory may be, memory first: a write to a disk can stall."""
    if worker_tmp_dir:
        yield Path(worker_tmp_dir).absolute()
    yield Path("/dev/shm")  # noqa: S108  # made 0700 inside
    try:
        # Asked last, and only if need be: it tries to write, and fails without any /tmp.
        yield Path(tempfile.gettempdir())
    except OSError:
        return


def _named(parent: Path) -> list[Path]:
    try:
        return [path for path in parent.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:
        return []


def _is_of_a_process_here(path: Path) -> bool:
    pid = int(path.name.split("-")[2])
    try:
        return (path / _LIFE_SIGN).read_text() == start_time(pid)
    except OSError:
        return False


def _sweep(parent: Path, uid: int) -> None:
    """Remove what dead masters of this user left: directories with a life sign that nobody holds."""
    for path in _named(parent):
        with suppress(OSError), _opened(path) as fd:
            held = is_held(_LIFE_SIGN, dir_fd=fd)
            if os.fstat(fd).st_uid == uid and not held:
                if held is False:  # what has none is no master's, or empty
                    _empty(fd)
                path.rmdir()


def _make(parent: Path, uid: int, gid: int) -> _Directory:
    """Make a directory private to that user. It gets its name once its life sign is held."""
    new = Path(tempfile.mkdtemp(prefix=".dbpool-", dir=parent))
    with _opened(new) as fd:
        if os.fstat(fd).st_uid != os.geteuid() or os.listdir(fd):  # noqa: PTH208  # a descriptor
            raise PermissionError(errno.EPERM, "somebody else replaces files in it")
        try:
            sign = LifeSign(_LIFE_SIGN, dir_fd=fd)
            os.write(sign.fd, (start_time(os.getpid()) or "").encode())
            if (uid, gid) != (os.geteuid(), os.getegid()):
                os.fchown(sign.fd, uid, gid)
                os.fchown(fd, uid, gid)
            path = new.rename(parent / f"dbpool-stats-{os.getpid()}-{os.urandom(6).hex()}")
        except OSError:
            with suppress(OSError):
                _empty(fd)
                new.rmdir()
            raise
    return _Directory(path, os.getpid(), sign)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a directory of ours.

    It is used by its descriptor alone: the master may be root, and where its workers' user may
    write to the parent, that user can put another directory, or a link, under the name.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _empty(fd: int) -> None:
    """Remove the files of a directory, the life sign last: by that it is swept."""
    for name in sorted(os.listdir(fd), key=_LIFE_SIGN.__eq__):
        os.unlink(name, dir_fd=fd)


def _size(max_size: int) -> None:
    """Give the pools of this process that default, those also that are made later."""
    from dbpool import _fork

    def resize(pool: Any) -> None:
        settings = pool.settings
        if "max_size" not in settings.explicit and pool.max_size == settings.max_size:
            pool.resize(pool.min_size, max(pool.min_size, max_size))

    _fork.adapters[:] = [resize]
    for pool in list(_fork.pools):
        resize(pool)


def _check_sizes(worker: Any) -> None:
    """Warn if the pools of all workers may open more connections than their servers allow.

    Nothing waits for it, and it says nothing of a database that does not answer: its pool will.
    """
    from dbpool import _fork
    from dbpool.sizing import plan_connections

    plan = plan_connections(
        {
            pool.name: target
            for pool in list(_fork.pools)
            if (target := _sizing_target(pool, worker.cfg.workers)) is not None
        }
    )
    for verdict in plan.verdicts:
        if not verdict.fits:
            worker.log.warning("dbpool: %s", verdict.warning)


def _sizing_target(pool: Any, workers: int) -> Any:
    from dbpool.settings import variable
    from dbpool.sizing import Demand, Target

    settings = pool.settings
    try:
        conninfo, kwargs = (x() if callable(x) else x for x in (pool.conninfo, pool.kwargs))
        params = settings.connect_params(conninfo or None, kwargs)
    except Exception:  # noqa: BLE001  # the user's callables: the pool reports what they raise
        return None
    setting = variable("max_size", settings.name)
    demand = Demand(pool.name, workers, pool.max_size, setting)
    return Target(demand, params, settings.pooler == "transaction")


def _is_patched_too_late() -> bool:
    """Whether psycopg waits in C, or dbpool keeps per thread what greenlets must not share."""
    waiting, holders = map(sys.modules.get, ("psycopg.waiting", "dbpool.holders"))
    is_blocking = waiting is not None and waiting.wait is getattr(waiting, "wait_c", None)
    return is_blocking or (holders is not None and not isinstance(holders.here, threading.local))
