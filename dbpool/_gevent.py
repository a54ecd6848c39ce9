"""Finds out whether gevent patched the standard library too late for psycopg and dbpool."""

from __future__ import annotations

import sys
import threading

_is_looked_for = False


def describe_late_patching() -> str:
    """Say what is wrong if gevent came too late, "" if not or if that was said in this process.

    psycopg then waits in C, or dbpool's thread-local state is shared by all greenlets.
    """
    global _is_looked_for  # noqa: PLW0603  # one warning is enough
    monkey = sys.modules.get("gevent.monkey")
    if _is_looked_for or monkey is None or not monkey.is_module_patched("select"):
        return ""
    _is_looked_for = True
    waiting, holders = map(sys.modules.get, ("psycopg.waiting", "dbpool.holders"))
    is_blocking = waiting is not None and waiting.wait is getattr(waiting, "wait_c", None)
    if not is_blocking and (holders is None or isinstance(holders.current, threading.local)):
        return ""
    return (
        "psycopg or dbpool was imported before gevent patched the standard library: a query blocks"
        " the whole process, and requests take connections from one another"
    )
