"""Watches the pools of a host while they serve, and asks their servers who blocks whom.

What is wrong is said by `dbpool.diagnosis`, whose functions are pure. Here are the parts that need
a clock, files or a connection.

- `_monitor.py`: `Monitor`, a look each second in each process
- `_looks.py`: what that process notices of its own looks, and of its pools that nobody uses
- `_watching.py`: what one process does of those that share a directory: it watches them all
- `_inspector.py`: when to ask a server, over which connection
- `_query.py`: what a reader of `/stats` asks for
- `_server.py`: what to ask it
- `_shared_files.py`: the files that the processes share
- `_episodes.py`: when a finding is logged
"""

from __future__ import annotations

from dbpool.monitor._monitor import Monitor, close_all, watch_from_the_start
from dbpool.monitor._query import INCLUDES, Query

__all__ = ["INCLUDES", "Monitor", "Query", "close_all", "watch_from_the_start"]
