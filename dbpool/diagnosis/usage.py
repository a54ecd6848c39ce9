"""Which endpoints have used a pool of late: sampled from who holds its connections. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dbpool.diagnosis._scene import PoolScene, Scene
from dbpool.diagnosis.endpoints import LONGEST, MAX_NAMES, OTHER, SHOWN

__all__ = ["Usage"]

_HALF_LIFE: Final = 300.0  # seconds after which what was seen counts half
_MAX_PAUSE: Final = 5.0  # seconds between two looks that a look stands for
_MAX_POOLS: Final = 256
_NEGLIGIBLE: Final = 1e-3


class _Use:
    """Weighted seconds that an endpoint held connections, and its longest hold that was seen."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.longest = 0.0


class Usage:
    """The use of each pool by endpoint, or by line of code where no endpoint is known.

    A look each second sees who holds a connection then; many looks show who holds how many on
    average. Unlike what is counted when a checkout ends, that shows those that never end.
    """

    def __init__(self) -> None:
        self._pools: dict[str, dict[str, _Use]] = {}
        self._weight = 0.0  # of all looks, in seconds
        self._at: float | None = None

    def look(self, report: Mapping[str, Any], now: float) -> None:
        """Take the next look, at *now* on the monotonic clock."""
        pause = 0.0 if self._at is None else min(max(0.0, now - self._at), _MAX_PAUSE)
        self._at = now
        kept = 0.5 ** (pause / _HALF_LIFE)
        self._weight = self._weight * kept + pause
        pools = Scene.read(report, now=0.0).pools[:_MAX_POOLS]
        self._pools = {pool.name: self._pools.get(pool.name, {}) for pool in pools}
        for pool in pools:
            self._pools[pool.name] = _seen(self._pools[pool.name], pool, pause, kept)

    def to_json(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the endpoints of each pool by name, `SHOWN` of them, the largest users first.

        `in_use` is a mean number of connections of the last minutes, `longest` the longest hold that
        was seen, in seconds.
        """
        return {name: self._shown(uses) for name, uses in self._pools.items()}

    def _shown(self, uses: Mapping[str, _Use]) -> dict[str, dict[str, float]]:
        weight = self._weight or 1.0
        ranked = sorted(uses.items(), key=lambda each: (-each[1].seconds, each[0]))
        return {
            name: {"in_use": round(use.seconds / weight, 3), "longest": float(f"{use.longest:.3g}")}
            for name, use in ranked[:SHOWN]
        }


def _seen(uses: dict[str, _Use], pool: PoolScene, pause: float, kept: float) -> dict[str, _Use]:
    for use in uses.values():
        use.seconds *= kept
    # The report names the longest holders; who the others are is not known.
    unknown = max(0, pool.active - len(pool.holders))
    held = [(holder.endpoint or holder.where or OTHER, holder.seconds) for holder in pool.holders]
    for name, seconds in [
        *[(name[:LONGEST], seconds) for name, seconds in held],
        *[(OTHER, 0.0)] * min(unknown, 10_000),
    ]:
        use = uses.get(name) or _added(uses, name)
        use.seconds += pause
        use.longest = max(use.longest, seconds)
    return {name: use for name, use in uses.items() if use.seconds > _NEGLIGIBLE or name == OTHER}


def _added(uses: dict[str, _Use], name: str) -> _Use:
    """Return a new endpoint's use; beyond so many all new ones are one."""
    is_full = len(uses) >= MAX_NAMES - (OTHER not in uses)
    return uses.setdefault(OTHER if is_full else name, _Use())
