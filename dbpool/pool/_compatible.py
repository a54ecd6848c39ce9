"""What the pool needs of psycopg and psycopg_pool beyond their public interface.

A newer version is judged by the names and parameters that are there, not by its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from inspect import getmembers, isroutine
from pkgutil import resolve_name
from typing import Any, Final

import psycopg
import psycopg_pool

from dbpool._secrets import read_lines

# By class: attributes, and methods with the parameters that they are called with.
_TABLE: Final = (line.partition(": ") for line in read_lines(__package__, "needed.txt"))
NEEDED: Final[dict[type, str]] = {resolve_name(name): needed for name, _, needed in _TABLE}

# By module: names.
MODULES: Final = {
    "psycopg.generators": "execute fetch send",
    "psycopg.errors": "error_from_result",
    "psycopg._preparing": "Prepare",
    "psycopg_pool.sched": "Scheduler",
}


def missing() -> Iterator[str]:
    """Yield what is not there in the versions that are installed, as `Cursor._conn`."""
    for module, names in MODULES.items():
        try:
            found = dir(import_module(module))
        except ImportError:
            found = []
        yield from (f"{module}.{name}" for name in names.split() if name not in found)
    for cls, needed in NEEDED.items():
        functions = {name: f for name, f in getmembers(cls, isroutine) if hasattr(f, "__code__")}
        # An attribute is known by the methods that use it.
        known = {*dir(cls), *(n for f in functions.values() for n in f.__code__.co_names)}
        for item in needed.split():
            name, call, parameters = item.rstrip(")").partition("(")
            code: Any = functions[name].__code__ if call and name in functions else None
            taken = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()
            if name not in known or not set(filter(None, parameters.split(","))) <= {*taken}:
                yield f"{cls.__name__}.{item}"


def insist_on_compatible_versions() -> None:
    """Raise `ImportError` if something is missing, naming it and both versions."""
    if gone := ", ".join(missing()):
        raise ImportError(
            f"this dbpool cannot work with psycopg {psycopg.__version__} and psycopg_pool"
            f" {psycopg_pool.__version__}: {gone} is missing; install older versions of them"
        )
