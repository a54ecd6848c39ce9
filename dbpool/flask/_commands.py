"""`flask dbpool COMMAND`: the commands of `python -m dbpool`, for the databases of the application.

The entry point `flask.commands` names the group, so that Flask finds it once dbpool is installed.
"""

from __future__ import annotations

import logging
from typing import Any

import click
from flask import current_app
from flask.cli import with_appcontext

from dbpool.cli import commands, main
from dbpool.cli._configured import using
from dbpool.errors import ConfigError
from dbpool.flask._extension import state

_WITHOUT_APPLICATION = frozenset({"explain"})
_NEED_DIRECTORY = frozenset({"stats", "top"})


class _Commands(click.Group):
    """Loads the commands only when needed: Flask loads this group at each of its own commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = commands().get(cmd_name)
        return None if found is None else _command(cmd_name, found.HELP)


class _Command(click.Command):
    """Ends with one line if the settings are wrong: they are read while the application is made."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as ex:
            raise click.ClickException(str(ex)) from None


group = _Commands("dbpool", help="Test and watch the databases of the application.")


def _command(name: str, about: str) -> click.Command:
    """Make a command that passes on its arguments unchanged."""

    def call(arguments: tuple[str, ...]) -> None:
        logging.getLogger("dbpool").addHandler(logging.NullHandler())  # the report has it all
        if name in _WITHOUT_APPLICATION:
            raise SystemExit(main([name, *arguments]))
        try:
            own = state()
        except RuntimeError as ex:
            raise click.ClickException(str(ex)) from None
        pool = own.databases.default
        options = {"kwargs": pool.kwargs, "connection_class": pool.connection_class}
        with using({name: each.settings for name, each in own.databases.items()}, **options):
            raise SystemExit(main([name, *_directory(name), *arguments]))

    return _Command(
        name,
        callback=call if name in _WITHOUT_APPLICATION else with_appcontext(call),
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        help=about,
        short_help=about,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )


def _directory(name: str) -> list[str]:
    """Return the option that names the workers' directory, if the configuration sets one."""
    given = current_app.config.get("DBPOOL_STATS_DIR")
    return ["--dir", str(given)] if name in _NEED_DIRECTORY and given else []
