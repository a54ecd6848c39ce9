"""The statistics of all worker processes of an application on this host.

Each process writes what it knows to a file of its own, in a directory that they share. The one
that is asked reads them all and merges them into one `Report`.

- `_processes.py`: `Processes`, which writes the file of this process and collects the others'
- `_archive.py`: reads the files, and keeps the totals of processes that have ended
- `_directory.py`: makes, finds and removes the directory
- `_files.py`: atomic files, locks, and how to tell a process from a later one with its pid

Names are imported on first use: the gunicorn master imports `_directory` and `_files` alone,
which need nothing but the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbpool.processes._processes import Processes, publish_from_the_start, set_threads
    from dbpool.report import SCHEMA

__all__ = ["SCHEMA", "Processes", "publish_from_the_start", "set_threads"]


if not TYPE_CHECKING:  # a checker would take every name for one that exists

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        from dbpool import report
        from dbpool.processes import _processes

        return getattr(report if name == "SCHEMA" else _processes, name)
