"""The views in a process of their own: they answer even if every worker of the application hangs.

They need no web framework, and so also serve applications that do not use Flask.

- `_views.py`: the answers, made without a socket; `_pages.py`: the parts of an answer
- `_server.py`: a small HTTP server, bounded in connections and time
- `_supervisor.py`: starts the server again if it ends, and ends with the process that started it

Nothing is imported here, so that the supervisor stays small.
"""

WRONG_SETTINGS = 2  # the exit status of a server that would fail again if it were started again
