"""Drawings as inline SVG: dots with intervals, bars, lines over rounds, scatter plots.

Series differ in shape and dash as well as in colour. Colours are variables of the page (`var(--s1)` ...), so that
light, dark and print need no second figure. Every mark carries the row of its number in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 420  # of every figure; a phone shows it at 0.85, where text of size 13 is still legible
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "down", "ring", "plus")
DASHES = ("", "7 3", "2 3", "8 3 2 3", "4 2", "1 2", "10 4", "5 5")
CHARACTER = 7.2  # width of one at font size 13, a little more than the average
LONGEST = 24  # characters of a name; the rest is cut, the title has the whole


@dataclass(frozen=True)
class Mark:
    """One number of a figure.

    Attributes:
        value: The number.
        low: Lower end of its interval; None for no interval.
        high: Upper end.
        row: Row of `value` in the table of figures.
        digits: Decimals in the text of the number.
        x: Place on the horizontal axis, for lines and scatter plots.
        x_row: Row of `x` in the table, if `x` is a figure as well.
    """

    value: float
    low: float | None = None
    high: float | None = None
    row: int | None = None
    digits: int = 3
    x: float = 0.0
    x_row: int | None = None

    @property
    def text(self) -> str:
        """The number, without its interval."""
        return f"{self.value:.{self.digits}f}"


@dataclass(frozen=True)
class Series:
    """Marks of one name; their order gives shape, dash and colour."""

    name: str
    marks: tuple[Mark | None, ...]


def dots(
    names: Sequence[str],
    series: Sequence[Series],
    *,
    title: str,
    zero: bool = False,
    looks: Sequence[int] | None = None,
) -> Markup:
    """One line per name, with a dot (and its interval) of each series; a single series has its numbers written as well.

    Args:
        names: Names of the lines.
        series: Each with one mark per name; None where it has no mark.
        title: Names the axis; screen readers read it in place of the figure.
        zero: Draws a line at 0.
        looks: For a single series: shape and colour of each line, so that an arm looks the same in every figure.

    Raises:
        ValueError: If there is no finite mark, or a series has another number of marks than there are names.
    """
    if any(len(s.marks) != len(names) for s in series):
        raise ValueError(f"each series needs {len(names)} marks, one per name")
    # With a single series each line is one arm: then lines differ in shape, not series.
    own = len(series) == 1
    ends = [end for s in series for m in s.marks if m for end in (m.value, m.low, m.high) if end is not None]
    low, high, ticks = _axis([*ends, 0.0] if zero else ends)
    left = min(LONGEST, max(len(name) for name in names)) * CHARACTER + 10
    right, step, top = WIDTH - (52 if own else 24), 26, 8
    bottom = top + step * len(names)

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [_grid(at(t), top, bottom) + _tick(at(t), bottom + 16, t, ticks) for t in ticks]
    if zero:
        parts.append(Markup('<line class="zero" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(_n(at(0)), top, bottom))
    for i, name in enumerate(names):
        parts.append(_name(4, top + step * i + 17, name))
        for k, one in enumerate(series):
            mark = one.marks[i]
            if mark is None:
                continue
            spread = 0 if own else (k - (len(series) - 1) / 2) * min(8.0, 18 / len(series))
            y = top + step * i + 13 + spread
            look = (looks[i] if looks else i) if own else k
            parts.append(_whisker(at, mark, y, look))
            said = f"{name}: {mark.text}" if own else f"{name}, {one.name}: {mark.text}"
            parts.append(_shape(look, at(mark.value), y, mark, said))
            if own:
                text = Markup('<text class="figure" x="{}" y="{}" text-anchor="end"{}>{}</text>')
                parts.append(text.format(WIDTH - 4, top + step * i + 17, _facts(mark), mark.text))
    legend, height = ([], bottom + 24) if own else _legend([s.name for s in series], bottom + 32)
    return _svg(title, height, [*parts, *legend])


def bars(names: Sequence[str], marks: Sequence[Mark], *, title: str) -> Markup:
    """Horizontal bars from 0, with their numbers.

    Raises:
        ValueError: If there is no bar, one has no name, or one is negative or not finite.
    """
    if len(names) != len(marks) or not marks:
        raise ValueError(f"each bar needs a name, got {len(names)} names for {len(marks)} bars")
    if any(not math.isfinite(m.value) or m.value < 0 for m in marks):
        raise ValueError("bars must be finite and not negative")
    left = min(LONGEST, max(len(name) for name in names)) * CHARACTER + 10
    longest, room, step, top = max(m.value for m in marks) or 1.0, WIDTH - left - 58, 24, 4
    parts = []
    for i, (name, mark) in enumerate(zip(names, marks, strict=True)):
        y, wide = top + step * i, mark.value / longest * room
        parts.append(_name(4, y + 16, name))
        box = Markup('<rect class="bar" x="{}" y="{}" width="{}" height="16"{}><title>{}</title></rect>')
        parts.append(box.format(_n(left), y + 3, _n(wide), _facts(mark), f"{name}: {mark.text}"))
        text = Markup('<text class="figure" x="{}" y="{}"{}>{}</text>')
        parts.append(text.format(_n(left + wide + 5), y + 16, _facts(mark), mark.text))
    return _svg(title, top + step * len(marks) + 6, parts)


def lines(series: Sequence[Series], *, title: str, x_name: str) -> Markup:
    """One line per series over `Mark.x`, with intervals as whiskers.

    Args:
        series: Marks in the order of x.
        title: Names the vertical axis.
        x_name: Names the horizontal axis; its places are whole numbers.

    Raises:
        ValueError: If there is no finite mark.
    """
    marks = [m for s in series for m in s.marks if m]
    low, high, ticks = _axis([end for m in marks for end in (m.value, m.low, m.high) if end is not None])
    first, last = min(m.x for m in marks), max(m.x for m in marks)
    left, right, top, bottom = 46, WIDTH - 16, 8, 196
    span = (last - first) or 1.0

    def x_at(x: float) -> float:
        return left + 8 + (x - first) / span * (right - left - 16)

    def y_at(y: float) -> float:
        return bottom - (y - low) / (high - low) * (bottom - top)

    parts = [_level(y_at(t), left, right) + _level_tick(left - 5, y_at(t), t, ticks) for t in ticks]
    places = sorted({m.x for m in marks})
    count = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{:g}</text>')
    parts += [count.format(_n(x_at(x)), bottom + 17, x) for x in places[:: math.ceil(len(places) / 10)]]
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _n((left + right) / 2), bottom + 33, x_name
        )
    )
    for k, one in enumerate(series):
        own = [m for m in one.marks if m]
        aside = (k - (len(series) - 1) / 2) * 2.5  # otherwise the whiskers of series would hide each other
        path = " ".join(f"{_n(x_at(m.x) + aside)},{_n(y_at(m.value))}" for m in own)
        parts.append(
            Markup('<polyline class="line" points="{}" stroke="var(--s{})" stroke-dasharray="{}"/>').format(
                path, _colour(k), DASHES[k % len(DASHES)] or "none"
            )
        )
        for m in own:
            x = x_at(m.x) + aside
            if m.low is not None and m.high is not None:
                bar = Markup('<line class="whisker" x1="{0}" x2="{0}" y1="{1}" y2="{2}" stroke="var(--s{3})"/>')
                parts.append(bar.format(_n(x), _n(y_at(m.low)), _n(y_at(m.high)), _colour(k)))
            parts.append(_shape(k, x, y_at(m.value), m, f"{one.name}, {x_name} {m.x:g}: {m.text}"))
    legend, height = _legend([s.name for s in series], bottom + 56, dashed=True)
    return _svg(title, height, [*parts, *legend])


def scatter(series: Sequence[Series], *, title: str, x_name: str, y_name: str, x_digits: int = 3) -> Markup:
    """Points of two figures each, `Mark.x` and `Mark.value`, with intervals of the latter: Pareto plots.

    Args:
        series: One shape each.
        title: Names the comparison.
        x_name: Names the horizontal axis.
        y_name: Names the vertical axis.
        x_digits: Decimals of x in titles.

    Raises:
        ValueError: If there is no finite mark.
    """
    marks = [m for s in series for m in s.marks if m]
    low, high, ticks = _axis([end for m in marks for end in (m.value, m.low, m.high) if end is not None])
    x_low, x_high, x_ticks = _axis([m.x for m in marks])
    left, right, top, bottom = 46, WIDTH - 16, 22, 226

    def x_at(x: float) -> float:
        return left + 8 + (x - x_low) / (x_high - x_low) * (right - left - 16)

    def y_at(y: float) -> float:
        return bottom - (y - low) / (high - low) * (bottom - top)

    parts = [_level(y_at(t), left, right) + _level_tick(left - 5, y_at(t), t, ticks) for t in ticks]
    parts += [_grid(x_at(t), top, bottom) + _tick(x_at(t), bottom + 17, t, x_ticks) for t in x_ticks]
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _n((left + right) / 2), bottom + 34, x_name
        )
    )
    parts.append(Markup('<text class="tick" x="4" y="12">{}</text>').format(y_name))
    for k, one in enumerate(series):
        for m in one.marks:
            if m is None:
                continue
            if m.low is not None and m.high is not None:
                bar = Markup('<line class="whisker" x1="{0}" x2="{0}" y1="{1}" y2="{2}" stroke="var(--s{3})"/>')
                parts.append(bar.format(_n(x_at(m.x)), _n(y_at(m.low)), _n(y_at(m.high)), _colour(k)))
            said = f"{one.name}: {x_name} {m.x:.{x_digits}f}, {y_name} {m.text}"
            parts.append(_shape(k, x_at(m.x), y_at(m.value), m, said))
    legend, height = _legend([s.name for s in series], bottom + 58)
    return _svg(title, height, [*parts, *legend])


def _svg(title: str, height: float, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, _n(height), title)
    return head + Markup("").join(parts) + Markup("</svg>")


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends and ticks of an axis: three to seven ticks at 1, 2 or 5 times a power of ten, a little room at both ends."""
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"a figure needs finite numbers, got {list(values)[:5]}")
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1)
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw)
    room = 0.04 * (high - low)
    low, high = low - room, high + room
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, ticks


