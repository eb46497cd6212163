"""Figures of the report: which numbers of a summary go into which chart, one figure or a few for each task."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hones_offline.report.charts import Measured, Panel, bars, heat_map, lines, span, strips
from hones_offline.report.numbers import compact, percent
from hones_offline.report.rows import Row, Summary, by_task, highest_head, main_size_rows, rows_of
from hones_offline.report.titles import is_ours, method_title, place

MASKING_MEASURES = {"own_drop": "own drop", "selectivity": "selectivity"}
GAIN = {"gain": "gain over base"}
SELECTION_MEASURES = {**GAIN, "elsewhere_mean": "on other tasks"}


@dataclass(frozen=True)
class Figure:
    """SVG text and what stands above it."""

    caption: str
    svg: str


def head_maps(summary: Summary) -> list[Figure]:
    """A heat map of head scores for each task."""
    figures = []
    for row in rows_of(summary, "heads"):
        _, layer, head = highest_head(row["scores"])
        alt = (
            f"Heat map of {row['task']}: score of every head; the highest is layer {layer}, head {head}. "
            "Numbers in the table."
        )
        chosen = {(layer, head) for layer, head, _ in row["chosen"]}
        figures.append(Figure(row["task"], heat_map(row["scores"], chosen, alt)))
    return figures


def neuron_strips(summary: Summary) -> list[Figure]:
    """A strip of layers for each method, task by task; no figure for a task without methods."""
    figures = []
    for task, methods in summary["neurons_per_layer"].items():
        counts = {method_title(method): methods[method] for method in sorted(methods, key=place)}
        alt = f"Neurons per layer of {task} for {', '.join(counts)}. Numbers in the table."
        if counts:
            figures.append(Figure(task, strips(counts, "neurons", alt)))
    return figures


def masking_bars(summary: Summary) -> list[Figure]:
    """Own drop and, where there are several tasks, selectivity of each method; all tasks on one scale."""
    main = main_size_rows(summary)
    domains = {measure: _domain(main, measure) for measure in MASKING_MEASURES}
    figures = []
    for task, rows in by_task(main).items():
        titles = [method_title(row["method"]) for row in rows]
        ours = [method_title(row["method"]) for row in rows if is_ours(row["method"])]
        panels = [
            Panel(title, [_measured(row, measure) for row in rows], domains[measure])
            for measure, title in MASKING_MEASURES.items()
            if any(measure in row for row in rows)
        ]
        sizes = ", ".join(dict.fromkeys(percent(row["fraction"]) for row in rows))
        alt = f"Own drop and selectivity of {task} for {', '.join(titles)}, with intervals. Numbers in the table."
        figures.append(Figure(f"{task}, {sizes} of neurons", bars(titles, ours, panels, alt)))
    return figures


def bank_size_curves(summary: Summary) -> list[Figure]:
    """Own drop, then selectivity, of each task against bank size, a curve for each method."""
    figures = []
    for measure, title in MASKING_MEASURES.items():
        for task, rows in by_task(rows_of(summary, "masking")).items():
            sizes = {size: percent(size) for size in sorted({row["fraction"] for row in rows})}
            curves: dict[str, list[tuple[float, Measured]]] = defaultdict(list)
            for row in sorted(rows, key=lambda row: row["fraction"]):
                measured = _measured(row, measure)
                if measured:
                    curves[method_title(row["method"])].append((row["fraction"], measured))
            alt = f"{title} of {task} against bank size for {', '.join(curves)}. Numbers in the table."
            if curves:
                figures.append(Figure(f"{task}, {title}", lines(curves, sizes, title, alt, logarithmic=True)))
    return figures


def steering_bars(summary: Summary) -> list[Figure]:
    """Gain over the untouched model, steered and by the baselines; all tasks on one scale."""
    gains = [row for row in rows_of(summary, "steering") if "gain" in row]
    ours = [row["method"] for row in gains if row["method"] == "hones" or is_ours(row["method"])]
    return [_gain_bars(task, rows, gains, ours, GAIN) for task, rows in by_task(gains).items()]


def selection_bars(summary: Summary) -> list[Figure]:
    """Gain on the own task and on the others of each selection and comparator, on average, then task by task."""
    rows = rows_of(summary, "selections")
    means = sorted(summary["selections"]["means"], key=lambda row: place(row["method"]))
    ours = [row["method"] for row in means if is_ours(row["method"])]
    of_each = {"mean over tasks": means, **by_task(rows)}
    return [_gain_bars(name, of, [*means, *rows], ours, SELECTION_MEASURES) for name, of in of_each.items()]


def _gain_bars(
    caption: str, rows: Sequence[Row], scaled: Sequence[Row], ours: Collection[str], measures: Mapping[str, str]
) -> Figure:
    """Bars of some measures of gain; `scaled` are the rows that must be inside each measure's axis."""
    titles = [method_title(row["method"]) for row in rows]
    panels = [
        Panel(title, [_measured(row, measure) for row in rows], _domain(scaled, measure))
        for measure, title in measures.items()
        if any(measure in row for row in rows)
    ]
    alt = f"Gain over the untouched model, {caption}, for {', '.join(titles)}, with intervals. Numbers in the table."
    return Figure(caption, bars(titles, [method_title(method) for method in ours], panels, alt))


def strength_curves(summary: Summary) -> list[Figure]:
    """Each task's metric against the strength of its profile, beside the untouched model's."""
    figures = []
    for task, rows in by_task(rows_of(summary, "strength")).items():
        points = [(row["strength"], Measured(row["value"], row["ci95"])) for row in rows]
        labels = {row["strength"]: compact(row["strength"]) for row in rows}
        base = ("base", summary["tasks"][task]["base"])
        alt = f"{task} against the strength of its profile. Numbers in the table."
        chart = lines({"steered": points}, labels, summary["tasks"][task]["metric"], alt, level=base)
        figures.append(Figure(task, chart))
    return figures


def _measured(row: Row, measure: str) -> Measured | None:
    """A row's value of a measure with its interval, None where it was not measured."""
    return Measured(row[measure], row.get(f"{measure}_ci95")) if measure in row else None


def _domain(rows: Iterable[Row], measure: str) -> tuple[float, float]:
    """A range that holds zero and every row's value and interval of a measure."""
    measured = [_measured(row, measure) for row in rows]
    values = [value for bar in measured if bar for value in bar.reach]
    return span(values or [0.0])
