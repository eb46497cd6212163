"""Charts for the report's page, as SVG text. Colours are classes and variables of the page's style sheet, so that one
drawing serves light and dark. Text is escaped by ElementTree. All are as wide as a phone; tables beside them hold the
numbers, so a chart's marks are hidden from screen readers behind one sentence (`alt`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree import ElementTree

from hones_offline.report.numbers import change, number

WIDTH = 340.0
SIDE = 128.0  # for the names of rows and series
LETTER = 6.1  # the width of a letter of the charts' 11 pixel type, rather too much
COLOURS = 8
SVG = ElementTree.Element


class Measured(NamedTuple):
    """A value and, where there is one, its 95% interval."""

    value: float
    ci95: Sequence[float] | None = None

    @property
    def reach(self) -> list[float]:
        """All numbers that must be inside the chart."""
        return [self.value, *(self.ci95 or ())]


@dataclass(frozen=True)
class Panel:
    """One measure of all rows of `bars`; None where it was not measured."""

    title: str
    values: Sequence[Measured | None]
    domain: tuple[float, float]


def heat_map(scores: Sequence[Sequence[float]], chosen: Collection[tuple[int, int]], alt: str) -> str:
    """Layers x heads around zero. A colour's strength is the square root of |score|, or one extreme hides the rest."""
    layers, heads = len(scores), len(scores[0])
    left, top, most = 30.0, 4.0, max(abs(score) for row in scores for score in row) or 1.0
    width, height = min((WIDTH - left) / heads, 40.0), min(max(290 / layers, 5.0), 18.0)
    bottom = top + layers * height
    svg = _svg(bottom + 66, alt)
    frame = _add(svg, "g", class_="cells")
    _add(frame, "rect", class_="ground", x=left, y=top, width=heads * width, height=layers * height)
    for layer, row in enumerate(scores):
        for head, score in enumerate(row):
            cell = {"x": left + head * width, "y": top + layer * height, "width": width, "height": height}
            mark = _add(frame, "rect", class_=_sign(score), fill_opacity=math.sqrt(abs(score) / most), **cell)
            is_chosen = (layer, head) in chosen
            _title(mark, f"layer {layer}, head {head}: {change(score, 4)}{', chosen' if is_chosen else ''}")
    for layer, head in sorted(chosen):  # last, so that no neighbour paints over the ring
        box = {"x": left + head * width + 1, "y": top + layer * height + 1, "width": width - 2, "height": height - 2}
        _add(frame, "rect", class_="ring", **box)
    for layer in _every(layers, (bottom - top) / 14):
        _add(svg, "text", str(layer), class_="end", x=left - 5, y=top + (layer + 0.5) * height + 4)
    for head in _every(heads, heads * width / 18):
        _add(svg, "text", str(head), class_="middle", x=left + (head + 0.5) * width, y=bottom + 13)
    _add(svg, "text", "layer ↓  head →", x=left, y=bottom + 28)
    _legend(svg, most, left, bottom + 38)
    return _text(svg)


def _legend(svg: SVG, most: float, left: float, top: float) -> None:
    for i, share in enumerate((-1, -0.25, -0.0625, 0, 0.0625, 0.25, 1)):
        x = left + i * 44
        _add(svg, "rect", class_="ground", x=x, y=top, width=44, height=8)
        _add(svg, "rect", class_=_sign(share), fill_opacity=math.sqrt(abs(share)), x=x, y=top, width=44, height=8)
        _add(svg, "text", change(share * most), class_="middle", x=x + 22, y=top + 20)


def strips(rows: Mapping[str, Sequence[float]], of: str, alt: str) -> str:
    """One strip of cells per row, all on one scale from zero: name -> a number for each layer."""
    layers, height, most = len(next(iter(rows.values()))), 17.0, max(map(max, rows.values())) or 1.0
    width, bottom = (WIDTH - SIDE) / layers, 4 + 17.0 * len(rows)
    svg = _svg(bottom + 32, alt)
    for i, (name, values) in enumerate(rows.items()):
        y = 4 + i * height
        _name(svg, name, y + 11)
        _add(svg, "rect", class_="ground", x=SIDE, y=y, width=WIDTH - SIDE, height=height - 3)
        for layer, value in enumerate(values):
            cell = {"x": SIDE + layer * width, "y": y, "width": width, "height": height - 3}
            mark = _add(svg, "rect", class_="amount", fill_opacity=value / most, **cell)
            _title(mark, f"{name}, layer {layer}: {number(value)} {of}")
    for layer in _every(layers, (WIDTH - SIDE) / 22):
        _add(svg, "text", str(layer), class_="middle", x=SIDE + (layer + 0.5) * width, y=bottom + 10)
    _add(svg, "text", f"layer →   darkest: {number(most)} {of}", x=SIDE, y=bottom + 26)
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
            _add(svg, "text", f"{tick:g}".replace("-", "−"), class_="middle", x=scale(tick), y=bottom + 13)
        for i, (name, measured) in enumerate(zip(names, panel.values, strict=True)):
            if measured:
                _bar(svg, scale, measured, top + i * row, f"{name}, {panel.title}", name in ours)
    return _text(svg)