def _tick_text(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:.{digits}f}" if abs(value) >= step / 2 else "0"


def _grid(x: float, top: float, bottom: float) -> Markup:
    return Markup('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(_n(x), _n(top), _n(bottom))


def _level(y: float, left: float, right: float) -> Markup:
    return Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(_n(left), _n(right), _n(y))


def _tick(x: float, y: float, value: float, ticks: Sequence[float]) -> Markup:
    text = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>')
    return text.format(_n(x), _n(y), _tick_text(value, ticks))


def _level_tick(x: float, y: float, value: float, ticks: Sequence[float]) -> Markup:
    text = Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>')
    return text.format(_n(x), _n(y + 4), _tick_text(value, ticks))


def _name(x: float, y: float, name: str) -> Markup:
    short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    return Markup('<text class="name" x="{}" y="{}">{}<title>{}</title></text>').format(_n(x), _n(y), short, name)


def _whisker(at: Callable[[float], float], mark: Mark, y: float, look: int) -> Markup:
    if mark.low is None or mark.high is None:
        return Markup("")
    line = '<path class="whisker" d="M{0} {2}H{1}M{0} {3}V{4}M{1} {3}V{4}" stroke="var(--s{5})"/>'
    return Markup(line).format(_n(at(mark.low)), _n(at(mark.high)), _n(y), _n(y - 4), _n(y + 4), _colour(look))


def _shape(look: int, x: float, y: float, mark: Mark | None, said: str) -> Markup:
    """One mark in the shape and colour of series `look`."""
    kind, r = SHAPES[look % len(SHAPES)], 5.0

    def through(*points: tuple[float, float]) -> str:
        return "M" + "L".join(f"{_n(x + r * dx)} {_n(y + r * dy)}" for dx, dy in points)

    corners = {
        "square": through((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)) + "Z",
        "triangle": through((0, -1.15), (1.1, 0.85), (-1.1, 0.85)) + "Z",
        "down": through((0, 1.15), (1.1, -0.85), (-1.1, -0.85)) + "Z",
        "diamond": through((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)) + "Z",
        "cross": through((-0.9, -0.9), (0.9, 0.9)) + through((-0.9, 0.9), (0.9, -0.9)),
        "plus": through((-1.1, 0), (1.1, 0)) + through((0, -1.1), (0, 1.1)),
    }
    ring = f"M{_n(x - r)} {_n(y)}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"
    facts = Markup("") if mark is None else _facts(mark)
    style = "open" if kind in ("ring", "cross", "plus") else "mark"
    title = Markup("<title>{}</title>").format(said) if said else Markup("")
    head = Markup('<path class="{}" d="{}" style="--c:var(--s{})"{}>').format(
        style, corners.get(kind, ring), _colour(look), facts
    )
    return head + title + Markup("</path>")


def _facts(mark: Mark) -> Markup:
    """The rows of a mark's numbers in the table."""
    found = Markup("")
    if mark.row is not None:
        found += Markup(' data-row="{}" data-value="{}"').format(mark.row, mark.text)
    if mark.x_row is not None:
        found += Markup(' data-x-row="{}" data-x="{!r}"').format(mark.x_row, mark.x)
    return found


def _legend(names: Sequence[str], y: float, *, dashed: bool = False) -> tuple[list[Markup], float]:
    """Shapes with their names, two in a row if they are short; and the height of the figure with them."""
    columns = 2 if max(map(len, names)) * CHARACTER + 48 < WIDTH / 2 else 1
    parts = []
    for k, name in enumerate(names):
        x, line = 8 + (k % columns) * WIDTH / 2, y + (k // columns) * 20
        if dashed:
            line_of = (
                '<line class="line" x1="{0}" x2="{1}" y1="{2}" y2="{2}" stroke="var(--s{3})" stroke-dasharray="{4}"/>'
            )
            dash = DASHES[k % len(DASHES)] or "none"
            parts.append(Markup(line_of).format(_n(x), _n(x + 28), _n(line - 4), _colour(k), dash))
        parts.append(_shape(k, x + 14, line - 4, None, ""))
        parts.append(_name(x + 36, line, name))
    return parts, y + 20 * (-(-len(names) // columns)) - 8


def _colour(look: int) -> int:
    return look % 8 + 1


def _n(value: float) -> str:
    """A coordinate: two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
