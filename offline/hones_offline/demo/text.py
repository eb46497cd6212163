"""The demo's results as lines of text, each table from the summary alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from hones_offline.demo.measured import is_gain, rows_by_task
from hones_offline.demo.settings import COMPARED, DEFAULT
from hones_offline.report.titles import UNSTEERED, method_title

Summary = Mapping[str, Any]
Row = Mapping[str, Any]
_TITLES = {"grid_search": "one factor", "random": "random neurons"}


def title(way: str) -> str:
    """The name of a way of steering."""
    return _TITLES.get(way, method_title(way))


def headline(rows: Sequence[Row]) -> str:
    """One sentence on what steering gains; where the content of the answers does not gain, it says so."""
    steered = {task: ways[DEFAULT] for task, ways in rows_by_task(rows).items()}
    gained = [task for task, row in steered.items() if is_gain(row)]
    seen = [task for task, row in steered.items() if is_gain(row, "content_gain")]
    begin = f"Steering gains on {len(gained)} of {len(steered)} tasks"
    if not gained:
        return f"{begin}: every interval of a gain reaches down to zero."
    if not seen:
        return (
            f"{begin}; it teaches a convention, not sight: what the answers say, apart from their form, gains on none."
        )
    return f"{begin}; on {len(seen)} ({', '.join(seen)}) also in what the answers say, apart from their form."


def promise(summary: Summary) -> list[str]:
    """The first table: each task as it is, asked for in words and steered, with the size of the profile."""
    rows = summary["steering"]
    lines = ["", headline(rows), ""]
    lines.append(f"{'task':10} {'metric':13} {'n':>4}  {'plain':18} {'asked in words':18} {'steered':18} profile")
    for task, ways in rows_by_task(rows).items():
        cells = " ".join(f"{_value(ways[way]):18}" for way in (*UNSTEERED, DEFAULT))
        row = ways[DEFAULT]
        metric = summary["tasks"][task]["metric"]
        lines.append(f"{task:10} {metric:13} {row['n']:4d}  {cells} {row['bytes']:,} bytes")
    return lines


def content_table(summary: Summary) -> list[str]:
    """The same for the content of the answers, with its gain over the better of plain and asked in words."""
    rows = summary["steering"]
    lines = ["", "What the answers say, apart from their form (content, 0 to 1):", ""]
    lines.append(f"{'task':10} {'plain':>7} {'asked':>7} {'steered':>8}   gain over the better of plain and asked")
    for task, ways in rows_by_task(rows).items():
        plain, asked, steered = (_short(ways[way]["content"]) for way in (*UNSTEERED, DEFAULT))
        gain = _signed(ways[DEFAULT]["content_gain"], ways[DEFAULT]["content_gain_ci95"])
        lines.append(f"{task:10} {plain:>7} {asked:>7} {steered:>8}   {gain}")
    lines += ["", "The words are those of a few that are best on dev, for the metric and for the content each:", ""]
    for task, ways in rows_by_task(rows).items():
        both = dict.fromkeys((ways["asked"]["words"], ways["asked"]["content_words"]))
        lines.append(f"  {task:10} {' / '.join(both)}")
    return lines


def comparison_table(summary: Summary, note: str) -> list[str]:
    """The gain over the task as it is of every way of steering, one line each; `note` says what is not there."""
    by_task = rows_by_task(summary["steering"])
    ways = [way for way in next(iter(by_task.values())) if way not in UNSTEERED]
    lines = [
        "",
        "Other ways to steer, on the same scenes: gain over plain with its 95% interval, learned numbers, and what",
    ]
    lines += ["tasks gain on average where a request meets another task's:", ""]
    lines.append(f"{'':16}" + "".join(f"{task:22}" for task in by_task) + f"{'numbers':>9} {'wrong route':>12}")
    for way in ways:
        own = [by_task[task][way] for task in by_task if way in by_task[task]]
        cells = "".join(f"{_signed(row['gain'], row['gain_ci95']):22}" for row in own)
        numbers = sum(row["parameters"] for row in own) / len(own)
        elsewhere = sum(row["elsewhere_mean"] for row in own) / len(own)
        lines.append(f"{title(way):16}{cells}{numbers:9,.0f} {_short(elsewhere, '+'):>12}")
    lines += ["", f"What {title(DEFAULT)} gains more than others:", ""]
    for task, found in by_task.items():
        over = found[DEFAULT]["over"]
        parts = [f"{title(way)} {_signed(row['gain'], row['ci95'])}" for way, row in over.items()]
        lines.append(f"  {task:10} {'   '.join(parts)}")
    return [*lines, *([f"\n{note}"] if note else [])]


def masking_table(summary: Summary) -> list[str]:
    """The metric lost by the own task, and on average by the others, when each selection's bank is set to 0."""
    drops = {(row["task"], row["method"]): row for row in summary["masking"]}
    n = "/".join(str(task["n"]["test"]) for task in summary["tasks"].values())
    neurons = f"{COMPARED.fraction:.0%} of the neurons"
    lines = [
        "",
        f"Are these the task's own neurons? Metric lost by the own task / on average by the others when the {neurons} "
        f"that a selection takes are set to 0 (on {n} scenes):",
        "",
        f"{'':10}" + "".join(f"{title(method):>18}" for method in COMPARED.methods),
    ]
    for task in summary["tasks"]:
        cells = [drops[task, method] for method in COMPARED.methods]
        pairs = [f"{_short(row['own_drop'])} /{_short(row['own_drop'] - row['selectivity']):>6}" for row in cells]
        lines.append(f"{task:10}" + "".join(f"{pair:>18}" for pair in pairs))
    return lines


def _value(row: Row) -> str:
    low, high = row["ci95"]
    return f"{_short(row['value'])} [{_short(low)}, {_short(high)}]"


def _signed(gain: float, interval: Sequence[float]) -> str:
    low, high = (_short(bound, "+") for bound in interval)
    return f"{_short(gain, '+')} [{low}, {high}]"


def _short(value: float, sign: str = "") -> str:
    """A number between -1 and 1 with three decimals, without the zero before the point."""
    return f"{value:{sign}.3f}".replace("0.", ".", 1)
