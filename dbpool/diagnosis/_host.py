"""Findings about the server, the workers and the host as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from dbpool.diagnosis._finding import Finding, Severity, count, duration, ending
from dbpool.diagnosis._scene import PoolScene, Scene

_SILENT_AFTER: Final = 10.0  # seconds, or twice the interval of a process that has much to write
_MAX_AGE: Final = 6.0  # seconds, or a second more than that interval
_LAG: Final = 60.0
_CONFLICT: Final = (
    " The replay waits for long queries on the replica, up to max_standby_streaming_delay."
)
_DEATHS: Final = 3
_DEATH_WINDOW: Final = 300.0  # seconds
_STALL: Final = 5.0
_NEW: Final = 60.0  # seconds of a worker's life
_SPREAD: Final = 3.0  # seconds between the starts of workers that were started together


def over_configured(scene: Scene) -> Iterator[Finding]:
    """DB11: the workers together may want more connections than the server allows.

    A notice while some workers are new and others are not: those may be ending.
    """
    uptimes = [process.uptime for process in scene.processes] or [0.0]
    is_deploy = min(uptimes) < _NEW and max(uptimes) - min(uptimes) > _SPREAD
    for pool in scene.pools:
        facts = None if pool.view is None else pool.view.facts
        room = None if facts is None or pool.pooler else facts.room
        if pool.view is None or facts is None or room is None or pool.max_size <= room:
            continue
        yield Finding(
            "DB11", Severity.NOTICE if is_deploy else Severity.WARNING,
            pool=pool.name, since=pool.view.time,
            text=f"the pools {pool.name} of all workers may open {pool.max_size} connections"
            f" together, but the server allows {room}",
            do="Lower max_size or the number of workers, or put a pooler in front of the server.",
            evidence={
                "max_size": pool.max_size, "room": room, "max_connections": facts.max_connections,
                "reserved": facts.reserved, "role_limit": facts.role_limit,
                "database_limit": facts.database_limit,
            },
        )  # fmt: skip


def replica(pool: PoolScene) -> Finding | None:
    """DB13: the pool's server changed its role, or is a standby that is far behind."""
    view = pool.view
    facts = None if view is None else view.facts
    if view is None or facts is None:
        return None
    if view.role_before is not None:
        return Finding(
            "DB13", Severity.WARNING, pool=pool.name, since=view.role_changed_at or view.time,
            text=f"the server of {pool.name} was a {view.role_before} and is a {facts.role} now",
            do="If that was planned, do nothing. Otherwise check that the pool's connection"
            " settings name the right host; target_session_attrs keeps it to a role.",
            evidence={"role": facts.role, "role_before": view.role_before},
        )  # fmt: skip
    if facts.role != "standby":
        return None
    lag = facts.lag_seconds or 0.0
    if lag < _LAG:
        return None
    state = "is" if facts.is_streaming else "does not stream from its primary and is"
    return Finding(
        "DB13", Severity.WARNING, pool=pool.name, since=pool.now - lag,
        text=f"the replica of {pool.name} {state} {duration(lag)} behind",
        do="Look at pg_stat_wal_receiver on the replica and pg_stat_replication on the primary."
        + (_CONFLICT if facts.is_streaming else ""),
        evidence={"streaming": facts.is_streaming, "lag_seconds": facts.lag_seconds},
    )  # fmt: skip


def is_overdue(age: float, interval: float) -> bool:
    """Whether a process that publishes every *interval* seconds is silent, after *age* seconds."""
    return age > max(_SILENT_AFTER, 2 * interval)