def _bar(svg: SVG, scale: "_Scale", measured: Measured, top: float, name: str, ours: bool) -> None:
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
    """Curves over the given x, named at their ends; `level` is a dashed line to compare with."""
    left, top, bottom, right = 36.0, 22.0, 196.0, WIDTH - SIDE + 8
    transform = math.log if logarithmic else float
    shown = [y for points in series.values() for _, measured in points for y in measured.reach]
    low, high = span([*shown, *([level[1]] if level else [])], zero=level is None)
    xs = [transform(x) for x in x_labels]
    across, up = _Scale(min(xs), max(xs), left + 8, right - 8), _Scale(low, high, bottom, top)
    svg = _svg(bottom + 22, alt)
    _add(svg, "text", y_title, class_="head", x=0, y=11)
    for tick in _ticks(low, high, 5):
        _add(svg, "line", class_="axis" if tick == 0 else "grid", x1=left, x2=right, y1=up(tick), y2=up(tick))
        _add(svg, "text", f"{tick:g}".replace("-", "−"), class_="end", x=left - 5, y=up(tick) + 4)
    for x, label in x_labels.items():
        _add(svg, "text", label, class_="middle", x=across(transform(x)), y=bottom + 16)
    ends = {}
    if level:
        _add(svg, "line", class_="level", x1=left, x2=right, y1=up(level[1]), y2=up(level[1]))
        ends[level[0]] = (right, up(level[1]), "level")
    apart = min(2.4, 14 / len(series))  # or the intervals would hide each other
    for i, (name, points) in enumerate(series.items()):
        aside = (i - (len(series) - 1) / 2) * apart
        colour = f"s{i % COLOURS}{' again' if i >= COLOURS else ''}"
        at = [(across(transform(x)) + aside, up(measured.value)) for x, measured in points]
        group = _add(svg, "g", class_=colour)
        _add(group, "polyline", class_="curve", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in at))
        for (x, y), (value, measured) in zip(at, points, strict=True):
            mark = _add(group, "g")
            _title(mark, f"{name}, {x_labels[value]}: {_described(measured)}")
            if measured.ci95:
                _add(mark, "line", class_="ci", x1=x, x2=x, y1=up(measured.ci95[0]), y2=up(measured.ci95[1]))
            _add(mark, "circle", cx=x, cy=y, r=2.4)
        ends[name] = (*at[-1], colour)
    _name_ends(svg, ends, right + 14, top, bottom)
    return _text(svg)


def _name_ends(svg: SVG, ends: Mapping[str, tuple[float, float, str]], left: float, top: float, bottom: float) -> None:
    """Names beside the curves' ends, pushed apart where they would overlap, with a thin line to where they belong."""
    step = min(13.0, (bottom - top) / len(ends))
    order = sorted(ends, key=lambda name: ends[name][1])
    ys: list[float] = []
    for i, name in enumerate(order):
        room = bottom - (len(order) - 1 - i) * step  # for those that follow
        ys.append(min(max(ends[name][1], ys[-1] + step if ys else top), room))
    for name, y in zip(order, ys, strict=True):
        x, end, colour = ends[name]
        group = _add(svg, "g", class_=colour)
        leader = f"{x + 4:.1f},{end:.1f} {left - 8:.1f},{y:.1f} {left - 3:.1f},{y:.1f}"
        _add(group, "polyline", class_="leader", points=leader)
        label = _add(svg, "text", _fitting(name, WIDTH - left), x=left, y=y + 4)
        _title(label, name)


def span(values: Sequence[float], *, zero: bool = True) -> tuple[float, float]:
    """The values' lowest and highest, a little wider, with 0 if asked for; never empty."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        room = abs(low) / 20 or 0.05
        return low - room, high + room
    margin = 0.04 * (high - low)
    return (low - margin if low or not zero else low), (high + margin if high or not zero else high)


class _Scale:
    """Numbers from low to high, as positions from start to end."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start = low, start
        self.unit = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.unit


def _ticks(low: float, high: float, at_most: int) -> list[float]:
    """Round numbers between low and high."""
    size = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= size * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _every(count: int, at_most: float) -> range:
    """Evenly spaced indices below `count`, from 0, not more than there is room for."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    return range(0, count, next((step for step in steps if count / step <= max(at_most, 1)), count))


def _described(measured: Measured) -> str:
    interval = f" [{change(measured.ci95[0], 4)}, {change(measured.ci95[1], 4)}]" if measured.ci95 else ""
    return f"{change(measured.value, 4)}{interval}"


def _sign(value: float) -> str:
    return "negative" if value < 0 else "positive"


def _svg(height: float, alt: str) -> SVG:
    size = {"viewBox": f"0 0 {WIDTH:g} {height:g}", "width": f"{WIDTH:g}", "height": f"{height:g}"}
    return SVG("svg", {**size, "role": "img", "aria-label": alt})


def _add(parent: SVG, tag: str, text: str = "", /, **attributes: float | str) -> SVG:
    named = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{round(value, 2):g}"
        for name, value in attributes.items()
    }
    element = ElementTree.SubElement(parent, tag, named)
    element.text = text or None
    return element


def _title(element: SVG, text: str) -> None:
    title = ElementTree.SubElement(element, "title")
    title.text = text


def _name(svg: SVG, name: str, y: float, *, strong: bool = False) -> None:
    label = _add(svg, "text", _fitting(name, SIDE - 8), class_="end strong" if strong else "end", x=SIDE - 8, y=y)
    _title(label, name)


def _fitting(name: str, width: float) -> str:
    letters = int(width / LETTER)
    return name if len(name) <= letters else name[: letters - 1] + "…"


def _text(svg: SVG) -> str:
    return ElementTree.tostring(svg, encoding="unicode")
