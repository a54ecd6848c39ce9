"""Server hooks for gunicorn: `from dbpool.gunicorn import *` in a `gunicorn.conf.py`.

They create the directory through which the workers share their statistics, size the pools by the
number of requests that a worker serves at once, publish a worker's statistics from its start, and
close the pools when it exits. A hook of your own replaces dbpool's hook of the same name, unless you
combine the two:

    from dbpool.gunicorn import *
    from dbpool.gunicorn import combined

    @combined
    def post_fork(server, worker): ...

The gunicorn master imports this module, and almost nothing else of dbpool, so that a reload brings
a new version of the library.
"""
# What the master imports is not reloaded, and comes before gevent patches the standard library:
# import only the standard library and `processes._directory` here.

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from dbpool.processes._directory import (
    DIRECTORY_NAME,
    EXITS,
    Directory,
    is_in_memory,
    leave_file,
    make_directory,
)
from dbpool.processes._files import STATS_DIR

# The hooks alone: `import *` is for a configuration. gunicorn ignores those that it does not know.
__all__ = [
    "child_exit", "dirty_worker_init", "on_exit", "on_starting", "post_fork", "post_worker_init",
    "worker_abort", "worker_exit",
]  # fmt: skip

_MASTER_MODULES: Final = frozenset({
    "dbpool", "dbpool.gunicorn", "dbpool.processes", "dbpool.processes._directory",
    "dbpool.processes._files",
})  # fmt: skip
_THREAD_WORKERS: Final = frozenset({"gunicorn.workers.sync", "gunicorn.workers.gthread"})
_GREENLET_WORKERS: Final = "gunicorn.workers.base_async"  # the base of gevent's and eventlet's


_SERVE: Final = "DBPOOL_SERVE"
_DOOR_SECONDS: Final = 2.0  # that the master waits for the end of the door

_LAST_HOOKS: Final = frozenset({"on_exit", "worker_abort", "worker_exit"})

_MAX_EXITS: Final = 20

_made: Directory | None = None
_exits: dict[int, int] = {}  # exit codes of workers by pid, below 0 a signal; none of 0
_door: subprocess.Popen[bytes] | None = None


def combined(hook: Callable[..., Any]) -> Callable[..., None]:
    """Return *hook* combined with dbpool's hook of the same name.

    dbpool's hook runs first. When a worker or the server ends, it runs last, because it closes what
    yours may still need. Raises `ValueError` if dbpool has no hook of that name.
    """
    name = hook.__name__
    if name not in __all__:
        raise ValueError(f"dbpool.gunicorn has no hook {name}: only {', '.join(__all__)}")
    ours: Callable[..., None] = globals()[name]
    first, last = (hook, ours) if name in _LAST_HOOKS else (ours, hook)

    @functools.wraps(hook)  # gunicorn counts its parameters
    def both(*args: Any) -> None:
        try:
            first(*args)
        finally:
            last(*args)

    return both


def on_starting(server: Any) -> None:
    """Create the directory for statistics, remove those of dead masters, and start the door.

    If no directory can be created, each worker reports only on itself, and a warning says so. The
    door starts only if `DBPOOL_SERVE` is set.
    """
    global _made  # noqa: PLW0603  # there is one master in a process
    given = os.environ.pop(STATS_DIR, "")
    if given and not DIRECTORY_NAME.fullmatch(
        Path(given).name
    ):  # not of the master that SIGUSR2 replaces
        os.environ[STATS_DIR] = given
        _warn_of_disk(server, given)
        _start_door(server)
        return
    try:
        _made = make_directory(server.cfg.worker_tmp_dir, server.cfg.uid, server.cfg.gid)
    except OSError as ex:
        server.log.warning(
            "dbpool: no directory can be made for the statistics (%s), so each worker reports only"
            " on itself. Set worker_tmp_dir or DBPOOL_STATS_DIR to a writable directory",
            ex,
        )
    else:
        os.environ[STATS_DIR] = str(_made.path)
        _warn_of_disk(server, str(_made.path))
    _start_door(server)