def silent_workers(scene: Scene) -> Finding | None:
    """DB12: a worker lives but says nothing, while another does."""
    silent = [each for each in scene.processes if is_overdue(each.age, each.interval)]
    fresh = [each for each in scene.processes if each.age <= max(_MAX_AGE, each.interval + 1.0)]
    if scene.stalled > _STALL or (silent and not fresh):
        seconds = max(scene.stalled, *(each.age for each in silent), 0.0)
        return Finding(
            "DB12", Severity.NOTICE, since=scene.now - seconds, subject="host",
            text=f"the host stalled for {duration(seconds)}: no worker reported anything",
            do="A suspended or overloaded machine does this; so does a container without CPU.",
            evidence={"seconds": seconds, "workers": [each.pid for each in silent]},
        )  # fmt: skip
    if not silent:
        return None
    oldest = max(each.age for each in silent)
    pids = ", ".join(str(each.pid) for each in silent[:5])
    return Finding(
        "DB12", Severity.WARNING, since=scene.now - oldest,
        text=f"{count(len(silent), 'worker')} {'has' if len(silent) == 1 else 'have'} been silent"
        f" for {duration(oldest)} (pid {pids}), while others report",
        do="The process is stopped, or a thread of it holds the interpreter: py-spy dump shows where.",
        evidence={"workers": [each.pid for each in silent], "seconds": oldest},
    )  # fmt: skip


def dying_workers(scene: Scene) -> Finding | None:
    """DB16: workers end by a signal, with an error or without closing their pools, several times."""
    recent = [
        each for each in scene.deaths if scene.now - _DEATH_WINDOW <= each.time <= scene.now + 1.0
    ]
    if len(recent) < _DEATHS:
        return None
    causes = Counter(ending(each.code) for each in recent if each.code is not None)
    how = ", ".join(f"{number} {cause}" for cause, number in causes.most_common())
    return Finding(
        "DB16", Severity.CRITICAL, since=min(each.time for each in recent),
        text=f"{count(len(recent), 'worker')} died within five minutes"
        + (f": {how}" if how else " without closing their pools"),
        do=" ".join(_CAUSES[cause] for cause in causes if cause in _CAUSES) or _UNKNOWN_CAUSE,
        evidence={
            "deaths": len(recent), "times": sorted(each.time for each in recent)[-10:],
            "causes": dict(causes),
        },
    )  # fmt: skip


def are_timeouts(dying: Finding) -> bool:
    """Whether gunicorn's timeout ended all of these workers: their requests took too long."""
    return bool(dying.evidence["causes"] == {_TIMED_OUT: dying.evidence["deaths"]})


_TIMED_OUT: Final = "by SIGABRT"
_CAUSES: Final = {
    "by SIGKILL": "SIGKILL: the kernel ran out of memory (dmesg, the container's limit), or"
    " somebody killed the worker.",
    "by SIGSEGV": "SIGSEGV: a library in C crashed; PYTHONFAULTHANDLER=1 logs where.",
    _TIMED_OUT: "SIGABRT: gunicorn's timeout ended the worker, and its log names the connections"
    " that it held; or a library in C gave up.",
}
_UNKNOWN_CAUSE: Final = (
    "Read the server's log for the signal: SIGKILL usually means that the kernel ran out of memory"
    " (dmesg), SIGABRT is gunicorn's timeout, SIGSEGV a library in C."
)


def nothing_wrong(scene: Scene) -> Finding:
    """DB00: nothing is wrong here, with what is in use, and how many threads serve elsewhere."""
    parts = [
        f"{pool.name} has {pool.active} of {pool.max_size} connections in use, "
        + (f"{count(pool.waiting, 'caller')} waiting" if pool.waiting else "nobody waits")
        for pool in scene.pools[:5]
    ]
    known = [each for each in scene.processes if each.threads is not None and each.busy is not None]
    threads, busy = (sum(getattr(each, name) for each in known) for name in ("threads", "busy"))
    inside = sum(pool.active + pool.waiting for pool in scene.pools)
    elsewhere = min(threads, max(0, busy - inside))
    if elsewhere:
        verb = "is" if elsewhere == 1 else "are"
        parts.append(f"{elsewhere} of {count(threads, 'thread')} {verb} busy elsewhere")
    return Finding(
        "DB00", Severity.OK, since=scene.now,
        text="the pools are not the cause: " + "; ".join(parts)
        if scene.pools else "nothing is known yet: no process has reported a pool",
        do="If requests are slow, look at the code outside the database, at other services, and at"
        " what waits in front of the workers.",
        evidence={"pools": {p.name: {"in_use": p.active, "max_size": p.max_size}
                            for p in scene.pools[:20]},
                  "threads": threads if known else None, "busy": busy if known else None},
    )  # fmt: skip
