"""What a reader of `/stats` asks for: additional parts, and how much of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

__all__ = ["INCLUDES", "Query"]

INCLUDES: Final = ("history", "journal", "endpoints", "workers", "servers", "settings")
_SINGLE: Final = ("scope", "since", "limit", "pool")  # which may be given once


@dataclass(frozen=True)
class Query:
    """The parameters of `/stats`; of `/metrics` only *scope*, "all" or "process".

    *include* names the parts. Of history and journal only what came after *since* is wanted, Unix
    time; of holders, journal and endpoints at most *limit* lines, and parts of *pool* alone.
    """

    include: Collection[str] = ()
    since: float = 0.0
    limit: int | None = None
    pool: str | None = None
    scope: str = "all"

    @classmethod
    def parse_all(cls, given: Mapping[str, Sequence[str]]) -> Self:
        """Read them from all values in a URL's query; the lists of several `include` add up."""
        for name in _SINGLE:
            if len(set(given.get(name, ()))) > 1:
                raise ValueError(f"{name} may be given once")
        return cls.parse({name: ",".join(dict.fromkeys(values)) for name, values in given.items()})

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Self:
        """Read them from a URL's query; raise `ValueError` with a message for the reader."""
        include = frozenset(filter(None, map(str.strip, given.get("include", "").split(","))))
        if not include <= set(INCLUDES):
            raise ValueError(f"include is a list of {', '.join(INCLUDES)}")
        limit = given.get("limit", "")
        if limit and not (limit.isascii() and limit.isdecimal() and len(limit) < 6):
            raise ValueError("limit is a number of lines")
        scope = given.get("scope", "all")
        if scope not in ("all", "process"):
            raise ValueError("scope is all or process")
        return cls(
            include,
            _time(given.get("since") or "0"),
            int(limit) if limit else None,
            given.get("pool"),
            scope,
        )

    def trim(self, report: dict[str, Any]) -> dict[str, Any]:
        """Return a report with only the wanted parts."""
        more: dict[str, Any] = {"pools": {k: self._cut(v) for k, v in report["pools"].items()}}
        if "history" in report:
            more["history"] = self._newer(report["history"])
        if "journal" in report:
            lines = [each for each in report["journal"] if each.get("time", 0.0) > self.since]
            more["journal"] = lines[: self.limit]
        if "endpoints" in report:
            used = self._wanted(report["endpoints"])
            more["endpoints"] = {name: rows[: self.limit] for name, rows in used.items()}
        if "workers" in report:
            more["workers"] = self._wanted(report["workers"])
        return report | more

    def _cut(self, pool: Mapping[str, Any]) -> dict[str, Any]:
        return {**pool, "holders": pool["holders"][: self.limit]}

    def _wanted(self, pools: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: each for name, each in pools.items() if self.pool in (None, name)}

    def _newer(self, history: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the last steps of each series, those that end after `since`."""
        wanted = max(0, math.ceil((history["until"] - self.since) / history["step"] - 0.1))
        pools = {
            name: {key: values[max(0, len(values) - wanted) :] for key, values in series.items()}
            for name, series in self._wanted(history["pools"]).items()
        }
        return {**history, "pools": pools, "minute": self._wanted(history["minute"])}


def _time(text: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not 0.0 <= time < 1e12:
        raise ValueError("since is Unix time")
    return time
