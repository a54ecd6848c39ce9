"""The views in a process of their own: they answer while every worker of the application hangs.

Needs no web framework, and so also serves applications that are not made with Flask.

- `_views.py`: what is answered, without a socket; `_pages.py`: what answers are made of
- `_server.py`: a small HTTP server, bounded in connections and time
- `_supervisor.py`: starts the server again if it ends, and ends with the process that wants it

Nothing is imported here: the supervisor stays small.
"""

WRONG_SETTINGS = 2  # the exit status of a server that would fail again if it were started again