def post_fork(server: Any, worker: Any) -> None:
    """Let the worker import dbpool again, unless the master has imported more than this module.

    After an upgrade or a change, a reload then loads the whole library.
    """
    if _door is not None and _door.stdin is not None:
        _door.stdin.close()  # its end of file tells the door that the master is gone
    names = {name for name in sys.modules if name.partition(".")[0] == "dbpool"}
    if names <= _MASTER_MODULES:
        for name in names:
            del sys.modules[name]


def post_worker_init(worker: Any) -> None:
    """Size the pools by the worker's threads, and start publishing its statistics.

    A `max_size` that you have set stays. Otherwise it is one more than the worker's threads, so
    that one of them can hold two connections. A worker that does not use threads, such as
    gevent's, keeps the default.

    The first worker then compares what all workers may open with what the servers allow, as
    `python -m dbpool plan` does, and logs a warning if that is too much.
    """
    from dbpool._gevent import describe_late_patching
    from dbpool.monitor import watch_from_the_start
    from dbpool.processes import publish_from_the_start, set_threads

    modules = {cls.__module__ for cls in type(worker).__mro__}
    threads = worker.cfg.threads
    if _GREENLET_WORKERS not in modules and (threads > 1 or modules & _THREAD_WORKERS):
        _set_max_size(threads + 1)  # not by an environment variable: it would win over a .env
        set_threads(threads)
    late = describe_late_patching() if "gunicorn.workers.ggevent" in modules else ""
    if late and worker.age == 1:  # one worker warns for all
        worker.log.warning(
            "dbpool: %s. Import the application only in the workers (no preload_app), or call"
            " gevent.monkey.patch_all() at the top of gunicorn's configuration, before every"
            " other import",
            late,
        )
    publish_from_the_start()
    watch_from_the_start()
    if os.environ.get(_SERVE):  # the door answers "ready" only once the databases serve
        opening = threading.Thread(None, _open_pools, "dbpool-open", daemon=True)
        opening.start()
    if worker.age == 1:  # one worker asks for all
        check = threading.Thread(None, _check_sizes, "dbpool-sizes", (worker,), daemon=True)
        check.start()


def worker_abort(worker: Any) -> None:
    """Log which connections the worker held when gunicorn's timeout ended it."""
    if "dbpool.pool" not in sys.modules:  # there are no connections, and importing is too late
        return
    from dbpool.pool import _fork

    # gunicorn calls this in a signal handler: an error would be raised in the interrupted code.
    with suppress(Exception):
        for pool in _fork.list_pools():
            for holder in pool.holders():
                where = f"{holder.where}{f' ({holder.endpoint})' if holder.endpoint else ''}"
                worker.log.error(
                    "dbpool: the worker is aborted; thread %s held a connection of pool %r for %.1f s,"
                    " checked out at %s", holder.thread, pool.name, holder.seconds, where,
                )  # fmt: skip


def dirty_worker_init(worker: Any) -> None:
    """Do what `post_worker_init` does, for a dirty worker of gunicorn 25 and newer.

    gunicorn runs no hook when such a worker ends: close your pools in `DirtyApp.close`.
    """
    from dbpool.processes import publish_from_the_start

    _set_max_size(worker.cfg.dirty_threads + 1)
    publish_from_the_start()


def worker_exit(server: Any, worker: Any) -> None:
    """Close the pools of a worker that exits, and export what OpenTelemetry has recorded."""
    # gunicorn calls this in the master too, when it finds a worker gone.
    if os.getpid() != getattr(server, "pid", None):
        from dbpool import monitor
        from dbpool.pool._fork import close_all

        monitor.close_all()
        close_all(timeout=1.0)
        if (telemetry := sys.modules.get("dbpool.opentelemetry")) is not None:
            telemetry.flush()


