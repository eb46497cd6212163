"""Charts for the report's page, as SVG text, all as wide as a phone.

Colors are classes and variables of the page's style sheet, so that one drawing serves light and dark. Text is escaped
by ElementTree. Tables beside the charts hold the numbers, so a screen reader is given one sentence (`alt`) instead of
marks.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree import ElementTree

from hones_offline.report.numbers import change, compact, number

WIDTH = 340.0
SIDE = 128.0  # for the names of rows and series
LETTER = 6.1  # width of a letter in the charts' 11 pixel type, rather too wide than too narrow
COLORS = 8  # classes s0 to s7 of the style sheet
SVG = ElementTree.Element


class Measured(NamedTuple):
    """A value and, where there is one, its 95% interval (low, high)."""

    value: float
    ci95: Sequence[float] | None = None

    @property
    def reach(self) -> list[float]:
        """Every number that must be inside the chart."""
        return [self.value, *(self.ci95 or ())]


@dataclass(frozen=True)
class Panel:
    """One measure of all rows of `bars`, None where it was not measured, on an axis from domain[0] to domain[1]."""

    title: str
    values: Sequence[Measured | None]
    domain: tuple[float, float]


def heat_map(scores: Sequence[Sequence[float]], chosen: Collection[tuple[int, int]], alt: str) -> str:
    """Head scores (layers x heads) around zero; `chosen` are the (layer, head) to ring.

    A color's strength is the square root of |score|; in proportion to it, one extreme would hide the rest.
    """
    layers, heads = len(scores), len(scores[0])
    left, top, largest = 30.0, 4.0, max(abs(score) for row in scores for score in row) or 1.0
    width, height = min((WIDTH - left) / heads, 40.0), min(max(290 / layers, 5.0), 18.0)
    bottom = top + layers * height
    svg = _svg(bottom + 66, alt)
    frame = _add(svg, "g", class_="cells")
    _add(frame, "rect", class_="ground", x=left, y=top, width=heads * width, height=layers * height)
    for layer, row in enumerate(scores):
        for head, score in enumerate(row):
            cell = {"x": left + head * width, "y": top + layer * height, "width": width, "height": height}
            mark = _add(frame, "rect", class_=_sign(score), fill_opacity=math.sqrt(abs(score) / largest), **cell)
            is_chosen = (layer, head) in chosen
            _title(mark, f"layer {layer}, head {head}: {change(score, 4)}{', chosen' if is_chosen else ''}")
    for layer, head in sorted(chosen):  # last, so that no neighbor paints over the ring
        box = {"x": left + head * width + 1, "y": top + layer * height + 1, "width": width - 2, "height": height - 2}
        _add(frame, "rect", class_="ring", **box)
    for layer in _spaced(layers, (bottom - top) / 14):
        _add(svg, "text", str(layer), class_="end", x=left - 5, y=top + (layer + 0.5) * height + 4)
    for head in _spaced(heads, heads * width / 18):
        _add(svg, "text", str(head), class_="middle", x=left + (head + 0.5) * width, y=bottom + 13)
    _add(svg, "text", "layer ↓  head →", x=left, y=bottom + 28)
    _legend(svg, largest, left, bottom + 38)
    return _text(svg)


def _legend(svg: SVG, largest: float, left: float, top: float) -> None:
    """The heat map's colors with the scores they stand for, even steps of color from -largest to largest."""
    for i, share in enumerate((-1, -0.25, -0.0625, 0, 0.0625, 0.25, 1)):
        x = left + i * 44
        _add(svg, "rect", class_="ground", x=x, y=top, width=44, height=8)
        _add(svg, "rect", class_=_sign(share), fill_opacity=math.sqrt(abs(share)), x=x, y=top, width=44, height=8)
        _add(svg, "text", change(share * largest), class_="middle", x=x + 22, y=top + 20)


def strips(rows: Mapping[str, Sequence[float]], unit: str, alt: str) -> str:
    """A strip of cells for each name, one cell per layer; all on one scale from zero, in `unit`."""
    layers, height, largest = len(next(iter(rows.values()))), 17.0, max(map(max, rows.values())) or 1.0
    width, bottom = (WIDTH - SIDE) / layers, 4 + 17.0 * len(rows)
    svg = _svg(bottom + 32, alt)
    for i, (name, values) in enumerate(rows.items()):
        y = 4 + i * height
        _name(svg, name, y + 11)
        _add(svg, "rect", class_="ground", x=SIDE, y=y, width=WIDTH - SIDE, height=height - 3)
        for layer, value in enumerate(values):
            cell = {"x": SIDE + layer * width, "y": y, "width": width, "height": height - 3}
            mark = _add(svg, "rect", class_="amount", fill_opacity=value / largest, **cell)
            _title(mark, f"{name}, layer {layer}: {number(value)} {unit}")
    for layer in _spaced(layers, (WIDTH - SIDE) / 22):
        _add(svg, "text", str(layer), class_="middle", x=SIDE + (layer + 0.5) * width, y=bottom + 10)
    _add(svg, "text", f"layer →   darkest: {number(largest)} {unit}", x=SIDE, y=bottom + 26)
    return _text(svg)


