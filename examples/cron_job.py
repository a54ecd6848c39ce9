"""A job for cron: DATABASE_URL=postgresql://… python examples/cron_job.py

It has its own timeouts, and waits if the server restarts. It does nothing while the previous run is
still going on. If it fails, it exits with status 1; for an error of the pool it prints the message,
for any other error a traceback.
"""

import sys
from typing import Any

from psycopg import Connection

import dbpool


def clean_up(conn: Connection[Any]) -> int | None:
    """Delete logins older than 30 days; return how many, or None if another run is doing it."""
    lock = conn.execute("select pg_try_advisory_xact_lock(hashtext('clean_up'))").fetchone()
    if lock != (True,):
        return None
    conn.execute("create table if not exists logins (at timestamptz default now())")
    return conn.execute("delete from logins where at < now() - interval '30 days'").rowcount


def main() -> int:
    """Run the job; return its exit status."""
    with dbpool.Pool(max_size=1, statement_timeout="10m", application_name="clean_up") as pool:
        deleted = pool.run(clean_up, timeout=60)  # the timeout lets it wait for an outage to end
    print("still running" if deleted is None else f"{deleted} deleted")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except dbpool.PoolError as error:
        sys.exit(f"clean_up: {error}")
