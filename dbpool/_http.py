"""What the blueprint and the door both say in HTTP; knows no web framework."""

from __future__ import annotations

import math
import random


def retry_after(seconds: float | None) -> str:
    """Return a `Retry-After`: whole seconds, at least one.

    A random part of up to a half, or up to two seconds, is added: clients that were rejected
    together should not come back together.
    """
    soonest = max(1, math.ceil(seconds or 0.0))
    return str(random.randint(soonest, soonest + max(2, soonest // 2)))  # noqa: S311  # no secret
