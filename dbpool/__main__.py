"""`python -m dbpool check | wait | stats`: for shells, containers and cron."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from time import monotonic
from typing import Any, Final, NoReturn

import psycopg

from dbpool._conninfo import already_set
from dbpool._dotenv import Source
from dbpool._secrets import MASK, mask, printable
from dbpool._values import did_you_mean, number, shown
from dbpool.app_settings import AppSettings, find_dotenv
from dbpool.databases import Databases, databases_from_env
from dbpool.errors import ConfigError, PoolError, describe
from dbpool.gunicorn import directories
from dbpool.health import Health
from dbpool.pool import Pool
from dbpool.processes import Processes
from dbpool.settings import SERVER_SIDE, Settings, unknown_variables

_EXPOSED: Final = (
    "the server is remote and sslmode is below verify-full: its identity is not checked"
)
_PAUSE: Final = 0.5  # seconds between two attempts of `wait`
# Fields that a connection string or libpq's variables can set too, and outdo.
_CLIENT_SIDE: Final = (
    "connect_timeout",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if all is well, 1 if not. Wrong usage exits with 2."""
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()
    except ConfigError as ex:
        return _fail(ex, as_json=arguments.json)
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:  # the reader had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _fail(reason: object, *, as_json: bool = False) -> int:
    if as_json:
        print(json.dumps({"ok": False, "error": str(reason)}, indent=2))
    print(f"dbpool: {_line(reason)}", file=sys.stderr)
    return 1


def _line(text: object) -> str:
    """On one line, what libpq spreads over several."""
    return printable(str(text))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Quote no password: somebody may have given a URL as an argument."""
        super().error(mask(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m dbpool", description="Try and watch the configured databases.")
    parser.set_defaults(json=False)
    commands = parser.add_subparsers(required=True, metavar="check | wait | stats")
    check = commands.add_parser("check", help="connect, and report what was found")
    check.add_argument("--json", action="store_true", help="report as JSON")
    check.add_argument("--strict", action="store_true", help="fail on unknown variables too")
    check.set_defaults(command=_check)
    wait = commands.add_parser("wait", help="wait until every database serves")
    wait.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="TIME", help="give up after (60s)"
    )
    wait.set_defaults(command=_wait)
    stats = commands.add_parser(
        "stats", help="print the statistics of the application that runs here, as JSON"
    )
    stats.add_argument("--dir", help="where they meet (DBPOOL_STATS_DIR, else it is looked for)")
    stats.add_argument(
        "--scope",
        choices=["all", "process"],
        default="all",
        help="process: make one connection and report on that",
    )
    stats.add_argument("--app", help="which application, if several share the directory")
    stats.set_defaults(command=_stats)
    return parser


def _seconds(text: str) -> float:
    try:
        return float(number(text, "it"))
    except ConfigError as ex:
        raise argparse.ArgumentTypeError(str(ex)) from None


class _Heard(logging.Handler):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Print on standard error what is warned of in the block; an error alone if it fails."""
    heard, logger = _Heard(), logging.getLogger("dbpool")
    logger.addHandler(heard)
    try:
        yield
    finally:
        logger.removeHandler(heard)
    for text in heard.texts:
        if not text.startswith("unknown variable"):  # `check` reports those
            print(f"dbpool: warning: {text}", file=sys.stderr)


def _configured() -> tuple[dict[str, Settings], Mapping[str, str]]:
    """Return the settings of all databases, and the variables of the `.env`."""
    with _warnings_shown():
        dotenv = find_dotenv()
        return databases_from_env(dotenv=dotenv), dotenv


# check


def _check(arguments: argparse.Namespace) -> int:
    databases, dotenv = _configured()
    unknown = unknown_variables(dotenv=dotenv)
    error = _error_beside(databases, dotenv)
    reports = {name: _report(settings) for name, settings in databases.items()}
    ok = all(report["ok"] for report in reports.values())
    ok = ok and error is None and not (arguments.strict and unknown)
    notes = [f"unknown variable {key}{did_you_mean(near)}" for key, near in unknown]
    if arguments.json:
        found = {"ok": ok, "error": error, "unknown": notes, "databases": reports}
        print(json.dumps(found, indent=2))
    else:
        for name, report in reports.items():
            print(_as_text(name, report))
        if error is not None:
            print(f"error: {error}")
        for note in notes:
            print(f"{'error' if arguments.strict else 'warning'}: {note}")
    return 0 if ok else 1


