"""The geometry of a page's charts: lines over an axis, and boxes. Drawn as SVG by charts.html.j2, coloured by page.css."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT = 340, 210  # of a chart, in its own pixels
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 10, 34  # round the plot
ROW = 17  # height of a row of boxes
LETTER = 5.4  # width of a letter of a row's name
WHISKER = 1.5  # times the interquartile range, at most (Tukey)
LOG_FROM = 100.0  # the ratio of largest and smallest figure from which an axis is logarithmic


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    says: str


@dataclass(frozen=True)
class Line:
    number: int  # of its colour
    label: str
    points: str  # of an SVG polyline
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    says: str  # the chart in words
    y_title: str
    x_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    marks: list[float] = field(default_factory=list)  # x of vertical lines
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Box:
    name: str
    y: float
    low: float
    first: float  # quartile
    median: float
    third: float
    high: float
    outside: list[float]
    says: str


@dataclass(frozen=True)
class Boxes:
    title: str
    says: str
    x_title: str
    x_ticks: list[Tick]
    boxes: list[Box]
    height: float
    left: float
    number: int  # of its colour
    width: float = WIDTH
    right: float = WIDTH - RIGHT


@dataclass(frozen=True)
class Series:
    """What a line shows: `points` (x, y); `dots` (x, y, text) lie round it."""

    number: int
    label: str
    points: Sequence[tuple[float, float]]
    dots: Sequence[tuple[float, float, str]] = ()


class Axis:
    """Maps figures to pixels."""

    def __init__(self, values: Sequence[float], start: float, stop: float, ends: tuple[float, float] | None = None, log: bool = False, ticks: int = 4):
        self.start, self.stop, self.log = start, stop, log
        low, high = ends or (min(values), max(values))
        if not ends and not log:
            room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
            low, high = low - room if low < 0 or low > room else 0.0, high + room
        self.low, self.high = (np.log10(low), np.log10(high)) if log else (low, high)
        locator = LogLocator(numticks=ticks) if log else MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10])
        inside = [value for value in locator.tick_values(low, high) if low <= value <= high * (1 + 1e-9)]
        self.ticks = [Tick(self(value), f"{value:.4g}") for value in inside]

    def __call__(self, value: float) -> float:
        share = ((np.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return round(float(self.start + share * (self.stop - self.start)), 1)


def line_chart(
    title: str, note: str, y_title: str, x_title: str, series: Sequence[Series],
    y_ends: tuple[float, float] | None = None, x_ticks: Sequence[int] | None = None, marks: Sequence[float] = (),
) -> Chart:  # fmt: skip
    """`x_ticks`: whole numbers at which the axis is marked and which lie inside it; None: wherever it looks well."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for y in [*(y for _, y in one.points), *(y for _, y, _ in one.dots)]]
    log = y_ends is None and min(ys) > 0 and max(ys) / min(ys) >= LOG_FROM
    x = Axis(xs, LEFT, WIDTH - RIGHT, (min(xs) - 0.3, max(xs) + 0.3) if x_ticks else (min(xs), max(max(xs), min(xs) + 1)))
    y = Axis(ys, HEIGHT - BOTTOM, TOP, y_ends, log)
    lines = [
        Line(one.number, one.label, " ".join(f"{x(a)},{y(b)}" for a, b in one.points), [Dot(x(a), y(b), text) for a, b, text in one.dots])
        for one in series
    ]  # fmt: skip
    last = "; ".join(f"{one.label} {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in series)
    says = f"{title}, {y_title or 'figures'} over {x_title}: {last}"
    at = [Tick(x(value), str(value)) for value in x_ticks] if x_ticks else x.ticks
    return Chart(title, f"{note}{', log scale' if log else ''}".lstrip(", "), says, y_title, x_title, at, y.ticks, lines, [x(mark) for mark in marks])


def box_chart(title: str, x_title: str, groups: dict[str, Sequence[float]], ends: tuple[float, float] | None, number: int) -> Boxes:
    """A box per group, one below the other: quartiles, whiskers of at most WHISKER interquartile ranges, and what lies outside them."""
    left = min(max(len(name) for name in groups) * LETTER + 10, 0.45 * WIDTH)
    axis = Axis([value for values in groups.values() for value in values], left, WIDTH - RIGHT, ends)
    boxes = []
    for row, (name, values) in enumerate(groups.items()):
        first, median, third = np.percentile(values, (25, 50, 75))
        inside = [value for value in values if first - WHISKER * (third - first) <= value <= third + WHISKER * (third - first)]
        low, high = min(inside), max(inside)
        says = f"{name}: median {median:.4g}, quartiles {first:.4g} and {third:.4g}, {len(values)} cases"
        outside = sorted({axis(value) for value in values if value < low or value > high})
        boxes.append(Box(name, 4 + ROW * (row + 0.5), *map(axis, (low, first, median, third, high)), outside, says))
    says = f"{title}, {x_title} by what was given; medians " + ", ".join(box.says.partition(", ")[0].replace(": median", "") for box in boxes)
    return Boxes(title, says, x_title, axis.ticks, boxes, 4 + ROW * len(boxes) + 34, left, number)
