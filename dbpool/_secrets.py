"""Secrets: strings that do not show what they hold, and masks for texts that leave the process.

What a user, the environment or a file gives is concealed as soon as it is read: error trackers and
debuggers collect the local variables of frames.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial, wraps
from typing import Any, Final, NoReturn, Self, TypeVar
from urllib.parse import quote, quote_plus

import psycopg
from psycopg import pq

T = TypeVar("T")

# libpq's secret parameters: those it marks so, and those that it does not mark or know yet.
SECRET: Final = frozenset(
    {option.keyword.decode() for option in pq.Conninfo.parse(b"") if option.dispchar == b"*"}
    | {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
)
# Keys whose values may hold a secret without being strings: a number, or pydantic's URL.
_KEYS: Final = re.compile(rf"(?i:url)$|^(?:{'|'.join(sorted(SECRET))})$")
MASK: Final = "***"
_MIN_LENGTH: Final = 4  # characters: the gaps left by a shorter secret would show what it is

# Parameters of libpq that take any text. The value of another parameter may be a misplaced secret,
# unless it is harmless: a number, one of libpq's words, or a path of plain words.
_FREE_TEXT: Final = re.compile(
    "host|dbname|user|options|service|client_encoding|(?:fallback_)?application_name"
    "|gsslib|krbsrvname|requirepeer|oauth_(?:issuer|client_id|scope)"
)
_HARMLESS: Final = re.compile(
    r"[\d,]{0,64}|[\da-fA-F]*[.:][\da-fA-F.:,]*|[+-]?\d{0,6}[.,]?\d{0,6} *(?:[num]?s|m|h|d|secs?|mins?|(?:second|minute|hour|day)s?|%)?"
    r"|disable|allow|prefer|require|verify-(?:ca|full)|any|read-(?:write|only)|primary|standby"
    r"|prefer-standby|random|direct|postgres|TLSv1(?:\.\d)?|system|true|false|database|on|off"
    r"|(?:!?(?:password|md5|gss|sspi|scram-sha-256|creds|none|oauth),?)+"
    r"|(?:~|\.\.?)(?:/[\w. -]{1,64})+/?|(?:/[\w. -]{1,64}){2,}/?|[\w-]{1,32}\.(?:crt|crl|pem|key)"
)

_USER: Final = re.compile(r"://[^:/\[]*:")
_PORT: Final = re.compile(r"\d*(?:[^\w%].*)?$")
_ASSIGNED: Final = re.compile(
    rf"\b({'|'.join(sorted(SECRET))})(['\"]\s*:\s*|\s*=\s*|\s+e?(?='))"
    r"('(?:\\.|''|[^'\\])*(?:'|$)|\"(?:\\.|[^\"\\])*\"|(?:\\.|[^\s&\\])+)",
    re.IGNORECASE,
)


class Secret(str):
    """A string that `str()` and formatting show, but never `repr()`; pickling raises `TypeError`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"'{MASK}'"

    def __getitem__(self, key: Any) -> Secret:  # loggers cut long values off: a part is secret too
        return Secret(super().__getitem__(key))

    def __copy__(self, memo: object = None) -> Self:
        return self

    __deepcopy__ = __copy__

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


def conceal(value: Any) -> Any:
    """Return a string as a `Secret`, also inside a mapping or list; return any other value as it is."""
    if isinstance(value, Mapping):
        return {k: conceal(str(v) if v and _KEYS.search(str(k)) else v) for k, v in value.items()}
    if isinstance(value, list):
        return [conceal(each) for each in value]
    return Secret(value) if value and isinstance(value, str) else value


def conceal_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return connection parameters in which only what holds a secret is concealed.

    psycopg's errors quote a host by its `repr()`, and what it looks like says what is wrong.
    """
    return {key: _conceal_param(key, value) for key, value in params.items()}


def _conceal_param(key: str, value: Any) -> Any:
    if value and (key in SECRET or (isinstance(value, str) and _mask_passwords(value) != value)):
        return conceal(str(value))
    return str(value) if isinstance(value, str) else value


def may_be_secret(value: object, key: str = "") -> bool:
    """Whether *value* could be a misplaced secret; *key* is the parameter of libpq that has it."""
    is_free = not isinstance(value, str) or _FREE_TEXT.fullmatch(str(key))
    return not is_free and not _HARMLESS.fullmatch(str(value))


def safe_repr(value: object) -> str:
    """Return *value* as a message may quote it: its `repr`, or only its kind if it may be secret."""
    if isinstance(value, str):
        return "a text (hidden: it may be a secret)" if may_be_secret(value) else repr(str(value))
    # Python refuses to write out a very large number.
    is_plain = isinstance(value, float | None) or (isinstance(value, int) and abs(value) < 1e40)
    return f"{value!r:.40}" if is_plain else f"a {type(value).__name__}"


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
    """Return *text* printable, with *secrets* replaced, plain, quoted or percent-encoded.

    A password in a URL or after its keyword is always replaced. Nothing of the text is returned if
    a secret has fewer than four characters.
    """
    if any(0 < len(secret) < _MIN_LENGTH for secret in secrets):
        return "(text left out: a secret is too short to be masked in it)"
    text = printable(text)
    quoted = (quote, quote_plus, partial(quote, safe=""), lambda s: repr(str(s))[1:-1], json.dumps)
    forms = {form(secret).strip('"') for secret in secrets for form in (str, *quoted)}
    for form in sorted(filter(None, map(printable, forms)), key=len, reverse=True):
        text = text.replace(form, MASK)
    return _mask_passwords(text)


def mask_value(value: object, key: str = "") -> str:
    """Return a value for a view, masked; all of it, if it may be a misplaced secret."""
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
    """Return the secrets of *params*, and those that libpq used, wherever it found them."""
    found = [(key, str(value)) for key, value in params.items() if value]
    with suppress(AttributeError, psycopg.Error):  # there is no connection, or it is closed
        used = [(option.keyword.decode(), option.val) for option in pgconn.info if option.val]
        used.append(("password", pgconn.password))  # may come from a password file
        found += [(key, value.decode(errors="replace")) for key, value in used]
    doubtful = {v for k, v in found if may_be_secret(v, k) and len(v) >= _MIN_LENGTH}
    return {Secret(v) for k, v in found if k in SECRET or v in doubtful}
