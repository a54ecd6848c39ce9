"""`serve`: serve page, statistics, metrics and health of the application that runs here."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Final

from dbpool.cli._configured import seconds
from dbpool.cli._output import fail
from dbpool.cli._running import find_processes, running_directory
from dbpool.door import WRONG_SETTINGS
from dbpool.door._server import Door, is_private, parse_address, wait_until
from dbpool.door._views import Views
from dbpool.errors import ConfigError
from dbpool.processes import Processes
from dbpool.settings.app import AppSettings, find_dotenv

HELP = "serve the page, the statistics, the metrics and the health from this process"

_LAST_WORKERS: Final = 40.0  # seconds that workers may live on without their master


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", nargs="?", help="127.0.0.1:8900 or unix:PATH (DBPOOL_SERVE)")
    parser.add_argument(
        "--dir", help="the directory of the statistics (DBPOOL_STATS_DIR, else a search)"
    )
    parser.add_argument("--app", help="the application to choose, if several share the directory")
    parser.add_argument(
        "--worker-timeout", type=seconds, default=30.0, metavar="TIME",
        help="liveness fails if no worker has reported for this long (at least 30)",
    )  # fmt: skip
    parser.add_argument("--until-eof", action="store_true", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    try:
        return _serve(arguments)
    except ConfigError as ex:
        status = fail(ex)
        return WRONG_SETTINGS if arguments.until_eof else status


def _serve(arguments: argparse.Namespace) -> int:
    settings = AppSettings.from_env(dotenv=find_dotenv())
    text = arguments.address or settings.serve
    if not text:
        raise ConfigError("no address: use python -m dbpool serve 127.0.0.1:8900 or DBPOOL_SERVE")
    address = parse_address(text)
    if settings.details == "always" and not is_private(address):
        raise ConfigError(
            f"DBPOOL_DETAILS=always would show all details to everybody who reaches {text}:"
            " set DBPOOL_TOKEN instead, or listen on 127.0.0.1"
        )
    _log_to_stderr()
    known = arguments.dir or settings.stats_dir
    views = Views(settings, lambda: _find(known, arguments.app), arguments.worker_timeout)
    door = Door(address, views)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop_soon(door, stop))
    if arguments.until_eof:  # otherwise a person started this command
        threading.Thread(None, _stop_at_eof, "dbpool-eof", (door, views, stop), daemon=True).start()
    door.run(lambda: None if arguments.until_eof else _announce(text, door.address))
    return 0


def _announce(text: str, address: Any) -> None:
    where = f"{text[:-1]}{address[1]}" if text.endswith(":0") else text  # any free port
    print(f"dbpool: page, stats, metrics and health on {where}", file=sys.stderr, flush=True)


def _find(known: str | None, app: str | None) -> Processes:
    """Return the processes of the application that runs now: it may have been restarted."""
    directory = known or running_directory()
    if directory is None:
        raise ConfigError("no application that shares its statistics runs here")
    return find_processes(Path(directory), app)


def _stop_soon(door: Door, stop: threading.Event) -> None:
    """Stop from a signal handler, which runs in the serving thread and must not wait for it."""
    stop.set()
    threading.Thread(None, door.stop, "dbpool-stop", daemon=True).start()


def _stop_at_eof(door: Door, views: Views, stop: threading.Event) -> None:
    """Stop once the process that started this one and the last worker are gone."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    wait_until(views.is_deserted, _LAST_WORKERS, stop)
    door.stop()


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s")
    )
    logging.getLogger("dbpool").addHandler(handler)
