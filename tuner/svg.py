# SPDX-License-Identifier: Apache-2.0
"""The charts of reports, as SVG inside HTML: no scripts, no files, no fonts from elsewhere.

Colours are classes that the page's style sheet defines for light and dark screens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape


def number(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def text(
    x: float, y: float, words: str, kind: str = "", anchor: str = "start", more: str = ""
) -> str:
    """Words; `anchor` is start, middle or end."""
    return (
        f'<text x="{number(x)}" y="{number(y)}" class="{kind}" text-anchor="{anchor}"{more}>'
        f"{escape(words)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    points = (number(v) for v in (x1, y1, x2, y2))
    return '<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>'.format(*points, kind)


def rectangle(
    x: float, y: float, width: float, height: float, kind: str, title: str = "", more: str = ""
) -> str:
    """A filled box; the title appears under the pointer."""
    box = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0))}"'
    box += f' height="{number(max(height, 0))}" class="{kind}"{more}'
    return f"<rect {box}><title>{escape(title)}</title></rect>" if title else f"<rect {box}/>"


def dot(x: float, y: float, radius: float, kind: str, title: str = "") -> str:
    """A filled circle."""
    tip = f"<title>{escape(title)}</title>" if title else ""
    place = f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"'
    return f'<circle {place} class="{kind}">{tip}</circle>'


def path(points: Iterable[tuple[float, float]], kind: str) -> str:
    """Straight lines from point to point."""
    steps = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polyline points="{steps}" class="{kind}"/>'


def picture(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """A drawing that is as wide as its place, and not wider than `width`."""
    size = f'viewBox="0 0 {number(width)} {number(height)}" style="max-width:{number(width)}px"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


class Log:
    """A logarithmic scale from `low` to `high`, drawn from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, max(high, low * 1.0001)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + (self.end - self.start) * min(max(part, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values: 1, 2, 5 where there is room for them, else powers of ten."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps: Sequence[float] = (1,) if last - first > 4 else (1, 2, 5)
        values = (step * 10.0**power for power in range(first, last + 1) for step in steps)
        return [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]


def nice_ticks(high: float, count: int = 5) -> list[float]:
    """Round values from 0 to at most `high`."""
    if high <= 0:
        return [0.0]
    step = 10.0 ** math.floor(math.log10(high / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if high / (step * factor) <= count)
    return [step * i for i in range(int(high / step + 1e-9) + 1)]


def plain(value: float) -> str:
    """A tick's label."""
    return f"{value:g}" if value < 1e4 else f"{value / 1e3:g}k"


def shortened(words: str, length: int) -> str:
    """At most so many characters."""
    return words if len(words) <= length else words[: length - 1] + "…"
