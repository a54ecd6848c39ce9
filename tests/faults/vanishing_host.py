"""A primary's packets are dropped and its standby is promoted, in a network namespace of its own.

Prints as JSON the seconds from the promotion to the first write, and the writers' errors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import closing

from dbpool import Pool
from tests.postgres import served, until
from tests.replication import SYNCHRONOUS, TABLE, Appends, append, check, make_standby, rows

PRIMARY_HOST = "127.0.0.2"  # so that its packets differ from the standby's
CONNECT_TIMEOUT = 2


def main() -> None:
    """Fail over once, and print the result."""
    _ip("link", "set", "lo", "up")
    with served(**SYNCHRONOUS, listen_addresses=f"127.0.0.1,{PRIMARY_HOST}") as primary:
        with (primary.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all postgres 127.0.0.0/8 trust\n")
        primary.execute("set synchronous_commit = local; " + TABLE)
        with closing(make_standby(primary)) as standby:
            conninfo = (
                f"host={PRIMARY_HOST},127.0.0.1 port={primary.port},{standby.port} user=postgres"
                " dbname=postgres target_session_attrs=read-write tcp_user_timeout=2000"
            )
            with Pool(conninfo, max_size=4, connect_timeout=CONNECT_TIMEOUT) as pool:
                appends = Appends(pool, call=append, idempotent=True, timeout=60)
                appends.await_more()
                _drop_packets_of(PRIMARY_HOST)
                until(lambda: pool.stats().counters.connect_failures > 0, 30.0)
                primary.power_off()
                standby.promote()
                promoted = time.monotonic()
                appends.await_more()
                history = appends.stop()
            found = check(history.outcomes, rows(standby.execute))
            result = {
                "seconds": history.first_after(promoted),
                "errors": [str(error) for error in history.errors],
                "wrong": found.lost + found.duplicated + found.unexpected,
            }
    sys.stdout.write(json.dumps(result) + "\n")


def _drop_packets_of(host: str) -> None:
    """Silently drop all packets that this address sends."""
    _ip("rule", "add", "pref", "10", "lookup", "local")
    _ip("rule", "del", "pref", "0")
    _ip("rule", "add", "pref", "5", "from", host, "blackhole")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


if __name__ == "__main__":
    main()
