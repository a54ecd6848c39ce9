"""Fills in the blueprint's pages."""

from __future__ import annotations

from functools import cache

from flask import url_for

from dbpool._http import read_template, render

# Read once: later the process may have run out of file descriptors.
template = cache(read_template)


def render_page(name: str, **values: str) -> str:
    """Return a page of the blueprint that answers the request."""
    return render(template(name), lambda view, file: url_for(f".{view}", filename=file), **values)
