"""The picture of a run: each task as it is, asked for in words and steered, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from hones_offline.demo.measured import rows_by_task
from hones_offline.demo.settings import DEFAULT
from hones_offline.demo.text import headline

_STYLE = """
    .txt { fill: #1f2328; } .dim { fill: #57606a; font-size: 12px; } .axis { stroke: #57606a; }
    .base { fill: #afb8c1; } .asked { fill: #6e7781; } .steered { fill: #2e7d8c; } .ci { stroke: #1f2328; }
    @media (prefers-color-scheme: dark) {
      .txt { fill: #e6edf3; } .dim { fill: #9da7b3; } .axis { stroke: #8b949e; } .ci { stroke: #e6edf3; }
      .base { fill: #484f58; } .asked { fill: #8b949e; } .steered { fill: #4aa3b4; }
    }
"""
_WIDTH, _LEFT, _LENGTH = 860, 150, 520
_BARS = {"base": "plain", "asked": "asked in words", DEFAULT: "steered"}
_TOP, _BAR, _TASK = 96, 20, 78


def picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a steering section as SVG text, for light and dark pages."""
    tasks = rows_by_task(rows)
    height = _TOP + _TASK * len(tasks) + 18
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" '
        f'font-size="14" role="img" aria-label="{escape(_described(tasks), {chr(34): "&quot;"})}">',
        f"<style>{_STYLE}</style>",
        *(_text(20, 26 + 20 * i, said, "txt", weight=600) for i, said in enumerate(headline(rows).split("; "))),
    ]
    x = _LEFT
    for way, title in _BARS.items():
        parts.append(f'<rect class="{_class(way)}" x="{x}" y="62" width="12" height="12"/>')
        parts.append(_text(x + 18, 73, title, "dim"))
        x += 40 + 8 * len(title)
    for i, (task, ways) in enumerate(tasks.items()):
        parts += _task(_TOP + i * _TASK, task, ways)
    bottom = _TOP + _TASK * len(tasks) - 12
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP - 6}" y2="{bottom}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _task(top: int, task: str, ways: Mapping[str, Mapping[str, Any]]) -> list[str]:
    steered = ways[DEFAULT]
    parts = [_text(20, top + 24, task, "txt", weight=600), _text(20, top + 42, f"{steered['bytes']:,} bytes", "dim")]
    for k, way in enumerate(_BARS):
        row, y = ways[way], top + k * _BAR
        low, high = (_LEFT + _LENGTH * bound for bound in row["ci95"])
        end = _LEFT + _LENGTH * row["value"]
        parts.append(f'<rect class="{_class(way)}" x="{_LEFT}" y="{y}" width="{end - _LEFT:.1f}" height="{_BAR - 4}"/>')
        parts.append(f'<line class="ci" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 8}" y2="{y + 8}"/>')
        gain = "" if way == "base" else f"  ({row['gain']:+.3f})"
        parts.append(_text(max(end, high) + 8, y + 13, f"{row['value']:.3f}{gain}", "dim"))
    return parts


def _class(way: str) -> str:
    return "steered" if way == DEFAULT else way


def _text(x: float, y: float, text: str, kind: str, *, weight: int = 400) -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y}" font-weight="{weight}">{escape(text)}</text>'


def _described(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The numbers in words, for those who hear the picture."""
    each = []
    for task, ways in tasks.items():
        values = [f"{title} {ways[way]['value']:.3f}" for way, title in _BARS.items()]
        each.append(f"{task}: {', '.join(values)}")
    return f"Bars of each task's metric. {'; '.join(each)}."
