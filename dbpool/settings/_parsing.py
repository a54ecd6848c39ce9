"""Parsing: numbers, durations, switches, lists of names; and suggestions for unknown names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from difflib import get_close_matches
from functools import partial
from os import PathLike
from typing import Any, Final

from dbpool._secrets import Secret, read_lines, safe_repr
from dbpool.errors import ConfigError

logger = logging.getLogger("dbpool")

LEFT_TO_SERVER: Final = "server"
MAX_INT: Final = 2_147_483_647  # of libpq and the server; in seconds, less than any clock's end
Limits = tuple[float, float]
ANY: Final = (0.0, MAX_INT)
# PostgreSQL's units, and m.
_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_DURATION: Final = re.compile(r"(-?(?:\d+(?:\.\d*)?|\.\d+))\s*(us|ms|s|min|m|h|d|)", re.ASCII)
_TIME: Final = f'a number of seconds or a time such as "500ms" ({", ".join(_UNITS)})'
_COUNT: Final = re.compile(r"(-?\d+)()", re.ASCII)
_SWITCHES: Final = {"1": True, "true": True, "yes": True, "on": True,
                    "0": False, "false": False, "no": False, "off": False}  # fmt: skip

# Names of this package, of its variable where it has one, and of libpq; each with what SQLAlchemy,
# Django, asyncpg, pgxpool, HikariCP, Npgsql, Prisma and others call the same, in lower case and
# without underscores.
NAMES: Final = dict(line.split(": ") for line in read_lines(__package__, "names.txt"))
# Variables that say which database is meant, each with a pattern of what others call it.
MEANT: Final = [line.split("  ") for line in read_lines(__package__, "meant.txt")]


def parsed(default: Any, parse: Callable[..., Any], **options: Any) -> Any:
    """Declare a field of a dataclass whose values go through `parse(value, known_as, **options)`."""
    return field(default=default, metadata={"parse": partial(parse, **options)})


def parse_number(
    value: Any, known_as: str, *, time: str = _TIME, whole: bool = False, limits: Limits = ANY
) -> float | int:
    """Return *value* as a number; a time, in seconds, may be text with a unit.

    *time* says what a time may be; it is empty for a count. Raises `ConfigError`, which names
    *known_as*.
    """
    (least, most), unit = limits, " s" if time else ""
    number = _to_number(value, is_time=bool(time))
    if number is None:
        wanted = time or "a whole number"
    elif not number >= 0:  # NaN neither
        wanted = "0 or more"
    elif number > most:
        wanted = f"at most {most}{unit}"
    elif whole and number != int(number):
        wanted = "a whole number"
    elif number < least:
        wanted = f"at least {least:g}{unit}"
    else:
        return int(number) if whole else abs(float(number))  # of "-0" too
    raise ConfigError(f"{known_as} must be {wanted}, not {safe_repr(value)}")


def _to_number(value: Any, *, is_time: bool) -> float | None:
    if isinstance(value, str):
        match = (_DURATION if is_time else _COUNT).fullmatch(value.strip())
        return float(match[1]) * _UNITS.get(match[2], 1) if match else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def parse_time(value: Any, known_as: str, *, suspect: int = 1000, **options: Any) -> float:
    """Parse seconds; warn of a number from *suspect* on, which was probably meant in milliseconds."""
    seconds = parse_number(value, known_as, **options)
    if seconds >= suspect and str(value).strip().isdecimal():
        text = "%s is %d seconds (%.1f hours); for milliseconds write %dms"
        logger.warning(text, known_as, seconds, seconds / 3600, seconds)
    return seconds


def parse_timeout(value: Any, known_as: str, also: str = " or 0 (off)") -> float:
    """Parse a time that is sent as a whole number of milliseconds; 0 turns it off."""
    least = 0.001 if parse_number(value, known_as, time=f"{_TIME}{also}") else 0.0
    return parse_time(value, known_as, limits=(least, MAX_INT // 1000))


def parse_server_timeout(value: Any, known_as: str) -> float | str:
    """Parse a timeout; `server` leaves it to role, database or configuration."""
    is_left = isinstance(value, str) and value.strip().lower() == LEFT_TO_SERVER
    return LEFT_TO_SERVER if is_left else parse_timeout(value, known_as, ', 0 (off) or "server"')


def parse_choice(value: Any, known_as: str, *, choices: Mapping[str, Any]) -> Any:
    """Return what *choices* has for *value*, in whatever case. Raises `ConfigError`.

    The error does not quote the value: with so few to choose from, another may be a secret.
    """
    text = value if isinstance(value, str) else safe_repr(value)
    if (choice := choices.get(text.strip().lower())) is None:
        wanted = " or ".join(dict.fromkeys(str(each).lower() for each in choices.values()))
        raise ConfigError(f"{known_as} must be {wanted}")
    return choice


def parse_name(value: str, known_as: str = "name") -> str:
    """Return the name of a database. Raises `ConfigError` if it is a connection string."""
    if re.search(r"://|=", str(value)):
        raise ConfigError(f"{known_as} looks like a connection string, which belongs in conninfo")
    if value == "":
        raise ConfigError(f"{known_as} must not be empty")
    return str(value)


def parse_path(value: Any, known_as: str) -> str | None:
    """Return *value* as the path of a file, None for None. Raises `ConfigError`."""
    if not isinstance(value, str | PathLike | None) or re.search(r"\0|^\s+$", str(value)):
        raise ConfigError(f"{known_as} must be a path, not {safe_repr(value)}")
    return Secret(value) if value else None


def parse_bool(value: Any, known_as: str, *, unset: bool) -> bool:
    """Return *value* as a switch, *unset* for None. Raises `ConfigError`."""
    return unset if value is None else bool(parse_choice(value, known_as, choices=_SWITCHES))


def switch(default: bool) -> Any:
    """Declare a field of a dataclass that is on or off; None stands for *default*."""
    return parsed(default, parse_bool, unset=default)


def parse_list(value: Any, known_as: str) -> tuple[str, ...]:
    """Return the names in *value*: text with commas, or any iterable. Raises `ConfigError`."""
    if not isinstance(value, Iterable):
        raise ConfigError(f"{known_as} must be a list of names, not {safe_repr(value)}")
    parts = value.split(",") if isinstance(value, str) else value
    names = filter(None, (str(part).strip() for part in parts))
    return tuple(n if n.isidentifier() and n.islower() else Secret(n) for n in names)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that other libraries call *word*, else the most similar one, if any.

    For a word that looks like a password's name, only names of passwords are suggested.
    """
    plain, names = _plain(word), {_plain(name): name for name in sorted(known)}
    for name, others in NAMES.items():
        for other in filter(plain.endswith, (_plain(name), *others.split())):
            if found := names.get(plain.removesuffix(other) + _plain(name)):
                return found
    if re.search("pass|pwd|secret|key|cred", plain):
        ending = "passfile" if plain.endswith("file") else "password"
        names = {key: name for key, name in names.items() if key.endswith(ending)}
    return next((names[key] for key in get_close_matches(plain, names, 1, 0.7)), None)


def _plain(name: str) -> str:
    """Return a name without case, signs, and what our variables begin with: they are not alike."""
    return re.sub(r"[\W_]|^dbpool(_default)?", "", name.strip().lower())


def did_you_mean(suggestion: str | None) -> str:
    """Return the end of a message about an unknown name."""
    return f"; did you mean {suggestion}?" if suggestion else ""
