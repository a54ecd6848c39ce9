"""Findings from what happened over time: forgotten connections, size, churn, conflicts, slowness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dbpool.diagnosis._finding import Finding, Severity, are_few, count, duration
from dbpool.diagnosis._scene import PoolScene
from dbpool.diagnosis.history import STEP, Buckets, Step, median

_SHOWN: Final = 5  # endpoints in one finding
_MINUTE: Final = 12  # steps
_BAD_STEPS: Final = 6
_LONG_WAIT: Final = 0.1  # seconds
_BASELINE: Final = 12  # steps that are needed to know what is usual
_CHURN: Final = 0.2  # connects a checkout
_CONFLICTS: Final = 0.05  # retries a transaction
_MIN_CHECKOUTS: Final = 20  # checkouts that a share is taken of
_SLOWER: Final = 3.0  # times
_UNCHANGED: Final = 2.0
_NEGLIGIBLE: Final = {"use": 0.005, "connect": 0.05}  # seconds that nobody calls slow


def forgotten(pool: PoolScene) -> Finding | None:
    """DB06: connections were taken back at the end of a request, or collected as garbage."""
    number, since = pool.watch.forgotten, pool.watch.forgotten_since
    if not number or since is None:
        return None
    by = pool.watch.forgotten_by[:_SHOWN]
    places = ", ".join(f"{name} ({count(n, 'time')})" for name, n in by)
    code = places or f"the code that took {'it' if number == 1 else 'them'}"
    return Finding(
        "DB06",
        Severity.CRITICAL if pool.refused else Severity.WARNING,
        pool=pool.name, since=since,
        text=f"{count(number, 'connection')} of {pool.name} {'was' if number == 1 else 'were'} not"
        f" returned by {code}; the pool replaced {'it' if number == 1 else 'them'}",
        do="Use `with pool.connection()`. The log names where each was checked out.",
        evidence={
            "forgotten": number, "waiting": pool.waiting,
            "endpoints": [{"endpoint": name, "forgotten": n} for name, n in by],
        },
        is_minor=are_few(number, pool.max_size),
    )  # fmt: skip


def too_small(pool: PoolScene) -> Finding | None:
    """DB08: callers wait long at half of the last steps, while the work itself is not slower."""
    window = pool.steps[-_MINUTE:]
    bad = [n for n, step in enumerate(window) if step is not None and _is_crowded(step)]
    if len(bad) < _BAD_STEPS or max(bad) < len(window) - 2 or _is_slower(pool, "use", _UNCHANGED):
        return None
    steps = [step for n in bad if (step := window[n]) is not None]
    p95 = steps[0].wait.merge(*(step.wait for step in steps[1:])).quantile(0.95) or 0.0
    refused = sum(step.refused for step in steps)
    view = pool.last_view
    free = view.facts.free if view is not None and view.facts is not None else None
    lost = f", {count(refused, 'caller')} got none" if refused else ""
    is_usual = len(_usual(pool, "use")) >= _BASELINE
    work = "is as quick as before" if is_usual else "has no usual duration yet"
    return Finding(
        "DB08", Severity.CRITICAL if refused else Severity.WARNING, pool=pool.name,
        since=pool.now - STEP * (len(window) - bad[0]),
        text=f"{pool.name} is too small for its load: one caller in twenty waits {duration(p95)} or"
        f" longer for one of {count(pool.max_size, 'connection')}{lost}; the work itself {work}",
        do=_more(free),
        evidence={"wait_p95": p95, "refused": refused, "max_size": pool.max_size, "free": free},
    )  # fmt: skip


def _more(free: int | None) -> str:
    shorter = "hold connections for a shorter time, or cache what is asked for often"
    if free is None:
        return f"Raise max_size if the server has free connections; otherwise {shorter}."
    if free < 2:
        return f"The server has no connections to spare: {shorter}, or put a pooler in front of it."
    return f"Raise max_size: the server has {free} connections free. Or {shorter}."


def _is_crowded(step: Step) -> bool:
    return step.refused > 0 or (step.wait.quantile(0.95) or 0.0) > _LONG_WAIT


def churn(pool: PoolScene) -> Finding | None:
    """DB10: there is more than one connect in five checkouts, minute after minute."""
    steps = pool.known(_MINUTE)
    checkouts = sum(step.settled_checkouts for step in steps)
    connects = sum(step.settled_connects for step in steps)
    busy = sum(step.settled_connects > 0 for step in steps)
    # A restart makes many connects at once; churn goes on.
    if len(pool.steps) < _MINUTE or checkouts < _MIN_CHECKOUTS or busy < _BAD_STEPS:
        return None
    if connects <= _CHURN * checkouts:
        return None
    return Finding(
        "DB10", Severity.CRITICAL if pool.refused else Severity.WARNING,
        pool=pool.name, since=pool.now - STEP * _MINUTE,
        text=f"{pool.name} made {count(connects, 'connection')} for {checkouts} checkouts in a"
        " minute: connections are hardly ever reused",
        do="Look at what ends them, in the counters of discarded connections: expired and idle are"
        " max_lifetime and max_idle, dead is the server or the network, broken is the code that"
        " leaves them in a bad state. A pool per request or per thread does this too.",
        evidence={"connects": connects, "checkouts": checkouts},
    )  # fmt: skip


def conflicts(pool: PoolScene) -> Finding | None:
    """DB14: more than a transaction in twenty is run again."""
    steps = pool.known(_MINUTE)
    retries, checkouts = (sum(getattr(s, n) for s in steps) for n in ("retries", "checkouts"))
    busy = sum(step.retries > 0 for step in steps)
    if checkouts < _MIN_CHECKOUTS or retries <= _CONFLICTS * checkouts or busy < _BAD_STEPS:
        return None
    return Finding(
        "DB14", Severity.WARNING, pool=pool.name, since=pool.now - STEP * _MINUTE,
        text=f"{pool.name} ran {count(retries, 'transaction')} again, out of {checkouts} in a minute",
        do="Let transactions touch rows in the same order and be short; a lower isolation level or"
        " SELECT … FOR UPDATE may do.",
        evidence={"retries": retries, "checkouts": checkouts},
    )  # fmt: skip


def slower(pool: PoolScene) -> Finding | None:
    """DB18: using or making connections takes three times as long as usual."""
    for name, what in (("use", "a use of a connection"), ("connect", "a connect")):
        found = _is_slower(pool, name, _SLOWER)
        if found is None or found[0] < _NEGLIGIBLE[name]:
            continue
        now, usual = found
        everybody = pool.waiting > 0 and pool.is_stuck
        return Finding(
            "DB18", Severity.WARNING if everybody else Severity.NOTICE, pool=pool.name,
            since=pool.now - STEP * _BAD_STEPS,
            text=f"{pool.name} is slower than usual: {what} takes up to {duration(now)} (p95),"
            f" usually {duration(usual)}",
            do="Look at the server's load, its disks, and what else runs there now (vacuum, backup,"
            " a plan that changed).",
            evidence={"what": name, "p95": now, "usual_p95": usual},
        )  # fmt: skip
    return None


def _is_slower(pool: PoolScene, name: str, factor: float) -> tuple[float, float] | None:
    """Return the p95 of the last half minute and the usual one, if it is that many times larger.

    The mean has to have risen too: one bucket is half a decade wide.
    """
    recent = [getattr(s, name) for s in pool.known(_BAD_STEPS) if getattr(s, name).count]
    before = _usual(pool, name)
    if 2 * len(recent) < _BAD_STEPS or len(before) < _BASELINE:
        return None
    now = recent[0].merge(*recent[1:])
    usual_p95 = median([each.quantile(0.95) or 0.0 for each in before]) or 0.0
    usual_mean = median([each.mean or 0.0 for each in before]) or 0.0
    p95, mean = now.quantile(0.95) or 0.0, now.mean or 0.0
    has_risen = p95 > factor * usual_p95 and mean > min(factor, _UNCHANGED) * usual_mean
    steady = _share_above(recent, usual_p95 * factor)
    return (p95, usual_p95) if has_risen and steady >= 0.5 else None


def _usual(pool: PoolScene, name: str) -> list[Buckets]:
    """Return the times of the steps before the last half minute."""
    return [getattr(s, name) for s in pool.steps[:-_BAD_STEPS] if s and getattr(s, name).count]


def _share_above(parts: Sequence[object], bound: float) -> float:
    above = sum((part.quantile(0.95) or 0.0) > bound for part in parts)  # type: ignore[attr-defined]
    return above / len(parts)
