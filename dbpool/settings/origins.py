"""Finds out where the value of each setting in effect comes from.

That is a variable, the `.env`, the application's configuration, the connection string, an argument
in the code, or the default. No secret is shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any, Final

from dbpool._secrets import MASK, conceal, mask_value
from dbpool.errors import ConfigError
from dbpool.settings import SERVER_SIDE, Settings, _conninfo, variable
from dbpool.settings.app import AppSettings

__all__ = ["describe_settings"]

DEFAULT: Final = "default"
ARGUMENT: Final = "argument"
_CONNECTION_STRING: Final = "connection string"
_HIDDEN: Final = frozenset({"name", "explicit", "conninfo_file", "libpq"})
_OUR_VARIABLES: Final = ("DBPOOL_", "DATABASE_URL", "PG")
_SETS: Final = {"application_name": ("application_name", "fallback_application_name")}

_Layers = list[tuple[str, Mapping[str, Any]]]
_Row = dict[str, Any]


def describe_settings(
    pools: Mapping[str, Settings],
    config: Mapping[str, Any] | None = None,
    dotenv: Mapping[str, str] | None = None,
    application: AppSettings | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the settings of each pool and of the application: name, value and source.

    *config* is searched first, then *environ*, by default the process's environment, then *dotenv*.
    """
    given = (("app.config", config), ("", os.environ if environ is None else environ))
    layers = [(label, _our_variables(layer)) for label, layer in (*given, (".env", dotenv))]
    del config, dotenv, environ, given  # a traceback would show their passwords
    found: dict[str, Any] = {
        "pools": {name: _of_pool(each, layers) for name, each in pools.items()}
    }
    if application is not None:
        found["application"] = [
            _of_application(application, f, layers) for f in fields(application)
        ]
    return found


def _our_variables(layer: Mapping[str, Any] | None) -> Mapping[str, Any]:
    names = (name for name in layer or {} if str(name).startswith(_OUR_VARIABLES))
    return conceal({name: (layer or {})[name] for name in names})  # type: ignore[no-any-return]


def _of_pool(settings: Settings, layers: _Layers) -> list[_Row]:
    shown, elsewhere = settings.masked(), _from_connection(settings)
    rows = []
    for f in fields(settings):
        if f.name in _HIDDEN:
            continue
        source = _source(settings, f, layers)
        value = MASK if f.name == "password_file" and shown[f.name] else shown[f.name]
        if source == DEFAULT and f.name in elsewhere:
            value, source = elsewhere[f.name]
        rows.append({"name": f.name, "value": value, "source": source})
    return rows


def _source(settings: Settings, f: Field[Any], layers: _Layers) -> str:
    if f.name == "conninfo":
        return _source_of_database(settings, layers)
    if f.name not in settings.explicit:
        return DEFAULT
    names = [variable(f.name, settings.name), variable(f.name)]
    if f.name == "password_file":
        names = ["PGPASSWORD_FILE"]
    source, raw = _find(names, layers)
    return source if source and _is_same(f, raw, getattr(settings, f.name)) else ARGUMENT


def _source_of_database(settings: Settings, layers: _Layers) -> str:
    name = variable("conninfo", settings.name)
    for label, layer in layers:
        if found := next((key for key in (name, f"{name}_FILE") if layer.get(key)), None):
            return _labelled(found, label)
        databases = layer.get("DBPOOL_DATABASES")
        if isinstance(databases, Mapping) and settings.name in databases:
            return _labelled("DBPOOL_DATABASES", label)
    if settings.conninfo or settings.conninfo_file:
        return ARGUMENT
    variables = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE", "PGUSER")
    return _find(variables, layers)[0] or "libpq's defaults"


def _find(names: Iterable[str], layers: _Layers) -> tuple[str, Any]:
    """Return the source and the value of the first of these names that is set."""
    for name in names:
        for label, layer in layers:
            if layer.get(name) not in (None, ""):
                return _labelled(name, label), layer[name]
    return "", None


def _labelled(name: str, label: str) -> str:
    return f"{name} in {label}" if label else name


def _is_same(f: Field[Any], raw: Any, value: Any) -> bool:
    """Whether the value was made from *raw*: an argument may have won over it."""
    parse = f.metadata.get("parse")
    try:
        return bool((parse(raw, f.name) if parse else raw) == value)
    except ConfigError:
        return False


def _from_connection(settings: Settings) -> dict[str, tuple[str, str]]:
    """Return what the connection string or libpq's own variables set, by the field's name."""
    try:
        params = {**_conninfo.parse(settings.libpq), **_conninfo.parse(settings.resolve())}
        known = _conninfo.already_set(params, os.environ)
    except ConfigError:  # for example a file that cannot be read now
        return {}
    found = {}
    for f in fields(settings):
        key = next((key for key in _SETS.get(f.name, (f.name,)) if known.get(key)), "")
        source = _CONNECTION_STRING if key in params else _conninfo.VARIABLES.get(key, "")
        if source and f.name not in ("name", "conninfo"):
            found[f.name] = mask_value(known[key], key), source
    options = str(known.get("options") or "")
    source = f"options of {_CONNECTION_STRING}" if "options" in params else "PGOPTIONS"
    for name, parameter in SERVER_SIDE.items():
        if match := re.search(rf"\b{parameter}\s*=\s*(\w+)", options):
            found[name] = mask_value(match[1]), source
    return found


def _of_application(settings: AppSettings, f: Field[Any], layers: _Layers) -> _Row:
    name = f"DBPOOL_{f.name}".upper()
    value = getattr(settings, f.name)
    source, _ = _find([name, f"{name}_FILE"] if f.name == "token" else [name], layers)
    if f.name == "token":
        value = MASK if value else None
    elif isinstance(value, str) and f.name != "details":  # a path, or a misplaced secret
        value = mask_value(value)
    shown = list(value) if isinstance(value, tuple) else value
    return {"name": f.name, "value": shown, "source": source or DEFAULT}