def bars(names: Sequence[str], ours: Collection[str], panels: Sequence[Panel], alt: str) -> str:
    """Horizontal bars with intervals, a panel per measure; names in `ours` stand out."""
    row, gap, top = 20.0, 12.0, 20.0
    width = (WIDTH - SIDE - gap * len(panels)) / len(panels)
    bottom = top + row * len(names)
    svg = _svg(bottom + 18, alt)
    for i, name in enumerate(names):
        _name(svg, name, top + i * row + 13, strong=name in ours)
    for p, panel in enumerate(panels):
        low, high = panel.domain
        left = SIDE + p * (width + gap)
        scale = _Scale(low, high, left, left + width)
        _add(svg, "text", panel.title, class_="head", x=scale(0) if low == 0 else left, y=11)
        for tick in _ticks(low, high, 3):
            _add(svg, "line", class_="axis" if tick == 0 else "grid", x1=scale(tick), x2=scale(tick), y1=top, y2=bottom)
            _add(svg, "text", compact(tick), class_="middle", x=scale(tick), y=bottom + 13)
        for i, (name, measured) in enumerate(zip(names, panel.values, strict=True)):
            if measured:
                _bar(svg, scale, measured, top + i * row, f"{name}, {panel.title}", name in ours)
    return _text(svg)


def _bar(svg: SVG, scale: "_Scale", measured: Measured, top: float, name: str, ours: bool) -> None:
    """One bar from zero with its interval, in a row whose upper edge is `top`."""
    group = _add(svg, "g", class_="ours" if ours else "other")
    _title(group, f"{name}: {_described(measured)}")
    start, end = sorted((scale(0), scale(measured.value)))
    _add(group, "rect", class_="bar", x=start, y=top + 4, width=max(end - start, 0.8), height=11)
    if measured.ci95:
        low, high = map(scale, measured.ci95)
        _add(group, "line", class_="ci", x1=low, x2=high, y1=top + 9.5, y2=top + 9.5)


def lines(
    series: Mapping[str, Sequence[tuple[float, Measured]]],
    x_labels: Mapping[float, str],
    y_title: str,
    alt: str,
    *,
    logarithmic: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """Curves named at their ends.

    Args:
        series: name -> its points (x, measured), ascending.
        x_labels: every x that occurs, ascending, with its label.
        y_title: name of the vertical axis.
        alt: the sentence for screen readers.
        logarithmic: whether the x axis is logarithmic.
        level: name and height of a dashed line to compare with.
    """
    left, top, bottom, right = 36.0, 22.0, 196.0, WIDTH - SIDE + 8
    transform = math.log if logarithmic else float
    ys = [y for points in series.values() for _, measured in points for y in measured.reach]
    low, high = span([*ys, *([level[1]] if level else [])], zero=level is None)
    xs = [transform(x) for x in x_labels]
    to_x, to_y = _Scale(min(xs), max(xs), left + 8, right - 8), _Scale(low, high, bottom, top)
    svg = _svg(bottom + 22, alt)
    _add(svg, "text", y_title, class_="head", x=0, y=11)
    for tick in _ticks(low, high, 5):
        _add(svg, "line", class_="axis" if tick == 0 else "grid", x1=left, x2=right, y1=to_y(tick), y2=to_y(tick))
        _add(svg, "text", compact(tick), class_="end", x=left - 5, y=to_y(tick) + 4)
    for x, label in x_labels.items():
        _add(svg, "text", label, class_="middle", x=to_x(transform(x)), y=bottom + 16)
    ends = {}
    if level:
        _add(svg, "line", class_="level", x1=left, x2=right, y1=to_y(level[1]), y2=to_y(level[1]))
        ends[level[0]] = (right, to_y(level[1]), "level")
    spacing = min(2.4, 14 / len(series))  # side by side, or the intervals would hide each other
    for i, (name, points) in enumerate(series.items()):
        offset = (i - (len(series) - 1) / 2) * spacing
        color = f"s{i % COLORS}{' again' if i >= COLORS else ''}"
        marks = [(to_x(transform(x)) + offset, x_labels[x], measured) for x, measured in points]
        ends[name] = (*_curve(svg, name, color, marks, to_y), color)
    _name_ends(svg, ends, right + 14, top, bottom)
    return _text(svg)


def _curve(
    svg: SVG, name: str, color: str, marks: Sequence[tuple[float, str, Measured]], scale: "_Scale"
) -> tuple[float, float]:
    """A curve through its marks (x, label, measured) with their intervals; returns where it ends."""
    group = _add(svg, "g", class_=color)
    points = [(x, scale(measured.value)) for x, _, measured in marks]
    _add(group, "polyline", class_="curve", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))
    for (x, y), (_, label, measured) in zip(points, marks, strict=True):
        mark = _add(group, "g")
        _title(mark, f"{name}, {label}: {_described(measured)}")
        if measured.ci95:
            _add(mark, "line", class_="ci", x1=x, x2=x, y1=scale(measured.ci95[0]), y2=scale(measured.ci95[1]))
        _add(mark, "circle", cx=x, cy=y, r=2.4)
    return points[-1]


