"""`plan`: do the configured connections fit, and how many does the load need?"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from dbpool.cli._configured import configured, params_of, seconds
from dbpool.cli._output import line
from dbpool.cli._running import statistics_directory
from dbpool.cli.top import read_running
from dbpool.errors import ConfigError
from dbpool.settings import Settings, variable
from dbpool.settings.app import AppSettings
from dbpool.sizing import (
    TARGET,
    ConnectionPlan,
    Demand,
    Measured,
    Target,
    Verdict,
    measure,
    plan_connections,
)

_NUMBER = re.compile("[0-9]{1,5}")
HELP = "say whether the configured connections fit, and how many the load needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_count,
        help="processes on each host (default: those that run, else WEB_CONCURRENCY, else 1)",
    )
    parser.add_argument("--hosts", type=_count, default=1, help="number of such hosts (default: 1)")
    parser.add_argument("--threads", type=_count, help="threads in each process that use a pool")
    parser.add_argument(
        "--for",
        dest="watch",
        type=seconds,
        default=30.0,
        metavar="TIME",
        help="how long to watch the application that runs here (default: 30s); 0 does not watch",
    )
    parser.add_argument("--dir", help="the directory of the statistics, as for stats")
    parser.add_argument("--app", help="the application to choose, if several share the directory")
    parser.add_argument("--json", action="store_true", help="report as JSON")


def run(arguments: argparse.Namespace) -> int:
    databases, dotenv = configured()
    monitors = arguments.hosts if AppSettings.from_env(dotenv=dotenv).blockers else 0
    reports = _watch(arguments)
    measured = {name: measure(*reports, name) for name in databases} if reports else {}
    running = max((each.processes for each in measured.values()), default=None)
    workers = arguments.workers or running or _web_concurrency()
    targets = {
        name: _target(
            settings, workers * arguments.hosts, _size(settings, measured, arguments), monitors
        )
        for name, settings in databases.items()
    }
    plan = plan_connections(targets)
    if arguments.json:
        print(json.dumps(_as_json(plan, measured, arguments.threads), indent=2))
    else:
        print(_as_text(plan, measured, arguments.threads))
    return 0 if plan.fits and not plan.unknown else 1


def _count(text: str) -> int:
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError("it must be a whole number from 1 to 10000")
    return int(text)


def _web_concurrency() -> int:
    try:
        return _count(os.environ.get("WEB_CONCURRENCY", "").strip() or "1")
    except argparse.ArgumentTypeError as ex:
        raise ConfigError(f"WEB_CONCURRENCY cannot be read: {ex}") from None


def _target(settings: Settings, processes: int, size: int, monitors: int) -> Target:
    is_pooled = settings.pooler == "transaction"  # the monitor does not ask through a pooler
    demand = Demand(
        settings.name,
        processes=processes,
        max_size=size,
        setting=variable("max_size", settings.name),
        monitors=0 if is_pooled else monitors,
    )
    return Target(demand, params_of(settings), is_pooled)


def _size(
    settings: Settings, measured: Mapping[str, Measured], arguments: argparse.Namespace
) -> int:
    """Return the max_size in effect: the running one, else the one set, else as the hooks do."""
    if (found := measured.get(settings.name)) and found.max_size:
        return found.max_size
    threads: int | None = arguments.threads
    if threads and "max_size" not in settings.explicit:
        return max(settings.min_size, threads + 1)
    return settings.max_size


def _watch(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the statistics before and after, None if no application runs."""
    directory = statistics_directory(arguments.dir) if arguments.watch else None
    if directory is None:
        return None
    try:
        before = read_running(str(directory), arguments.app)
    except ConfigError:
        if arguments.dir or arguments.app:
            raise
        return None
    if sys.stderr.isatty():
        print(f"dbpool: watching for {arguments.watch:g} s (--for)", file=sys.stderr)
    time.sleep(arguments.watch)
    return before, read_running(str(directory), arguments.app)


def _as_text(plan: ConnectionPlan, measured: Mapping[str, Measured], threads: int | None) -> str:
    lines = [
        text
        for verdict in plan.verdicts
        for text in (f"{'ok' if verdict.fits else 'too many'}: {verdict}", verdict.advice)
        if text
    ]
    lines += [f"unknown: {name}: {reason}" for name, reason in plan.unknown.items()]
    lines += [f"{name}: {load_text(each, threads)}" for name, each in measured.items()]
    return "\n".join(map(line, lines))


def load_text(found: Measured, threads: int | None) -> str:
    """Return one line: what is set, what the load needs, and what twice the load would need."""
    if found.load is None:
        return f"max_size is {found.max_size}; {found.reason}"
    least = "at least " if found.is_too_small else ""
    parts = [f"max_size is {found.max_size}, the load needs {least}{found.needs()}"]
    if threads is not None:
        parts.append(f"{threads} threads need {found.needs(threads)}")
    parts.append(f"twice the load needs {found.needs(threads, 2.0)}")
    return (
        f"{'; '.join(parts)} (95 % wait for less than {TARGET * 1000:.0f} ms; a process has"
        f" {found.load.rate:.3g} checkouts a second, each held for {found.load.hold * 1000:.3g} ms,"
        f" {found.load.busy:.2g} at once)"
    )


def _as_json(
    plan: ConnectionPlan, measured: Mapping[str, Measured], threads: int | None
) -> dict[str, Any]:
    return {
        "ok": plan.fits and not plan.unknown,
        "limits": [_limit_as_json(verdict) for verdict in plan.verdicts],
        "unknown": plan.unknown,
        "load": {name: _load_as_json(each, threads) for name, each in measured.items()},
    }


def _limit_as_json(verdict: Verdict) -> dict[str, Any]:
    limit = verdict.limit
    return {
        "ok": verdict.fits,
        "what": limit.what,
        "databases": [demand.database for demand in verdict.demands],
        "most": limit.most,
        "reserved": limit.reserved,
        "others": limit.others,
        "need": verdict.need,
        "need_in_deploy": verdict.need_in_deploy,
        "advice": verdict.advice or None,
    }


def _load_as_json(found: Measured, threads: int | None) -> dict[str, Any]:
    load = found.load
    return {
        "processes": found.processes,
        "max_size": found.max_size,
        "checkouts": found.checkouts,
        "seconds": round(found.seconds, 3),
        "reason": found.reason,
        "rate": load and load.rate,
        "hold": load and load.hold,
        "busy": load and load.busy,
        "needs": found.needs(),
        "threads_need": found.needs(threads) if threads else None,
        "twice_the_load_needs": found.needs(threads, 2.0),
    }
