"""What the commands share: the configured databases, warnings about their settings, durations."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dbpool.databases import databases_from_env
from dbpool.errors import ConfigError
from dbpool.settings import Settings
from dbpool.settings._parsing import parse_number
from dbpool.settings.app import find_dotenv

_used: Mapping[str, Settings] | None = None
_options: dict[str, Any] = {}


@contextmanager
def using(databases: Mapping[str, Settings], **options: Any) -> Iterator[None]:
    """Have the commands in the block use these settings in place of the environment's.

    *options* are those of `Pool` that are no settings, such as `kwargs`.
    """
    global _used, _options  # a process runs one command
    _used, _options = databases, options
    try:
        yield
    finally:
        _used, _options = None, {}


def pool_options() -> dict[str, Any]:
    """Return the options of the pools that are no settings."""
    return dict(_options)


def params_of(settings: Settings) -> dict[str, Any]:
    """Return the keywords that a pool of these settings connects with. Raises `ConfigError`."""
    try:
        kwargs = _options.get("kwargs")
        kwargs = kwargs() if callable(kwargs) else kwargs
    except Exception as ex:  # noqa: BLE001  # a user's callback may raise anything
        raise ConfigError(f"kwargs failed: {type(ex).__name__}") from None
    return settings.connect_params(None, kwargs)


def configured() -> tuple[dict[str, Settings], Mapping[str, str]]:
    """Return the settings of all databases, and the variables of the `.env`."""
    if _used is not None:
        return dict(_used), {}
    with warnings_printed():
        dotenv = find_dotenv()
        return databases_from_env(dotenv=dotenv), dotenv


@contextmanager
def warnings_printed() -> Iterator[None]:
    """Print the block's warnings on standard error, unless it raises: the error is enough then."""
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
