"""What is wrong, since when, whose code it is, and what to do: the database, the pool, or neither.

Pure functions: `diagnose` takes a `Scene`, which is a report as `/stats` shows it beside what
happened over time and what the server said, and returns findings, the right one first. Nothing
here talks to a database, reads a file or keeps a thread; `dbpool.diagnosis.monitor` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from dbpool.diagnosis import _connecting, _holding, _host, _locks, _trends
from dbpool.diagnosis._finding import CODES, Finding, Severity, ordered, suspicions
from dbpool.diagnosis._scene import Death, Holder, PoolScene, Process, Run, Scene, Watch
from dbpool.diagnosis._server_view import Prepared, ServerFacts, ServerView, Session

__all__ = [
    "CODES", "Death", "Finding", "Holder", "PoolScene", "Prepared", "Process", "Run", "Scene",
    "ServerFacts", "ServerView", "Session", "Severity", "Watch", "diagnose", "suspicions",
]  # fmt: skip

# What is wrong with one pool: causes before their effects.
_RULES: Final[tuple[Callable[[PoolScene], Finding | None], ...]] = (
    _connecting.connecting,
    _locks.waiting_for_lock,
    _holding.nested,
    _trends.forgotten,
    _holding.held_unused,
    _holding.idle_in_transaction,
    _holding.slow_statements,
    _trends.too_small,
    _trends.churn,
    _trends.conflicts,
    _trends.slower,
    _host.replica,
)
_SILENCE: Final = 2.0  # seconds
_CANNOT_CONNECT: Final = frozenset({"DB01", "DB02", "DB03", "DB17"})
_LASTING: Final = 5.0  # seconds
_HANGING: Final = frozenset({"DB01", "DB04", "DB05", "DB07", "DB09", "DB15"})
# What each of these may be an effect of. It is then left out: one look names the cause.
_EFFECTS: Final[Mapping[str, frozenset[str]]] = MappingProxyType({
    "DB05": frozenset({"DB01", "DB02", "DB04", "DB09", "DB15"}),
    "DB06": frozenset({"DB01", "DB02"}),
    "DB07": frozenset({"DB01", "DB02", "DB04"}),
    "DB08": frozenset({"DB04", "DB05", "DB06", "DB07", "DB09", "DB10", "DB15"}) | _CANNOT_CONNECT,
    "DB09": _CANNOT_CONNECT,
    "DB10": frozenset({"DB06"}) | _CANNOT_CONNECT,
    "DB15": frozenset({"DB04", "DB09"}) | _CANNOT_CONNECT,
    "DB18": frozenset({"DB04", "DB05", "DB07", "DB09", "DB15"}) | _CANNOT_CONNECT,
})  # fmt: skip


def diagnose(scene: Scene) -> tuple[Finding, ...]:
    """Return the findings, the worst and oldest first; only DB00 if nothing is wrong."""
    found = [finding for pool in scene.pools for finding in _of_pool(pool)]
    dying = _host.dying_workers(scene)
    if dying is not None and _host.are_timeouts(dying):
        hanging = [finding for finding in found if _is_hanging(finding, scene.now)]
        found = [_critical(finding) if finding in hanging else finding for finding in found]
        dying = replace(dying, severity=Severity.WARNING if hanging else dying.severity)
    whole = (_host.silent_workers(scene), dying, *_host.over_configured(scene))
    found += [finding for finding in whole if finding is not None]
    if not any(finding.severity in (Severity.WARNING, Severity.CRITICAL) for finding in found):
        found.append(_host.nothing_wrong(scene))
    return ordered(found)


def _of_pool(pool: PoolScene) -> Iterator[Finding]:
    found = {finding.code: finding for rule in _RULES if (finding := rule(pool)) is not None}
    # A single transaction that stays open is to blame, not the code of all who come and go.
    if {"DB05", "DB15"} <= found.keys() and not _holding.has_turnover(pool):
        del found["DB15"]
    # What a server said of locks before it stopped answering is no longer so.
    if {"DB01", "DB04"} <= found.keys() and _is_over(pool, found["DB01"]):
        del found["DB04"]
    causes = {code for code, finding in found.items() if not finding.is_minor}
    for code, finding in found.items():
        if causes.isdisjoint(_EFFECTS.get(code, ())):
            yield finding


def _is_hanging(finding: Finding, now: float) -> bool:
    """Whether requests hang for so long that gunicorn's timeout may end their workers."""
    is_bad = finding.severity is Severity.CRITICAL or now - finding.since >= _LASTING
    return finding.code in _HANGING and is_bad


def _critical(finding: Finding) -> Finding:
    return replace(finding, severity=Severity.CRITICAL)


def _is_over(pool: PoolScene, down: Finding) -> bool:
    """Whether the server has said nothing since it is down; a look at it may just take long."""
    is_sure = down.evidence["error"] is not None or pool.now - down.since >= _SILENCE
    return is_sure and (pool.view is None or pool.view.time <= down.since)
