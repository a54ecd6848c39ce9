"""Secrets: strings that hide their content, and masks for texts that leave the process.

Values from a user, the environment or a file are concealed as soon as they are read: error trackers
and debuggers collect the local variables of frames.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial, wraps
from html import escape
from pkgutil import get_data
from typing import Any, Final, NoReturn, Self, TypeVar
from urllib.parse import quote

import psycopg
from psycopg import pq

T = TypeVar("T")

# libpq's secret parameters: those that it marks as secret, and some that it does not mark or know.
SECRET: Final = frozenset(
    {option.keyword.decode() for option in pq.Conninfo.parse(b"") if option.dispchar == b"*"}
    | {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
)
# Keys whose values may hold a secret without being strings: a number, or pydantic's URL.
_KEYS: Final = re.compile(rf"(?i:ur[il])$|(?i:^(?:{'|'.join(sorted(SECRET))})$)")
# The type of a value that is no text, and the value; `conceal` keeps the name of a type.
NOT_TEXT: Final = re.compile(r"(?is)(byte\w+|list|tuple|\w*dict|\w*set) |.*[\0\ud800-\udfff]")
MASK: Final = "***"
_MIN_LENGTH: Final = 4  # characters: the gaps left by a shorter secret would show what it is


def read_lines(package: str, name: str) -> list[str]:
    """Return the lines of a table in a package, which may be a zip file, without its comments."""
    return re.findall(r"(?m)^[^#\n].*", (get_data(package, name) or b"").decode())


# The parameters of libpq that take any text. The value of another one may be a misplaced secret,
# unless it is harmless.
_FREE_TEXT: Final = re.compile("|".join(read_lines(__package__, "free_text.txt")))
_HARMLESS: Final = re.compile("|".join(read_lines(__package__, "harmless.txt")))

_USER: Final = re.compile(r"://[^:/\[]*:")
_PORT: Final = re.compile(r"\d*(?:[^\w%].*)?$")
_ASSIGNED: Final = re.compile(
    rf"\b(\w*(?:{'|'.join(sorted(SECRET))}|passwd|pwd|passphrase|secret|token|authorization|(?:api|access)[-_]?key))(\\*['\"]?\s*(?:[:=]>?|:=)\s*|\s+(?:e|u&)?(?='|\$\w*\$))"
    r"((?:bearer|basic)\s+[^\s,]+|\$(\w*)\$.*?(?:\$\4\$|$)|(\\+['\"]).*?(?:\5|$)|''(?:\\''|[^'])+(?:''|$)|'(?:\\.|''|[^'\\])*(?:'|$)|\"(?:\\.|[^\"\\])*\"|(?:\\.|[^\s&\\])+)",
    re.IGNORECASE,
)


class Secret(str):
    """A string that `str()` and formatting show, but never `repr()`; pickling raises `TypeError`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"'{MASK}'"

    def __getitem__(self, key: Any) -> Secret:  # loggers cut off long values: a part is secret too
        return Secret(super().__getitem__(key))

    def __copy__(self, memo: object = None) -> Self:
        return self

    __deepcopy__ = __copy__

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


class _Partial(partial[T]):
    """A function with arguments, which error trackers would show."""

    def __repr__(self) -> str:
        return f"<partial of {self.func!r}>"


def conceal(value: Any) -> Any:
    """Return *value* such that its `repr()` shows no secret: strings, also in collections.

    Bytes, and objects whose text has a password in a URL, are of the wrong type wherever they are
    given: they are replaced by an object of which the type's name alone is known.
    """
    if isinstance(value, Mapping):
        return {_conceal_key(k): conceal(_as_text(k, v)) for k, v in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(conceal, value))
    if isinstance(value, partial):
        return _Partial(value.func, *value.args, **value.keywords)
    if isinstance(value, (bytes, bytearray)) or _shows_password(value):
        return type(type(value).__name__, (), {"__repr__": lambda _: MASK})()
    return Secret(value) if value and isinstance(value, str) else value


def _conceal_key(key: Any) -> Any:
    return key if str(key).isidentifier() else conceal(key)


def _as_text(key: object, value: Any) -> Any:
    is_text = not (NOT_TEXT.match(f"{type(value).__name__} ") or hasattr(value, "masked"))
    return str(value) if value and _KEYS.search(str(key)) and is_text else value


def _shows_password(value: object) -> bool:
    with suppress(Exception):  # an object of the user's may fail at anything
        if not (isinstance(value, str) or callable(value) or hasattr(value, "masked")):
            text = f"{value} {value!r}"
            return "://" in text and _mask_passwords(text) != text
    return False