def _name_ends(svg: SVG, ends: Mapping[str, tuple[float, float, str]], left: float, top: float, bottom: float) -> None:
    """Names beside the curves' ends, pushed apart where they would overlap, with a thin line to their end.

    `ends` holds name -> (x, y, class) of each.
    """
    step = min(13.0, (bottom - top) / len(ends))
    order = sorted(ends, key=lambda name: ends[name][1])
    ys: list[float] = []
    for i, name in enumerate(order):
        lowest = bottom - (len(order) - 1 - i) * step  # leaves room for the names that follow
        ys.append(min(max(ends[name][1], ys[-1] + step if ys else top), lowest))
    for name, y in zip(order, ys, strict=True):
        x, end, color = ends[name]
        group = _add(svg, "g", class_=color)
        leader = f"{x + 4:.1f},{end:.1f} {left - 8:.1f},{y:.1f} {left - 3:.1f},{y:.1f}"
        _add(group, "polyline", class_="leader", points=leader)
        label = _add(svg, "text", _fitting(name, WIDTH - left), x=left, y=y + 4)
        _title(label, name)


def span(values: Sequence[float], *, zero: bool = True) -> tuple[float, float]:
    """The values' lowest and highest and, with `zero`, 0, with a margin; never an empty range."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        margin = abs(low) / 20 or 0.05
        return low - margin, high + margin
    margin = 0.04 * (high - low)
    return (low - margin if low or not zero else low), (high + margin if high or not zero else high)


class _Scale:
    """A linear map of the numbers from low to high onto the positions from start to end."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start = low, start
        self.unit = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.unit


def _ticks(low: float, high: float, at_most: int) -> list[float]:
    """Round numbers between low and high, about `at_most` of them."""
    size = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= size * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _spaced(count: int, at_most: float) -> range:
    """Evenly spaced indices from 0 below `count`, no more than `at_most` but at least one."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    return range(0, count, next((step for step in steps if count / step <= max(at_most, 1)), count))


def _described(measured: Measured) -> str:
    """A value and its interval as text: +0.0410 [+0.0200, +0.0620]."""
    interval = f" [{change(measured.ci95[0], 4)}, {change(measured.ci95[1], 4)}]" if measured.ci95 else ""
    return f"{change(measured.value, 4)}{interval}"


def _sign(value: float) -> str:
    """The style sheet's class for a number's color."""
    return "negative" if value < 0 else "positive"


def _svg(height: float, alt: str) -> SVG:
    """An empty chart of the common width."""
    size = {"viewBox": f"0 0 {WIDTH:g} {height:g}", "width": f"{WIDTH:g}", "height": f"{height:g}"}
    return SVG("svg", {**size, "role": "img", "aria-label": alt})


def _add(parent: SVG, tag: str, text: str = "", /, **attributes: float | str) -> SVG:
    """Append an element; `fill_opacity` becomes fill-opacity, `class_` becomes class, numbers are rounded to 0.01."""
    named = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{round(value, 2):g}"
        for name, value in attributes.items()
    }
    element = ElementTree.SubElement(parent, tag, named)
    element.text = text or None
    return element


def _title(element: SVG, text: str) -> None:
    """Give an element the text shown when it is pointed at."""
    title = ElementTree.SubElement(element, "title")
    title.text = text


def _name(svg: SVG, name: str, y: float, *, strong: bool = False) -> None:
    """Write a row's name at the chart's left, in full when it is pointed at."""
    label = _add(svg, "text", _fitting(name, SIDE - 8), class_="end strong" if strong else "end", x=SIDE - 8, y=y)
    _title(label, name)


def _fitting(name: str, width: float) -> str:
    """The name, cut with an ellipsis if it is wider than `width` pixels."""
    letters = int(width / LETTER)
    return name if len(name) <= letters else name[: letters - 1] + "…"


def _text(svg: SVG) -> str:
    return ElementTree.tostring(svg, encoding="unicode")
