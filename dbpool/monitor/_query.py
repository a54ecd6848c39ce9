"""What a reader of `/stats` asks for: parts beside the pools, and how much of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

__all__ = ["INCLUDES", "Query"]

INCLUDES: Final = ("history", "journal", "endpoints", "workers", "servers", "settings")


@dataclass(frozen=True)
class Query:
    """The parameters of `/stats`.

    *include* names the parts. Of history and journal only what came after *since* is wanted, Unix
    time; of lists at most *limit* lines.
    """

    include: Collection[str] = ()
    since: float = 0.0
    limit: int | None = None

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Self:
        """Read them from an address; raise `ValueError` with what is wrong for a reader."""
        include = frozenset(filter(None, given.get("include", "").split(",")))
        if not include <= set(INCLUDES):
            raise ValueError(f"include is a list of {', '.join(INCLUDES)}")
        limit = given.get("limit", "")
        if limit and not (limit.isascii() and limit.isdecimal() and len(limit) < 6):
            raise ValueError("limit is a number of lines")
        return cls(include, _time(given.get("since") or "0"), int(limit) if limit else None)

    def trim(self, report: dict[str, Any]) -> dict[str, Any]:
        """Return a report without what is not wanted of its parts."""
        more: dict[str, Any] = {}
        if "history" in report and self.since:
            more["history"] = self._newer(report["history"])
        if "journal" in report:
            lines = [each for each in report["journal"] if each.get("time", 0.0) > self.since]
            more["journal"] = lines[: self.limit]
        for part in {"endpoints", "workers"} & report.keys():
            more[part] = {name: rows[: self.limit] for name, rows in report[part].items()}
        return report | more

    def _newer(self, history: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the last steps of each series, those that end after `since`."""
        wanted = max(0, math.ceil((history["until"] - self.since) / history["step"] - 0.1))
        pools = {
            name: {key: values[len(values) - min(wanted, len(values)) :] for key, values in each.items()}
            for name, each in history["pools"].items()
        }  # fmt: skip
        return {**history, "pools": pools}


def _time(text: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not 0.0 <= time < 1e12:
        raise ValueError("since is Unix time")
    return time