def _error_beside(databases: Mapping[str, Settings], dotenv: Source) -> str | None:
    """What is wrong with the settings of an application, beside those of its databases."""
    try:
        with _warnings_shown():
            Health(Databases(databases), AppSettings.from_env(dotenv=dotenv).required)
    except ConfigError as ex:
        return str(ex)
    return None


def _report(settings: Settings) -> dict[str, Any]:
    """Connect once as the pool would, and say what was found; no secret is in it."""
    effective = settings.masked()
    report: dict[str, Any] = {"ok": False, "settings": effective}
    conn: Any = None
    started = monotonic()
    pool = _single(settings)
    try:
        params = settings.connect_params()
        effective |= _in_effect(settings, params)
        if is_exposed(params, os.environ):
            report["warning"] = _EXPOSED
        with pool.connection() as conn:
            report["connect_seconds"] = round(monotonic() - started, 4)
            effective |= _enforced(conn)
            info = conn.info
            report |= {
                "ok": True,
                "host": info.host,
                "port": info.port,
                "database": info.dbname,
                "user": info.user,
                "server_version": info.parameter_status("server_version"),
                "tls": bool(conn.pgconn.ssl_in_use),
            }
    except (PoolError, ConfigError) as ex:
        report["error"] = describe(ex.__cause__ or ex)
        report["kind"] = getattr(ex, "kind", "conninfo")
    except psycopg.Error as ex:  # it served, and then broke off
        report |= {"ok": False, "error": describe(ex, conn)}
    finally:
        pool.close(timeout=0.1)  # a connect that hangs is not waited for
    return report


def _in_effect(settings: Settings, params: Mapping[str, Any]) -> dict[str, object]:
    """What differs from the settings because it is set elsewhere, or cannot be sent."""
    known = already_set(params, os.environ)
    found: dict[str, Any] = {
        key: int(known[key]) if str(known[key]).isdecimal() else MASK for key in _CLIENT_SIDE
    }
    if isinstance(found["tcp_user_timeout"], int):
        found["tcp_user_timeout"] /= 1000  # libpq counts milliseconds
    if settings.pooler == "transaction":
        found |= dict.fromkeys(SERVER_SIDE)
    return found


def _enforced(conn: psycopg.Connection[Any]) -> dict[str, object]:
    """The server's own word on its timeouts: roles, databases and `options` set them too."""
    query = "select name, setting::float8 / 1000 from pg_settings where name = any(%s)"
    seconds = dict(conn.execute(query, [list(SERVER_SIDE.values())]).fetchall())
    return {field: seconds.get(name) for field, name in SERVER_SIDE.items()}


