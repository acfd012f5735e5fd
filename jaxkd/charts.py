"""Charts as SVG to stand in a page of HTML: functions from numbers to text.

Colours and sizes of text are the page's (`page.css`), by class: `c0` to `c5` are those of what is
drawn. Every text is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import html
import math
from typing import NamedTuple

from jaxkd import watch

COLOURS = 6
# Units of an SVG's own coordinates: its size, and the room around what is drawn in it.
WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 46
# A character of the largest text, on a telephone.
CHARACTER = 9.5
# Two rows for the names of stages, so that those of short ones do not meet.
BANDS = 40
# More points than these of one line cannot be told apart.
POINTS = 500
# With more classes than these, a matrix has room for their names no more, or for numbers.
NAMED, NUMBERED = 40, 15


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
      name: stands in the legend; lines of one name are drawn alike.
      x, y: float [points]; where y is None the line is broken.
      style: classes, such as 'c0' or 'c0 dashed'.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str


class Band(NamedTuple):
    """A part of the x axis with a name."""

    name: str
    start: float
    stop: float


class Point(NamedTuple):
    """A point of a scatter chart: its label stands beside it, what it is about in its tooltip."""

    x: float
    y: float
    label: str
    about: str
    style: str


class Axis(NamedTuple):
    """Numbers from `low` to `high`, drawn from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most so many and one more.

    >>> ticks(0, 2.7), ticks(0.82, 0.91)
    ([0.0, 1.0, 2.0], [0.82, 0.84, 0.86, 0.88, 0.9])
    """
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    drawn: Sequence[Line],
    *,
    title: str,
    about: str,
    x: str = 'step',
    bands: Sequence[Band] = (),
    zero: bool = True,
) -> str:
    """Lines over a common axis.

    Args:
      drawn: at least one point among them.
      title: the name that a screen reader says.
      about: what it says besides.
      x: what the x axis counts.
      bands: parts of the x axis.
      zero: whether the y axis begins there, or where the lines do.
    """
    known = [value for line in drawn for value in line.y if value is not None]
    across = [value for line in drawn for value in line.x]
    low = 0.0 if zero else min(known)
    high = max(known) if max(known) > low else low + 1.0
    right = max(across) if max(across) > min(across) else min(across) + 1.0
    horizontal = Axis(min(across), right, LEFT, WIDTH - RIGHT)
    vertical = Axis(low, high, HEIGHT - BOTTOM, BANDS if bands else TOP)
    parts = [_axes(horizontal, vertical, x)]
    for i, band in enumerate(bands):
        start = horizontal(band.start)
        beside = f'x="{start + 4:.1f}"'
        if start + CHARACTER * len(band.name) > WIDTH - RIGHT:
            beside = f'class="end" x="{WIDTH - RIGHT}"'
        parts.append(
            f'<line class="band" x1="{start:.1f}" x2="{start:.1f}" y1="4" y2="{vertical.start}"/>'
            f'<text {beside} y="{15 + i % 2 * 17}">{html.escape(band.name)}</text>'
        )
    for line in drawn:
        heights = [None if value is None else vertical(value) for value in line.y]
        path = _path([horizontal(value) for value in line.x], heights)
        parts.append(f'<path class="line {line.style}" d="{path}"/>')
    return _svg(WIDTH, HEIGHT, title, about, parts)


def _path(x: Sequence[float], y: Sequence[float | None]) -> str:
    stride = math.ceil(len(x) / POINTS)
    chosen = sorted({*range(0, len(x), stride), len(x) - 1})
    words, on = [], False
    for i in chosen:
        if y[i] is not None:
            words.append(f'{"L" if on else "M"}{x[i]:.1f},{y[i]:.1f}')
        on = y[i] is not None
    return ' '.join(words)


def legend(drawn: Iterable[Line]) -> str:
    """What the lines are, each name once."""
    styles = {line.name: line.style for line in drawn}
    keys = (
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true">'
        f'<path class="line {style}" d="M0,4 L24,4"/></svg>{html.escape(name)}</li>'
        for name, style in styles.items()
    )
    return f'<ul class="legend">{"".join(keys)}</ul>'


def scatter(
    points: Sequence[Point], front: Sequence[int], *, title: str, about: str, x: str
) -> str:
    """Points, with a stepped line along the front of the best.

    Args:
      points: x from 0 on, y in [0, 1].
      front: indices of points, x and y ascending.
      title, about, x: as in `lines`.
    """
    values = [point.y for point in points]
    room = max(0.1 * (max(values) - min(values)), 0.002)
    horizontal = Axis(0, 1.08 * max(point.x for point in points), LEFT, WIDTH - RIGHT)
    vertical = Axis(min(values) - room, max(values) + room, HEIGHT - BOTTOM, TOP)
    parts = [_axes(horizontal, vertical, x)]
    at = [(horizontal(point.x), vertical(point.y)) for point in points]
    (left, top), *rest = [at[i] for i in front]
    steps = ''.join(f' H{px:.1f} V{py:.1f}' for px, py in rest)
    path = f'M{left:.1f},{top:.1f}{steps} H{WIDTH - RIGHT}'
    parts.append(f'<path class="line front" d="{path}"/>')
    taken: list[tuple[float, float]] = []
    for point, (px, py) in zip(points, at, strict=True):
        parts.append(
            f'<circle class="{point.style}" cx="{px:.1f}" cy="{py:.1f}" r="5">'
            f'<title>{html.escape(point.about)}</title></circle>'
        )
        beside = [(px + dx, py + dy) for dx, dy in ((12, 4), (-12, 4), (0, -10), (0, 19))]
        taken.append(next((b for b in beside if all(_apart(b, t) for t in taken)), beside[0]))
        parts.append(
            f'<text class="middle" x="{taken[-1][0]:.1f}" y="{taken[-1][1]:.1f}">'
            f'{html.escape(point.label)}</text>'
        )
    return _svg(WIDTH, HEIGHT, title, about, parts)


def _apart(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return abs(a[0] - b[0]) > 12 or abs(a[1] - b[1]) > 12


def _axes(horizontal: Axis, vertical: Axis, x: str) -> str:
    bottom = vertical.start
    parts = []
    for value in ticks(vertical.low, vertical.high):
        at = vertical(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="end" x="{LEFT - 7}" y="{at + 4:.1f}">{value:g}</text>'
        )
    for value in ticks(horizontal.low, horizontal.high):
        parts.append(
            f'<text class="middle" x="{horizontal(value):.1f}" y="{bottom + 18}">'
            f'{watch.count(value) if value else 0}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="end" x="{WIDTH - RIGHT}" y="{bottom + 38}">{html.escape(x)}</text>'
    )
    return ''.join(parts)


def matrix(rows: Sequence[Sequence[int]], names: Sequence[str], *, title: str, about: str) -> str:
    """A confusion matrix: a row for each class, a column for each answer.

    Colour says how large a share of its row a cell is: right answers in one, wrong ones in another.
    """
    size = len(rows)
    cell = max(5.0, min(38.0, 440 / size))
    shown = [name if len(name) <= 14 else f'{name[:13]}…' for name in names]
    room = 8.0 + 7.2 * max(map(len, shown)) if size <= NAMED else 0.0
    parts = []
    for i, (row, name) in enumerate(zip(rows, shown, strict=True)):
        middle = room + (i + 0.5) * cell
        if room:
            parts.append(
                f'<text class="end" x="{room - 6:.1f}" y="{middle + 4:.1f}">{html.escape(name)}'
                f'</text><text transform="translate({middle + 4:.1f} {room - 6:.1f}) rotate(-90)">'
                f'{html.escape(name)}</text>'
            )
        for j, number in enumerate(row):
            if number or size <= NUMBERED:
                parts.append(
                    _cell(
                        room + j * cell,
                        room + i * cell,
                        cell,
                        number,
                        number / max(1, sum(row)),
                        i == j,
                        f'{names[i]} taken for {names[j]}' if i != j else f'{name} recognized',
                        size <= NUMBERED,
                    )
                )
    side = room + size * cell
    parts.append(
        f'<rect class="frame" x="{room:.1f}" y="{room:.1f}" width="{size * cell:.1f}" '
        f'height="{size * cell:.1f}"/>'
    )
    return _svg(side + 1, side + 1, title, about, parts)


def _cell(
    x: float,
    y: float,
    size: float,
    number: int,
    share: float,
    right: bool,
    about: str,
    numbered: bool,
) -> str:
    # Never between: dark text stands well on up to 0.45, light text from 0.9 on.
    strong = share > 0.5
    opacity = 0.8 + 0.2 * share if strong else 0.45 * math.sqrt(2 * share)
    text = ''
    if numbered:
        style = 'middle on' if strong else 'middle'
        shown = number or '·'
        middle = f'x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}"'
        text = f'<text class="{style}" {middle}>{shown}</text>'
    return (
        f'<g><title>{html.escape(about)}: {number} ({share:.1%})</title>'
        f'<rect class="{"right" if right else "wrong"}" x="{x:.1f}" y="{y:.1f}" '
        f'width="{size:.1f}" height="{size:.1f}" fill-opacity="{opacity:.2f}"/>{text}</g>'
    )


def bar(whole: float, part: float, most: float) -> str:
    """What is left of a whole, as a bar as wide as its column for `most`.

    For the eye alone: the numbers stand beside it.
    """
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="whole" width="{100 * whole / most:.2f}" height="10"/>'
        f'<rect class="part" width="{100 * part / most:.2f}" height="10"/></svg>'
    )


def _svg(width: float, height: float, title: str, about: str, parts: Iterable[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img">'
        f'<title>{html.escape(title)}</title><desc>{html.escape(about)}</desc>{"".join(parts)}</svg>'
    )
