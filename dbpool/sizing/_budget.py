"""Whether the connections that pools may open fit into what their servers allow: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

DEPLOY: Final = 2  # during a deploy the old processes still run beside the new ones


@dataclass(frozen=True)
class Demand:
    """What one database's pools may open: *processes* of *max_size* each, on all hosts together.

    *monitors* are connections beside the pools: on each host, one may ask who blocks whom.
    """

    database: str
    processes: int
    max_size: int
    setting: str  # the variable that sets max_size
    in_deploy: int = DEPLOY  # how many times as many there are during a deploy
    monitors: int = 0

    @property
    def most(self) -> int:
        """Return how many connections that is, outside a deploy."""
        return self.processes * self.max_size + self.monitors

    @property
    def most_in_deploy(self) -> int:
        """Return how many connections that is during a deploy."""
        return self.most * self.in_deploy

    def __str__(self) -> str:
        monitors = f" + {self.monitors}" if self.monitors else ""
        return f"{self.processes} x {self.max_size}{monitors} ({self.database})"


@dataclass(frozen=True)
class Limit:
    """The limit of a server, a role, a database or a pooler, which allows *most* connections.

    *reserved* of them are not for ordinary roles, *others* are in use by somebody else.
    """

    what: str
    setting: str  # what raises it
    most: int
    reserved: int = 0
    others: int = 0

    @property
    def room(self) -> int:
        """Return what is left for the pools."""
        return max(0, self.most - self.reserved - self.others)


@dataclass(frozen=True)
class Verdict:
    """One limit and the pools under it."""

    limit: Limit
    demands: Sequence[Demand]

    @property
    def need(self) -> int:
        """Return how many connections all of them may open."""
        return sum(demand.most for demand in self.demands)

    @property
    def need_in_deploy(self) -> int:
        """Return the same during a deploy."""
        return sum(demand.most_in_deploy for demand in self.demands)

    @property
    def fits(self) -> bool:
        """Whether the limit is high enough, during a deploy too."""
        return self.need_in_deploy <= self.limit.room

    @property
    def advice(self) -> str:
        """Return what to change, with the numbers; empty if all is well."""
        if self.fits:
            return ""
        room = self.limit.room - sum(d.monitors * d.in_deploy for d in self.demands)
        largest = room // sum(d.processes * d.in_deploy for d in self.demands)
        enough = self.limit.reserved + self.limit.others + self.need_in_deploy
        names = " and ".join(dict.fromkeys(demand.setting for demand in self.demands))
        raise_it = f"raise {self.limit.setting} to {enough}"
        if largest < 1:
            return f"run fewer processes, {raise_it}, or put a pooler in front of it"
        return f"set {names} to {largest}, or {raise_it}"

    def __str__(self) -> str:
        parts = " + ".join(map(str, self.demands))
        taken = [
            f"{number} {words}"
            for number, words in (
                (self.limit.reserved, "reserved"),
                (self.limit.others, "in use by others"),
            )
            if number
        ]
        less = f" ({self.limit.most}, minus {' and '.join(taken)})" if taken else ""
        return (
            f"{self.limit.what} allows {self.limit.room} connections{less}; the pools may open"
            f" {parts} = {self.need}, or {self.need_in_deploy} during a deploy"
        )

    @property
    def warning(self) -> str:
        """Return one line for a log: what does not fit, the numbers, and what to change."""
        when = "" if self.need > self.limit.room else " during a deploy"
        return f"more connections are configured than fit{when}: {self}. To fix it, {self.advice}"


def evaluate(pairs: Iterable[tuple[Limit, Sequence[Demand]]]) -> list[Verdict]:
    """Compare each limit with the pools under it, the tightest first."""
    verdicts = [Verdict(limit, demands) for limit, demands in pairs]
    return sorted(verdicts, key=lambda v: v.limit.room - v.need_in_deploy)
