"""How the values of settings are looked up and parsed: layers, secret files, durations."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from dbpool._secrets import Secret, safe_repr
from dbpool.errors import ConfigError

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_DURATION: Final = re.compile(r"(-?(?:\d+(?:\.\d*)?|\.\d+))\s*(ms|s|m|h|)", re.ASCII)

# What is called so here, and what SQLAlchemy, Django, asyncpg, pgxpool, HikariCP, Npgsql, Prisma and
# others call it, in small letters and without underscores.
_TABLE: Final = Path(__file__).with_name("names.txt").read_text("utf-8")
NAMES: Final = dict(line.split(": ") for line in _TABLE.splitlines())


def parse_list(value: Any, name: str) -> tuple[str, ...]:
    """Return the words of the list called *name*: one that commas separate, or any other."""
    if not isinstance(value, Iterable):
        raise ConfigError(f"{name} must hold names, not {safe_repr(value)}")
    parts = value.split(",") if isinstance(value, str) else value
    found = (str(part).strip() for part in parts)
    return tuple(
        word if word.isidentifier() and word.islower() else Secret(word) for word in found if word
    )


def parse_bool(value: Any, name: str) -> bool:
    """Return the switch called *name*, which is on unless it is set off."""
    if value is None or isinstance(value, bool):
        return value is not False
    if str(value).lower() in ("1", "true", "yes", "on"):
        return True
    if str(value).lower() in ("0", "false", "no", "off"):
        return False
    raise ConfigError(f"{name} must be true or false, not {safe_repr(value)}")


def parse_number(
    value: Any, known_as: str, *, whole: bool = False, is_time: bool = True
) -> float | int:
    """Convert a number; one that *is_time* may be text with a unit. The error names *known_as*."""
    wanted = 'a number of seconds or a time such as "500ms"' if is_time else "a whole number"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"{known_as} must be {wanted}, not {safe_repr(value)}")
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None or not (is_time or match[0].lstrip("-").isdecimal()):
            raise ConfigError(f"{known_as} must be {wanted}, not {safe_repr(value)}")
        value = float(match[1]) * _UNITS[match[2]]
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{known_as} must be 0 or more, not {safe_repr(value)}")
    if whole and value != int(value):
        raise ConfigError(f"{known_as} must be a whole number, not {safe_repr(value)}")
    return int(value) if whole else float(value)


def nearest(word: str, known: AbstractSet[str]) -> str | None:
    """Return what *word* is called here, else the known name that looks most like it, if any.

    What looks like a password's name is never taken for another secret's.
    """
    plain, names = _plain(word), {_plain(name): name for name in known}
    for name, others in NAMES.items():
        for other in filter(plain.endswith, (_plain(name), *others.split())):
            if found := names.get(plain.removesuffix(other) + _plain(name)):
                return found
    if re.search("pass|pwd|secret|key|cred", plain):
        ending = "passfile" if plain.endswith("file") else "password"
        names = {key: name for key, name in names.items() if key.endswith(ending)}
    return next((names[key] for key in get_close_matches(plain, sorted(names), 1)), None)


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def did_you_mean(suggestion: str | None) -> str:
    """Return the end of a message about something unknown."""
    return f"; did you mean {suggestion}?" if suggestion else ""
