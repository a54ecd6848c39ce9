"""Secrets: the strings that hold one do not show it, and texts are cleared of it before they leave.

What comes from a user, an environment or a file is concealed as soon as it is read, so that the
local variables of a frame, which error trackers and debuggers collect, show nothing.
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

# The parameters that libpq marks as secret, and those that it does not mark or may not know yet.
SECRET: Final = frozenset(
    {option.keyword.decode() for option in pq.Conninfo.parse(b"") if option.dispchar == b"*"}
    | {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
)
# Keys of what may hold a secret and yet be no string, such as a number or a URL of pydantic's.
_TEXTS: Final = re.compile(rf"(?i:url)$|^(?:{'|'.join(sorted(SECRET))})$")
MASK: Final = "***"
_SHORT: Final = 4  # characters: where a shorter secret is masked, the gaps would show it

# Parameters of libpq whose value is anybody's to choose. Another's may be a secret in the wrong
# place, unless it is harmless: a number, one of libpq's words, or a path of plain words.
_FREE: Final = re.compile(
    "host|dbname|user|options|service|client_encoding|(?:fallback_)?application_name"
    "|gsslib|krbsrvname|requirepeer|oauth_(?:issuer|client_id|scope)"
)
_HARMLESS: Final = re.compile(
    r"[\d,]*|[\da-fA-F]*[.:][\da-fA-F.:,]*|[+-]?\d{0,6}[.,]?\d{0,6} *(?:[num]?s|m|h|d|secs?|mins?|(?:second|minute|hour|day)s?|%)?"
    r"|disable|allow|prefer|require|verify-(?:ca|full)|any|read-(?:write|only)|primary|standby"
    r"|prefer-standby|random|direct|postgres|TLSv1(?:\.\d)?|system|true|false|database|on|off"
    r"|(?:!?(?:password|md5|gss|sspi|scram-sha-256|creds|none|oauth),?)+"
    r"|(?:~|\.\.?)(?:/[\w. -]{1,64})+/?|(?:/[\w. -]{1,64}){2,}/?|[\w-]{1,32}\.(?:crt|crl|pem|key)"
)

_USER: Final = re.compile(r"://[^:/\[]*:")
_PORT: Final = re.compile(r"\d*(?:[^\w%].*)?$")
_ASSIGNED: Final = re.compile(
    rf"\b({'|'.join(sorted(SECRET))})(['\"]\s*:\s*|\s*=\s*)"
    r"('(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|(?:\\.|[^\s&\\])+)",
    re.IGNORECASE,
)


class Secret(str):
    """A string that shows itself on purpose only: by `str()` and formatting, never by `repr()`.

    Copies keep it; pickling raises `TypeError`.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"'{MASK}'"

    def __getitem__(self, key: Any) -> Secret:  # what cuts long values off shows no part either
        return Secret(super().__getitem__(key))

    def __copy__(self, memo: object = None) -> Self:
        return self

    __deepcopy__ = __copy__

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


def conceal(value: Any) -> Any:
    """Return a string as a `Secret`, and so what a mapping or list holds; else *value* itself."""
    if isinstance(value, Mapping):
        return {k: conceal(str(v) if v and _TEXTS.search(str(k)) else v) for k, v in value.items()}
    if isinstance(value, list):
        return [conceal(each) for each in value]
    return Secret(value) if value and isinstance(value, str) else value


def conceal_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return connection parameters as a dict in which only what holds a secret is concealed."""
    return {key: _conceal_param(key, value) for key, value in params.items()}


def _conceal_param(key: str, value: Any) -> Any:
    if value and (key in SECRET or (isinstance(value, str) and _mask_forms(value) != value)):
        return Secret(value)
    return str(value) if isinstance(value, str) else value


def is_doubtful(value: object, key: str = "") -> bool:
    """Whether *value*, of a parameter of libpq or any other, could be a secret in its place."""
    is_free = not isinstance(value, str) or _FREE.fullmatch(key)
    return not is_free and not _HARMLESS.fullmatch(str(value))


def safe_repr(value: object) -> str:
    """Return *value* for a message if it cannot be a secret, else only what it is."""
    if isinstance(value, str):
        return "a text (hidden, as it may be a secret)" if is_doubtful(value) else repr(str(value))
    is_plain = value is None or isinstance(value, (bool, int, float))
    return repr(value) if is_plain else f"a {type(value).__name__}"


def conceals_fields(cls: type[T]) -> type[T]:
    """Have a dataclass made of concealed strings: its generated `__init__` has them as locals."""
    made: Callable[..., None] = cls.__init__

    @wraps(made)
    def __init__(self: T, *args: Any, **fields: Any) -> None:  # noqa: N807  # it becomes that
        args, fields = tuple(map(conceal, args)), conceal(fields)
        made(self, *args, **fields)

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


def printable(text: str) -> str:
    """Return *text* on one line, with a space for each run of control characters and blanks."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def mask(text: str, secrets: Collection[str] = ()) -> str:
    """Return *text* printable, and each secret in it replaced, as it is or percent-encoded.

    Any password in a URL or after its keyword is replaced too. With a secret of fewer than four
    characters nothing of the text is returned.
    """
    if any(0 < len(secret) < _SHORT for secret in secrets):
        return "(text left out: a secret is too short to be masked in it)"
    text = printable(text)
    quoted = (quote, quote_plus, partial(quote, safe=""), lambda s: repr(str(s))[1:-1], json.dumps)
    forms = {form(secret).strip('"') for secret in secrets for form in (str, *quoted)}
    for form in sorted(filter(None, map(printable, forms)), key=len, reverse=True):
        text = text.replace(form, MASK)
    return _mask_forms(text)


def mask_value(value: object, key: str = "") -> str:
    """Return a value for a view: of a free parameter of libpq masked text, else what is harmless."""
    return MASK if key in SECRET or is_doubtful(value, key) else mask(str(value))


def _mask_forms(text: str) -> str:
    """Replace passwords in URLs, cut off ones too, and after keywords; in linear time."""
    words = (_mask_url(word) if "://" in word else word for word in text.split(" "))
    return _ASSIGNED.sub(rf"\1\2{MASK}", " ".join(words))


def _mask_url(word: str) -> str:
    head, at, tail = word.rpartition("@")
    user = _USER.search(head or word)
    if user is None or (not at and _PORT.match(word, user.end())):
        return word
    return f"{word[: user.end()]}{MASK}{at}{tail if at else ''}"


def secrets_of(params: Mapping[str, Any], pgconn: Any = None) -> set[str]:
    """Return the secrets of *params*, and those that libpq really used, wherever it had them."""
    found = [(key, str(value)) for key, value in params.items() if value]
    with suppress(AttributeError, psycopg.Error):  # no connection, or nothing is known of it
        used = [(o.keyword.decode(), o.val) for o in pgconn.info if o.val]
        used.append(("password", pgconn.password))  # a password file's too
        found += [(key, value.decode(errors="replace")) for key, value in used]
    return {Secret(v) for k, v in found if k in SECRET or (is_doubtful(v, k) and v[_SHORT - 1 :])}