def child_exit(server: Any, worker: Any) -> None:
    """Record the signal or exit code that ended a worker, for the diagnosis."""
    with suppress(Exception):  # the master has to go on
        # One that gunicorn's timeout aborts may go on to exit with 0.
        if code := -signal.SIGABRT if worker.aborted else _exit_code():
            _exits[worker.pid] = code
        elif _exits.pop(worker.pid, None) is None:  # of another worker that had this pid before
            return
        for pid in list(_exits)[:-_MAX_EXITS]:
            del _exits[pid]
        path = Path(os.environ[STATS_DIR]) / EXITS
        leave_file(path, json.dumps(_exits), server.cfg.uid, server.cfg.gid)


def _exit_code() -> int | None:
    """Return how the worker ended that gunicorn has waited for, None if that is not known.

    gunicorn tells no hook: its function that calls them has the status in a local variable.
    """
    frame = sys._getframe()
    while frame.f_code.co_name != "reap_workers":
        if frame.f_back is None:
            return None
        frame = frame.f_back
    status = frame.f_locals.get("status")
    return os.waitstatus_to_exitcode(status) if isinstance(status, int) else None


def on_exit(server: Any) -> None:
    """Stop the door, and remove the directory that `on_starting` created."""
    if _door is not None and _door.stdin is not None:
        with suppress(OSError, subprocess.TimeoutExpired):
            _door.stdin.close()
            _door.wait(_DOOR_SECONDS)
    if _made is not None:
        _made.remove()


def _warn_of_disk(server: Any, directory: str) -> None:
    """Say once if the statistics are not kept in memory: a disk that stalls makes them late."""
    if is_in_memory(Path(directory)) is False:
        server.log.info(
            "dbpool: %s is not in memory: each worker writes its statistics there once a second,"
            " up to 4 KiB a second. worker_tmp_dir = '/dev/shm' keeps them off the disk",
            directory,
        )


def _start_door(server: Any) -> None:
    """Start `python -m dbpool serve` on DBPOOL_SERVE, as the workers' user.

    The door inherits nothing from this process but a pipe; it ends when the pipe ends.
    """
    global _door  # noqa: PLW0603  # there is one master in a process
    if not os.environ.get(_SERVE) or not os.environ.get(STATS_DIR):
        return
    is_other_user = os.geteuid() == 0 and server.cfg.uid != 0
    account = {"user": server.cfg.uid, "group": server.cfg.gid, "extra_groups": []}
    timeout = max(30, server.cfg.timeout)
    try:
        _door = subprocess.Popen(
            [sys.executable, "-m", "dbpool.door._supervisor", f"--worker-timeout={timeout}"],
            stdin=subprocess.PIPE,
            start_new_session=True,
            **(account if is_other_user else {}),
        )
    except OSError as ex:
        server.log.warning("dbpool: DBPOOL_SERVE: the door cannot be started: %s", ex)


def _open_pools() -> None:
    """Open the pools of this worker before its first request."""
    from dbpool.pool import _fork

    for pool in _fork.list_pools():
        with suppress(Exception):  # it says so itself, in the log and at the first request
            pool.open()


def _set_max_size(max_size: int) -> None:
    """Make that the default max_size of this process's pools, also of those made later."""
    from dbpool.pool import _fork

    def resize(pool: Any) -> None:
        settings = pool.settings
        if "max_size" not in settings.explicit and pool.max_size == settings.max_size:
            pool.resize(pool.min_size, max(pool.min_size, max_size))

    _fork.on_new_pool[:] = [resize]
    for pool in _fork.list_pools():
        resize(pool)


def _check_sizes(worker: Any) -> None:
    """Warn if the pools of all workers may open more connections than their servers allow.

    Nothing waits for this, and it does not report a database that gives no answer: its pool will.
    """
    from dbpool.pool import _fork
    from dbpool.sizing import plan_connections

    plan = plan_connections(
        {
            f"{pool.name} {number}": target  # several may have one name
            for number, pool in enumerate(_fork.list_pools())
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
    is_pooled = settings.pooler == "transaction"  # the monitor does not ask through a pooler
    demand = Demand(pool.name, workers, pool.max_size, setting, monitors=int(not is_pooled))
    return Target(demand, params, is_pooled)