def conceal_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return connection parameters in which only values that contain a secret are concealed.

    psycopg's errors quote a host by its `repr()`, which must stay readable.
    """
    return {key: _conceal_param(key, value) for key, value in params.items()}


def _conceal_param(key: str, value: Any) -> Any:
    if value and (key in SECRET or (isinstance(value, str) and _mask_passwords(value) != value)):
        return conceal(_as_text(key, value))
    return str(value) if isinstance(value, str) else value


def may_be_secret(value: object, key: str = "") -> bool:
    """Whether *value* could be a misplaced secret; *key* is libpq's name of the parameter."""
    is_free = not isinstance(value, str) or _FREE_TEXT.fullmatch(str(key))
    return not is_free and not _HARMLESS.fullmatch(str(value).strip("'\""))


def safe_repr(value: object) -> str:
    """Return what a message may quote of *value*: its `repr`, or its kind if it may be a secret."""
    if isinstance(value, str):
        return "a text (hidden: it may be a secret)" if may_be_secret(value) else repr(str(value))
    # Python refuses to convert a very large number to a string.
    is_plain = isinstance(value, float | None) or (isinstance(value, int) and abs(value) < 1e40)
    return f"{value!r:.40}" if is_plain else f"a value of type {type(value).__name__}"


def safe_key(name: object) -> str:
    """Return a name of a setting as a message may quote it: only its beginning may be a name."""
    return re.sub(r"(?s)^(\s*+[\w.-]{0,60}+).+", r"\1…", str(name))


def conceals_fields(cls: type[T]) -> type[T]:
    """Make a dataclass conceal its arguments: its `__init__` keeps them as local variables."""
    generated: Callable[..., None] = cls.__init__

    @wraps(generated)
    def __init__(self: T, *args: Any, **fields: Any) -> None:  # noqa: N807  # it replaces that
        args, fields = tuple(map(conceal, args)), conceal(fields)
        generated(self, *args, **fields)

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


def printable(text: str) -> str:
    """Return *text* on one line; a space replaces each run of blanks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def mask(text: str, secrets: Collection[str] = ()) -> str:
    """Return *text* printable, with *secrets* replaced, however they are quoted or encoded.

    A password in a URL or after its keyword is always replaced. If a secret has fewer than four
    characters, none of the text is returned.
    """
    if any(0 < len(secret) < _MIN_LENGTH for secret in secrets):
        return "(text left out: a secret is too short to be masked in it)"
    text = printable(text)
    if clean := [x.encode(errors="replace").decode() for x in sorted(secrets, key=len) if x]:
        text = re.sub("|".join(map(_pattern, reversed(clean))), MASK, text, flags=re.IGNORECASE)
    return _mask_passwords(text)


def _pattern(text: str) -> str:
    """Return a regular expression of how a secret may be written: quoted, escaped or encoded."""
    quoted = repr(text), ascii(text), json.dumps(text), repr(text.encode())[1:]
    escaped = text.replace("\\", r"\\").replace("'", r"\'")
    forms = {text, escape(text), escaped, text.replace("'", "''"), *(x[1:-1] for x in quoted)}
    others = sorted({*map(printable, forms)} - {text, ""}, key=len, reverse=True)
    # Which characters are percent-encoded depends on who does it. No two ways begin alike.
    encoded = re.sub(r"(?a)[^\w.~-]", lambda m: f"(?:{quote(m[0], '')}|{re.escape(m[0])})", text)
    encoded = encoded.replace(".", r"\.").replace("%20|", r"%20|\+|")
    return "|".join([*map(re.escape, others), encoded])


def mask_value(value: object, key: str = "") -> str:
    """Return a value for a view, masked; completely if it may be a misplaced secret."""
    return MASK if key in SECRET or may_be_secret(value, key) else mask(str(value))


def _mask_passwords(text: str) -> str:
    """Replace passwords after keywords and in URLs, also in one that is cut off; in linear time."""
    words = (_mask_url(word) if "://" in word else word for word in text.split(" "))
    return _ASSIGNED.sub(rf"\1\2{MASK}", " ".join(words))


def _mask_url(word: str) -> str:
    head, at, tail = word.rpartition("@")
    user = _USER.search(head or word)
    if user is None or (not at and _PORT.match(word, user.end())):
        return word
    return f"{word[: user.end()]}{MASK}{at}{tail if at else ''}"


def secrets_of(params: Mapping[str, Any], pgconn: Any = None) -> set[str]:
    """Return the secrets in *params*, and those that libpq used, wherever it found them."""
    found = [(key, str(value)) for key, value in params.items() if value]
    with suppress(AttributeError, psycopg.Error):  # there is no connection, or it is closed
        used = [(option.keyword.decode(), option.val) for option in pgconn.info if option.val]
        used.append(("password", pgconn.password))  # may come from a password file
        found += [(key, value.decode(errors="replace")) for key, value in used]
    doubtful = {Secret(v) for k, v in found if may_be_secret(v, k) and len(v) >= _MIN_LENGTH}
    return {Secret(v) for k, v in found if k in SECRET} | doubtful
