"""Secrets: the strings that hold one do not show it, and texts are cleared of it before they leave.

What comes from a user, an environment or a file is concealed as soon as it is read, so that the
local variables of a frame, which error trackers and debuggers collect, show nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
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
MASK: Final = "***"
_SHORT: Final = 4  # characters: where a shorter secret is masked, the gaps would show it
_OMITTED: Final = "(text left out: a secret is too short to be masked in it)"

_USER: Final = re.compile(r"://[^:/]*:")
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

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


class Concealed(Mapping[str, Any]):
    """A view of a mapping whose strings come out as `Secret`; what it holds is not shown."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return conceal(self._values[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def reveal(self) -> Mapping[str, Any]:
        """Return the mapping itself."""
        return self._values


def conceal(value: Any) -> Any:
    """Return a string as a `Secret`, a mapping as a `Concealed` one, anything else as it is."""
    if isinstance(value, str):
        return Secret(value) if value else ""
    is_plain = isinstance(value, Mapping) and not isinstance(value, Concealed)
    return Concealed(value) if is_plain else value


def conceal_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return connection parameters as a dict in which only what holds a secret is concealed."""
    return {
        key: Secret(value) if _is_secret(key, value) else plain(value)
        for key, value in params.items()
    }


def plain(value: Any) -> Any:
    """Return a `Secret` as the string that it is, anything else as it is."""
    return str(value) if isinstance(value, Secret) else value


def _is_secret(key: str, value: object) -> bool:
    if key in SECRET:
        return value not in (None, "")
    return isinstance(value, str) and _mask_forms(value) != value


def conceals_fields(cls: type[T]) -> type[T]:
    """Have a dataclass made of concealed strings: its generated `__init__` has them as locals."""
    made: Callable[..., None] = cls.__init__

    @wraps(made)
    def __init__(self: T, *args: Any, **fields: Any) -> None:  # noqa: N807  # it becomes that
        args, fields = tuple(map(conceal, args)), dict(Concealed(fields))
        made(self, *args, **fields)

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


def printable(text: str) -> str:
    """Return *text* on one line, with a space for each run of control characters and blanks."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def mask(text: str, secrets: Iterable[str] = ()) -> str:
    """Return *text* printable, and each secret in it replaced, as it is or percent-encoded.

    Any password in a URL or after its keyword is replaced too. With a secret of fewer than four
    characters nothing of the text is returned.
    """
    known = {secret for secret in secrets if secret}
    if any(len(secret) < _SHORT for secret in known):
        return _OMITTED
    text = printable(text)
    forms = {f for s in known for f in (s, quote(s, safe=""), quote_plus(s), quote(s))}
    for form in sorted(map(printable, forms), key=len, reverse=True):
        text = text.replace(form, MASK) if form else text
    return _mask_forms(text)


def _mask_forms(text: str) -> str:
    """Replace the passwords of URLs and after keywords, in time linear in the text's length."""
    words = (_mask_url(word) if "://" in word else word for word in text.split(" "))
    return _ASSIGNED.sub(rf"\1\2{MASK}", " ".join(words))


def _mask_url(word: str) -> str:
    head, at, tail = word.rpartition("@")
    user = _USER.search(head)
    return word if user is None else f"{head[: user.end()]}{MASK}{at}{tail}"


def secrets_of(params: Mapping[str, Any], pgconn: Any = None) -> set[str]:
    """Return the secrets of *params*, and those that libpq really used, wherever it had them."""
    found: set[str] = {Secret(params[key]) for key in SECRET & params.keys() if params[key]}
    try:
        used = {option.keyword.decode(): option.val for option in pgconn.info}
        used["password"] = pgconn.password  # a password file's too
    except (AttributeError, psycopg.Error):  # there is no connection, or nothing is known of it
        return found
    return found | {Secret(used[key].decode(errors="replace")) for key in SECRET if used.get(key)}
