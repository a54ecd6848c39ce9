"""Bar charts as SVG, written by hand: no package for a few rectangles."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

_BAR, _GAP, _LEFT, _WIDTH = 18, 8, 300, 380
_DBPOOL_COLOR, _PEER_COLOR = "#2f6fde", "#9aa5b1"


def bars(path: Path, title: str, groups: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Draw a bar for each peer of each group; each group is scaled by its own maximum."""
    parts: list[str] = []
    y = 40
    for group, values in groups.items():
        parts.append(_text(10, y + 13, group, weight="600"))
        y += _BAR + _GAP
        highest = max(values.values()) or 1.0
        for name, value in values.items():
            width = max(1.0, _WIDTH * value / highest)
            color = _DBPOOL_COLOR if name.startswith("dbpool") else _PEER_COLOR
            parts.append(_text(_LEFT - 8, y + 13, name, anchor="end"))
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{color}"/>'
            )
            parts.append(_text(_LEFT + width + 6, y + 13, f"{_number(value)} {unit}"))
            y += _BAR + _GAP // 2
        y += _GAP
    width = _LEFT + _WIDTH + 120
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}"'
        f' font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f"{_text(10, 22, title, weight='700')}{''.join(parts)}</svg>\n"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
        f' fill="#1c2430">{escape(text)}</text>'
    )
