"""The reference application: a small JSON API over a dbpool pool, run by `make run`."""
