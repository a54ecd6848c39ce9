"""A job for cron: DATABASE_URL=postgresql://… python examples/cron_job.py

It has limits of its own, waits for a restart of the server to end, does nothing while its last run
is still going on, and ends with status 1 and one line if it failed.
"""

import sys
from typing import Any

from psycopg import Connection

import dbpool


def clean_up(conn: Connection[Any]) -> int | None:
    """Delete what is older than a month; return how many rows, None if another run does it now."""
    lock = conn.execute("select pg_try_advisory_xact_lock(hashtext('clean_up'))").fetchone()
    if lock != (True,):
        return None
    conn.execute("create table if not exists logins (at timestamptz default now())")
    return conn.execute("delete from logins where at < now() - interval '30 days'").rowcount


def main() -> int:
    """Run the job; return its exit status."""
    with dbpool.Pool(max_size=1, statement_timeout="10m", application_name="clean_up") as pool:
        deleted = pool.run(clean_up, timeout=60)  # with a timeout it waits for an outage to end
    print("still running" if deleted is None else f"{deleted} deleted")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except dbpool.PoolError as error:
        sys.exit(f"clean_up: {error}")
