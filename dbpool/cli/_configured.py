"""What the commands share: the configured databases, the warnings of reading them, durations."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dbpool.databases import databases_from_env
from dbpool.errors import ConfigError
from dbpool.settings import Settings
from dbpool.settings._parsing import parse_number
from dbpool.settings.app import find_dotenv

_used: Mapping[str, Settings] | None = None


@contextmanager
def using(databases: Mapping[str, Settings]) -> Iterator[None]:
    """Have the commands in the block use these settings in place of the environment's."""
    global _used  # noqa: PLW0603  # a process runs one command
    _used = databases
    try:
        yield
    finally:
        _used = None


def configured() -> tuple[dict[str, Settings], Mapping[str, str]]:
    """Return the settings of all databases, and the variables of the `.env`."""
    if _used is not None:
        return dict(_used), {}
    with warnings_printed():
        dotenv = find_dotenv()
        return databases_from_env(dotenv=dotenv), dotenv


@contextmanager
def warnings_printed() -> Iterator[None]:
    """Print the block's warnings on standard error; if it fails, its error alone."""
    collector, logger = _Collector(), logging.getLogger("dbpool")
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
    for text in collector.texts:
        if not text.startswith("unknown variable"):  # `check` reports those
            print(f"dbpool: warning: {text}", file=sys.stderr)


class _Collector(logging.Handler):
    """Keeps the texts of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def seconds(text: str) -> float:
    """Parse an argument such as `500ms` or `30s`."""
    try:
        return float(parse_number(text, "it"))
    except ConfigError as ex:
        raise argparse.ArgumentTypeError(str(ex)) from None
