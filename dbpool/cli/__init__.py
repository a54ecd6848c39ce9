"""The commands of `python -m dbpool`: one module each, found by its name.

To add a command, add a module with the command's name: `HELP` is the line that `--help` shows,
`add_arguments` declares the options, `run` runs the command and returns the exit status. Modules
that begin with an underscore are not commands.
"""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from io import FileIO, TextIOWrapper
from typing import NoReturn, Protocol, TextIO, cast

from dbpool import __version__
from dbpool._secrets import mask
from dbpool.cli._output import fail
from dbpool.errors import ConfigError

__all__ = ["commands", "main", "script"]


class Command(Protocol):
    """What a command's module offers."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...
    def run(self, arguments: argparse.Namespace, /) -> int: ...


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with the message, but without a password: an argument may have been a URL."""
        super().error(mask(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if all is well, 1 if not. Wrong usage exits with 2."""
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except ConfigError as ex:
        return fail(ex, as_json=arguments.json)
    except KeyboardInterrupt:
        return 1
    except OSError as ex:
        if ex.filename is not None:  # it is not about standard output
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again
        return 1 if isinstance(ex, BrokenPipeError) else fail(f"cannot print: {ex.strerror}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dbpool", description="Test and watch the configured databases."
    )
    parser.set_defaults(json=False)
    parser.add_argument("--version", action="version", version=f"dbpool {__version__}")
    choices = parser.add_subparsers(required=True, metavar=" | ".join(commands()))
    for name, command in commands().items():
        chosen = choices.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(chosen)
        chosen.set_defaults(run=command.run)
    return parser


def commands() -> dict[str, Command]:
    """Return the modules of the commands, by name."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {
        name: cast("Command", import_module(f"{__name__}.{name}"))
        for name in sorted(names)
        if not name.startswith("_")
    }


def script() -> None:
    """Run a command and exit, as `python -m dbpool` and the installed `dbpool` do."""
    sys.stdout = _printing(sys.stdout)
    sys.stderr = _printing(sys.stderr)
    # Errors are in the report; the pools' own log lines would only repeat them.
    logging.getLogger("dbpool").addHandler(logging.NullHandler())
    logging.getLogger("dbpool").propagate = False
    sys.exit(main())


def _printing(stream: TextIO | None) -> TextIO:
    """Return a stream that can print any text, even if the process was started without one."""
    if stream is None:
        stream = TextIOWrapper(FileIO(os.devnull, "w"), encoding="utf-8")
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream
