"""dbpool for Flask: the extension, and a blueprint that shows what the pools are doing."""

from __future__ import annotations

from dbpool.flask._blueprint import create_blueprint
from dbpool.flask._extension import DBPool, State

__all__ = ["DBPool", "State", "create_blueprint"]