def is_exposed(params: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """Whether a remote server's identity would go unchecked: below `sslmode=verify-full`.

    `sslrootcert=system` implies that.
    """
    known = already_set(params, environ)
    hosts = str(known.get("hostaddr") or known.get("host") or "").split(",")
    remote = [h for h in hosts if h and not h.startswith(("/", "@")) and not _is_loopback(h)]
    is_checked = known.get("sslmode") == "verify-full" or known.get("sslrootcert") == "system"
    return bool(remote) and not is_checked


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, which means what the resolver says: of these alone it is known
        return host.lower() in ("localhost", "ip6-localhost", "localhost.")


def _single(settings: Settings) -> Pool[Any]:
    """A pool of one connection."""
    return Pool(settings=replace(settings, min_size=0, max_size=1, leak_after=0))


def _as_text(name: str, report: Mapping[str, Any]) -> str:
    lines = [f"{name}: {'ok' if report['ok'] else 'failed'}"]
    shown = ("error", "kind", "warning", "host", "port", "database", "user", "server_version")
    found = [key for key in (*shown, "tls", "connect_seconds") if key in report]
    lines += [f"  {key.replace('_', ' ')}: {_line(report[key])}" for key in found]
    lines += [
        f"  {key} = {value}"
        for key, value in report["settings"].items()
        if value not in (None, "") and key != "name"
    ]
    return "\n".join(lines)


# wait


def _wait(arguments: argparse.Namespace) -> int:
    progress = _Progress()
    deadline = monotonic() + arguments.timeout
    for name, settings in _configured()[0].items():
        error = _wait_for(settings, deadline, progress)
        progress.clear()
        if error is not None:
            return _fail(f"{name} does not serve: {error}")
    return 0


def _wait_for(settings: Settings, deadline: float, progress: _Progress) -> str | None:
    """Try again and again, whatever is wrong, until it serves; return why it does not."""
    while True:
        left = deadline - monotonic()
        report = _report(replace(settings, timeout=max(0.1, min(5.0, left))))
        if report["ok"]:
            return None
        error = str(report["error"])
        if monotonic() + _PAUSE >= deadline:
            return error
        progress.show(f"waiting for {settings.name}: {error}")
        time.sleep(_PAUSE)


class _Progress:
    """One line on a terminal that is written anew; nothing elsewhere."""

    def __init__(self) -> None:
        self._started = monotonic()
        self._is_terminal = sys.stderr.isatty()

    def show(self, text: str) -> None:
        self._write(f"{monotonic() - self._started:3.0f} s  {_line(text)}"[: _width() - 1])

    def clear(self) -> None:
        self._write("")

    def _write(self, text: str) -> None:
        if self._is_terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _width() -> int:
    from shutil import get_terminal_size

    return get_terminal_size().columns


# stats


def _stats(arguments: argparse.Namespace) -> int:
    directory = _directory(arguments.dir) if arguments.scope == "all" else None
    report = _of_this_process() if directory is None else _survey(Path(directory), arguments.app)
    print(json.dumps(report, indent=2))
    return 0 if all(pool["state"] != "down" for pool in report["pools"].values()) else 1


def _directory(given: str | None) -> str | Path | None:
    """Where to look: as given or set, else where the one application that runs here has it."""
    if known := given or AppSettings.from_env(dotenv=find_dotenv()).stats_dir:
        return known
    found = directories()
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ConfigError(f"several applications run here: choose one with --dir: {names}")
    return found[0] if found else None


def _survey(directory: Path, app: str | None) -> dict[str, Any]:
    pattern, place = re.compile(r"(\w+)(?:-\d+)+\.json|(.+)\.archive"), shown(os.fspath(directory))
    matches = [pattern.fullmatch(path.name) for path in directory.glob("*")]
    apps = sorted({match[1] or match[2] for match in matches if match})
    if app is None and len(apps) > 1:
        raise ConfigError(
            f"several applications share {place}: choose one with --app {' or '.join(apps)}"
        )
    if not apps or (app is not None and app not in apps):
        raise ConfigError(f"{place} holds no statistics{f' of {app}' if app else ''}")
    report = Processes({}, directory, app or apps[0]).survey()
    if report is None:
        raise ConfigError(f"{place} is not a directory that is private to this user")
    return report


def _of_this_process() -> dict[str, Any]:
    """What a pool says after one connection: where no application runs, that is all there is."""
    small = {
        name: replace(settings, min_size=0, max_size=1, leak_after=0)
        for name, settings in _configured()[0].items()
    }
    with Databases(small) as databases:
        for pool in databases.values():
            try:
                pool.fetch_value("select 1")
            except psycopg.Error:
                continue  # its state says so
        return Processes(databases).report("process")


def script() -> None:
    """Run a command and exit, as `python -m dbpool` and the installed `dbpool` do."""
    # What goes wrong is in the report; the pools' own log lines would only repeat it.
    logging.getLogger("dbpool").addHandler(logging.NullHandler())
    logging.getLogger("dbpool").propagate = False
    sys.exit(main())


if __name__ == "__main__":
    script()
