"""Sizes: do the configured connections fit, and how many does the load need?

`plan_connections` asks the servers. All arithmetic is in pure functions, in the other modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg

from dbpool._secrets import conceal
from dbpool.errors import ConfigError, describe
from dbpool.sizing._budget import Demand, Limit, Verdict, evaluate
from dbpool.sizing._load import Measured, measure
from dbpool.sizing._pooler import CONSOLE, PoolerLimits, behind, client_limits, read_pooler_limits
from dbpool.sizing._queueing import TARGET, Load, connections_needed
from dbpool.sizing._server import ServerLimits, read_server_limits, server_limits

__all__ = [
    "TARGET",
    "ConnectionPlan",
    "Demand",
    "Limit",
    "Load",
    "Measured",
    "Target",
    "Verdict",
    "connections_needed",
    "measure",
    "plan_connections",
]


class Target(NamedTuple):
    """A database's demand, and the parameters to connect with (`Settings.connect_params`)."""

    demand: Demand
    params: Mapping[str, Any]
    is_pooled: bool = False  # whether PgBouncer is in front of the server


@dataclass(frozen=True)
class ConnectionPlan:
    """Which limits fit and which do not, the tightest first; and which databases gave no answer."""

    verdicts: list[Verdict]
    unknown: dict[str, str]  # by database, why

    @property
    def fits(self) -> bool:
        """Whether every known limit is high enough, during a deploy too."""
        return all(verdict.fits for verdict in self.verdicts)


def plan_connections(targets: Mapping[str, Target]) -> ConnectionPlan:
    """Compare what the pools may open with what their servers allow.

    This opens and closes one connection to each database, and one to PgBouncer's console. A server
    that cannot be asked is left out and listed in `unknown`.
    """
    seen: list[tuple[Demand, ServerLimits]] = []
    pooled: list[tuple[Demand, PoolerLimits]] = []
    unknown: dict[str, str] = {}
    for name, (demand, params, is_pooled) in targets.items():
        try:
            server = _ask_server(params)
            if not is_pooled:
                seen.append((demand, server))
                continue
            pooler = _ask_pooler(params, server)
            pooled.append((demand, pooler))
            seen.append((behind(demand, pooler), server))
        except _NoConsoleError as ex:
            unknown[name] = str(ex)
        except (psycopg.Error, ConfigError, UnicodeError) as ex:  # of a host that is no name
            unknown[name] = describe(ex)
    return ConnectionPlan(evaluate([*client_limits(pooled), *server_limits(seen)]), unknown)


def _ask_server(params: Mapping[str, Any]) -> ServerLimits:
    with _connect(params) as conn:
        return read_server_limits(conn)


class _NoConsoleError(Exception):
    pass


def _ask_pooler(params: Mapping[str, Any], server: ServerLimits) -> PoolerLimits:
    # PgBouncer knows database and role by the client's names, not by the server's.
    try:
        with _connect({**params, "dbname": CONSOLE}) as console:
            database = str(params.get("dbname") or server.database)
            role = console.info.user
            return read_pooler_limits(console, database, role, server.application)
    except (psycopg.Error, KeyError) as ex:
        raise _NoConsoleError(
            "PgBouncer's sizes are unknown: its console does not answer this role (add it to"
            f" stats_users): {describe(ex)}"
        ) from None


def _connect(params: Mapping[str, Any]) -> psycopg.Connection[Any]:
    return psycopg.connect(**conceal({**params, "autocommit": True}))
