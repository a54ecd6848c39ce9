"""The tables of the sample application, made by `make run` or by `python -m webapp.schema`."""

from __future__ import annotations

import logging
import sys

import psycopg

from dbpool import ConfigError, Pool, Settings
from webapp import dotenv

STATEMENTS = """
create table if not exists notes (
    id bigint generated always as identity primary key,
    title text not null,
    body text not null default '',
    version bigint not null default 1,
    created timestamptz not null default now(),
    updated timestamptz not null default now()
)
"""
# `if not exists` does not protect against two at once. The number of the lock is arbitrary.
LOCK = "select pg_advisory_xact_lock(7262810)"


def create(pool: Pool) -> None:
    """Create the tables that are missing."""
    with pool.connection() as conn:
        conn.execute(LOCK)
        # A role may be allowed to use these tables but not to create them.
        if conn.execute("select to_regclass('notes')").fetchone() == (None,):
            conn.execute(STATEMENTS)


def create_configured() -> None:
    """Create the tables in the database that the environment, or the checkout's `.env`, names."""
    with Pool(settings=Settings.from_env(dotenv=dotenv(), min_size=1, max_size=1)) as pool:
        create(pool)


if __name__ == "__main__":
    logging.getLogger("dbpool").addHandler(logging.NullHandler())  # errors are printed below, once
    logging.getLogger("dbpool").propagate = False
    try:
        create_configured()
    except (ConfigError, psycopg.Error) as exc:
        sys.exit(f"webapp: {' '.join(str(exc).split())}")
