"""A summary as the report's sections: what each one is, on how much it rests, its charts and its tables.

Page and JSON are made of the same `Section`s, so they hold the same numbers. A section that was not run says so.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hones_offline.report.charts import Measured, Panel, bars, heat_map, lines, span, strips
from hones_offline.report.summary import seeds_of, unknown
from hones_offline.report.wording import MASKING, is_ours, method_name, percent, place

Summary = Mapping[str, Any]
Row = Mapping[str, Any]
Cell = str | int | float | None | Mapping[str, Any]
"""Text, a number, nothing (not measured), or {"value": number, "ci95": [low, high] or None}."""

SPREAD = {"one": "one task's alone", "pair": "shared by two", "triple": "shared by three", "all": "shared by all"}


@dataclass(frozen=True)
class Column:
    """A column's title and how its numbers are written: value, change (with sign), percent, number or text."""

    title: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows of cells; in a shaded one numbers colour their cells, full strength at `shade`."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    shade: float | None = None
    folded: bool = False
    """Shown when the reader unfolds it."""

    @property
    def groups(self) -> list[tuple[Cell, list[Sequence[Cell]]]]:
        """Neighbouring rows with the same first cell."""
        groups: list[tuple[Cell, list[Sequence[Cell]]]] = []
        for row in self.rows:
            if not groups or groups[-1][0] != row[0]:
                groups.append((row[0], []))
            groups[-1][1].append(row)
        return groups


@dataclass(frozen=True)
class Figure:
    """SVG text and what stands above it."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A part of the report. `examples` says on how many of which `split` it rests, task by task."""

    name: str
    title: str
    what: str
    not_run: str | None = None
    split: str = "test"
    examples: Mapping[str, int] = field(default_factory=dict)
    seeds: Sequence[int] | None = ()
    """Numbers of seeds that occur; None where nothing is drawn."""
    intervals: bool = False
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    @property
    def basis(self) -> str:
        """n, seeds and intervals in one line."""
        counts = sorted(set(self.examples.values()))
        each = ", ".join(f"{task} {n:,}" for task, n in self.examples.items())
        parts = [f"n = {counts[0]:,} {self.split} examples of each task" if len(counts) == 1 else ""]
        parts += [f"n = {counts[0]:,}–{counts[-1]:,} {self.split} examples ({each})" if len(counts) > 1 else ""]
        parts += ["" if counts else "n not recorded"]
        if self.seeds is not None:
            plural = "" if list(self.seeds) == [1] else "s"
            parts += [f"{'–'.join(map(str, self.seeds))} seed{plural} of data" if self.seeds else "seeds not recorded"]
        parts += ["95% intervals in brackets" if self.intervals else "no intervals"]
        return " · ".join(filter(None, parts))

    def as_json(self) -> dict[str, Any]:
        """What `hones report --json` holds of it."""
        if self.not_run:
            return {"name": self.name, "title": self.title, "what": self.what, "not_run": self.not_run}
        return {
            "name": self.name,
            "title": self.title,
            "what": self.what,
            "n": {"split": self.split, "examples": dict(self.examples)},
            "seeds": None if self.seeds is None else list(self.seeds),
            "intervals": "95%" if self.intervals else None,
            "notes": list(self.notes),
            "tables": [
                {"caption": t.caption, "columns": [c.title for c in t.columns], "rows": [list(row) for row in t.rows]}
                for t in self.tables
            ],
        }


def sections(summary: Summary) -> list[Section]:
    """Every section, in the page's order, of a summary that `read_summary` has checked."""
    return [build(summary) for build in BUILDERS]


def _tasks(summary: Summary) -> Section:
    tasks = summary["tasks"]
    splits = list(dict.fromkeys(split for task in tasks.values() for split in task["n"]))
    splits.sort(key=lambda split: _SPLITS.index(split) if split in _SPLITS else len(_SPLITS))
    rows = [
        [name, task["metric"], _cell(task["base"], task["base_ci95"]), *(task["n"].get(split) for split in splits)]
        for name, task in tasks.items()
    ]
    columns = [Column("task"), Column("metric"), Column("untouched model", "value")]
    return Section(
        "tasks",
        "Tasks",
        "What the untouched model scores on each task; every drop and gain below is measured from here.",
        examples=_test_n(summary),
        seeds=None,
        intervals=True,
        tables=[Table("Tasks and examples", [*columns, *(Column(f"{s} examples", "number") for s in splits)], rows)],
    )


_SPLITS = ("discovery", "attribution", "dev", "test")


def _heads(summary: Summary) -> Section:
    title = "Heads found"
    what = (
        "What replacing one attention head by the mean of its layer's others costs the task: orange costs, blue helps. "
        "Ringed heads were chosen to guide the search for neurons."
    )
    found = summary.get("heads")
    if not found:
        return _not_run("heads", title, what, "heads")
    by = {"task": "the task's metric", "logprob": "the answers' log-probability"}
    figures, overview, chosen, scores = [], [], [], []
    heads = range(summary["model"]["num_heads"])
    for task, one in found.items():
        at = {(layer, head) for layer, head, _ in one["chosen"]}
        best, layer, head = max((s, i, j) for i, row in enumerate(one["scores"]) for j, s in enumerate(row))
        alt = (
            f"Heat map of {task}: score of every head; the highest is layer {layer}, head {head}. Numbers in the table."
        )
        figures.append(Figure(task, heat_map(one["scores"], at, alt)))
        lowest = min(map(min, one["scores"]))
        overview.append([task, by[one["metric"]], best, layer, head, lowest, len(at), one["n"], one["seeds"]])
        chosen += [[task, layer, head, one["scores"][layer][head], weight] for layer, head, weight in one["chosen"]]
        scores += [[task, i, *row] for i, row in enumerate(one["scores"])]
    columns = [Column("task"), Column("scored by"), Column("highest score", "change"), Column("in layer", "number")]
    columns += [Column("head", "number"), Column("lowest score", "change")]
    columns += [Column(name, "number") for name in ("heads chosen", "n", "seeds")]
    picked = [Column("task"), Column("layer", "number"), Column("head", "number"), Column("mean score", "change")]
    every = [Column("task"), Column("layer", "number"), *(Column(f"head {head}", "change") for head in heads)]
    return Section(
        "heads",
        title,
        what,
        split="attribution",
        examples={task: one["n"] for task, one in found.items()},
        seeds=seeds_of(found.values()),
        figures=figures,
        tables=[
            Table("Head scores, mean over seeds", columns, overview),
            Table("The chosen heads of the first seed", [*picked, Column("weight", "value")], chosen, folded=True),
            Table("The score of every head", every, scores, folded=True),
        ],
        notes=["Each map has its own scale, below it. Colours grow with the square root of the score."],
    )


def _neurons(summary: Summary) -> Section:
    title = "Neurons per layer"
    what = "Where in the model each method puts its bank of neurons: a strip per method, one cell per layer."
    found = summary.get("neurons_per_layer")
    if not found:
        return _not_run("neurons", title, what, "neurons_per_layer")
    figures, rows = [], []
    for task, methods in found.items():
        ordered = {method_name(method): methods[method] for method in sorted(methods, key=place)}
        alt = f"Neurons per layer of {task} for {', '.join(ordered)}. Numbers in the table."
        if ordered:
            figures.append(Figure(task, strips(ordered, "neurons", alt)))
        rows += [[task, name, *counts] for name, counts in ordered.items()]
    columns = [Column("task"), Column("method")]
    columns += [Column(f"layer {layer}", "number") for layer in range(summary["model"]["num_layers"])]
    return Section(
        "neurons",
        title,
        f"{what} {_bank_size(summary)}",
        split="attribution",
        examples=_n(summary, "attribution"),
        seeds=_seeds(summary),
        figures=figures,
        tables=[Table("Mean number of neurons in each layer", columns, rows, folded=True)],
    )


def _overlap(summary: Summary) -> Section:
    title = "Overlap of the tasks' banks"
    what = "How much two tasks' banks share: neurons in both, of those in either (Jaccard). 1 is the same bank."
    found = summary.get("overlap")
    if not found:
        return _not_run("overlap", title, what, "overlap")
    tables = [
        Table(
            method_name(method),
            [Column("bank of"), *(Column(task, "value") for task in found[method]["tasks"])],
            [[task, *row] for task, row in zip(found[method]["tasks"], found[method]["jaccard"], strict=True)],
            shade=1.0,
        )
        for method in sorted(found, key=place)
    ]
    return Section(
        "overlap",
        title,
        f"{what} {_bank_size(summary)}",
        split="attribution",
        examples=_n(summary, "attribution"),
        seeds=_seeds(summary),
        tables=tables,
    )


def _masking(summary: Summary) -> Section:
    title = "Masking a bank"
    what = (
        "What the task loses when its bank is set to zero (own drop), and how much more that is than what the other "
        "tasks lose on average (selectivity). A method that finds the task's own neurons is high in both."
    )
    rows = summary.get("masking")
    if not rows:
        return _not_run("masking", title, what, "masking")
    main = _of_main_size(summary)
    own = span([y for row in main for y in _measured(row, "own_drop").reach])
    others = span([y for row in main if "selectivity" in row for y in _measured(row, "selectivity").reach] or [0.0])
    figures = []
    for task, mine in _by_task(main).items():
        names = [method_name(row["method"]) for row in mine]
        panels = [Panel("own drop", [_measured(row, "own_drop") for row in mine], own)]
        if any("selectivity" in row for row in mine):
            chosen = [_measured(row, "selectivity") if "selectivity" in row else None for row in mine]
            panels.append(Panel("selectivity", chosen, others))
        ours = [method_name(row["method"]) for row in mine if is_ours(row["method"])]
        alt = f"Own drop and selectivity of {task} for {', '.join(names)}, with intervals. Numbers in the table."
        sizes = ", ".join(dict.fromkeys(percent(row["fraction"]) for row in mine))
        figures.append(Figure(f"{task}, {sizes} of neurons", bars(names, ours, panels, alt)))
    return Section(
        "masking",
        title,
        what,
        examples={row["task"]: row["n"] for row in rows},
        seeds=seeds_of(rows),
        intervals=True,
        figures=figures,
        tables=[
            Table("Masking, bank by bank", _MASKING_COLUMNS, [_masking_cells(summary, row) for row in main]),
            *_other_drops(summary, main),
            *_by_seed("Own drop and selectivity, seed by seed", main),
        ],
        notes=_explained(row["method"] for row in rows),
    )


_MASKING_COLUMNS = (
    Column("task"),
    Column("method"),
    Column("bank", "percent"),
    Column("neurons", "number"),
    Column("own drop", "change"),
    Column("of the base", "percent"),
    Column("selectivity", "change"),
    Column("n", "number"),
    Column("seeds", "number"),
)


def _masking_cells(summary: Summary, row: Row) -> list[Cell]:
    base = summary["tasks"][row["task"]]["base"]
    return [
        row["task"],
        method_name(row["method"]),
        row["fraction"],
        row["neurons"],
        _cell(row["own_drop"], row["own_drop_ci95"]),
        row["own_drop"] / base if base else None,
        _cell(row["selectivity"], row.get("selectivity_ci95")) if "selectivity" in row else None,
        row["n"],
        row["seeds"],
    ]


def _other_drops(summary: Summary, rows: Sequence[Row]) -> list[Table]:
    if not any(row["other_drops"] for row in rows):
        return []
    tasks = list(summary["tasks"])
    columns = [Column("bank of"), Column("method"), Column("bank", "percent"), *(Column(t, "change") for t in tasks)]
    cells = [
        [
            row["task"],
            method_name(row["method"]),
            row["fraction"],
            *(row["own_drop"] if task == row["task"] else row["other_drops"].get(task) for task in tasks),
        ]
        for row in rows
    ]
    return [Table("What each bank costs every task", columns, cells, shade=_largest(cells, 3), folded=True)]


def _by_seed(caption: str, rows: Sequence[Row]) -> list[Table]:
    """One line per measure; steering rows hold a plain list, the values."""
    sized = any("fraction" in row for row in rows)
    columns = [Column("task"), Column("method"), *([Column("bank", "percent")] if sized else []), Column("measure")]
    cells: list[list[Cell]] = []
    for row in rows:
        measures = row.get("by_seed", {})
        for measure, values in ({"value": measures} if isinstance(measures, list) else measures).items():
            if isinstance(values, list):
                size = [row["fraction"]] if sized else []
                cells.append([row["task"], method_name(row["method"]), *size, measure.replace("_", " "), *values])
    if not cells:
        return []
    count = max(map(len, cells))
    columns += [Column(f"seed {i + 1}", "value") for i in range(count - len(columns))]
    return [Table(caption, columns, [[*row, *[None] * (count - len(row))] for row in cells], folded=True)]


def _budgets(summary: Summary) -> Section:
    title = "Bank size"
    what = "The same two measures as the bank grows. Where curves flatten, more neurons add nothing."
    rows = summary.get("masking", ())
    if len({row["fraction"] for row in rows}) < 2:
        return _not_run("budgets", title, what, "masking", "with banks of several sizes")
    figures = []
    for measure in ("own_drop", "selectivity"):
        for task, mine in _by_task(rows).items():
            sizes = {size: percent(size) for size in sorted({row["fraction"] for row in mine})}
            series: dict[str, list[tuple[float, Measured]]] = defaultdict(list)
            for row in sorted(mine, key=lambda row: row["fraction"]):
                if measure in row:
                    series[method_name(row["method"])].append((row["fraction"], _measured(row, measure)))
            name = measure.replace("_", " ")
            alt = f"{name} of {task} against bank size for {', '.join(series)}. Numbers in the table."
            if series:
                figures.append(Figure(f"{task}, {name}", lines(series, sizes, name, alt, logarithmic=True)))
    cells = [_masking_cells(summary, row) for row in rows]
    return Section(
        "budgets",
        title,
        what,
        examples={row["task"]: row["n"] for row in rows},
        seeds=seeds_of(rows),
        intervals=True,
        figures=figures,
        tables=[
            Table("Masking at every size", _MASKING_COLUMNS, cells, folded=True),
            *_other_drops(summary, rows),
            *_by_seed("Own drop and selectivity at every size, seed by seed", rows),
        ],
        notes=["Bank sizes are shares of all FFN neurons, on a logarithmic axis."],
    )


def _cross(summary: Summary) -> Section:
    title = "Across tasks"
    what = (
        "The drop of every task (column) when one task's bank is set to zero (row). Of selective banks only the "
        "diagonal is orange."
    )
    found = summary.get("cross")
    if not found:
        return _not_run("cross", title, what, "cross")
    tasks = [task for task in summary["tasks"] if any(task in drops for drops in found["drops"].values())]
    rows = [
        [bank, *(_cell(drops[task]["drop"], drops[task].get("ci95")) if task in drops else None for task in tasks)]
        for bank, drops in found["drops"].items()
    ]
    caption = f"Drop when masking banks of {method_name(found['method'])}, {percent(found['fraction'])} of neurons"
    columns = [Column("bank of"), *(Column(task, "change") for task in tasks)]
    return Section(
        "cross",
        title,
        what,
        examples=_test_n(summary),
        seeds=seeds_of([found]),
        intervals=_has_intervals(rows),
        tables=[Table(caption, columns, rows, shade=_largest(rows, 1))],
    )


def _groups(summary: Summary) -> Section:
    title = "Groups of neurons"
    what = (
        "Neurons that are in exactly one task's bank, in exactly two, exactly three, or in all of them: what masking "
        "each group costs every task, and what steering with it gains."
    )
    groups = summary.get("groups")
    if not groups:
        return _not_run("groups", title, what, "groups")
    tables = []
    for key, name, caption in (("drops", "drop", "Drop when masked"), ("gains", "gain", "Gain when steered")):
        shown = [row for row in groups if row.get(key)]
        tasks = [task for task in summary["tasks"] if any(task in row[key] for row in shown)]
        rows: list[list[Cell]] = []
        for row in shown:
            measured = [row[key].get(task) for task in tasks]
            cells = [_cell(one[name], one.get("ci95")) if one else None for one in measured]
            rows.append([SPREAD[row["kind"]], row["group"].replace("+", " + "), row["neurons"], *cells])
        columns = [Column("kind"), Column("group"), Column("neurons", "number"), *(Column(t, "change") for t in tasks)]
        if rows:
            tables.append(Table(caption, columns, rows, shade=_largest(rows, 3)))
    missing = [] if any(row.get("gains") for row in groups) else ["Steering with the groups was not run."]
    return Section(
        "groups",
        title,
        f"{what} {_bank_size(summary)}",
        examples=_test_n(summary),
        seeds=seeds_of(groups),
        intervals=any(_has_intervals(table.rows) for table in tables),
        tables=tables,
        notes=["Orange is above zero, blue below.", *missing],
    )


def _steering(summary: Summary) -> Section:
    title = "Steering"
    what = (
        "Each task with its bank's activations multiplied by learned factors (HONES), and the baselines: one fixed "
        "factor, the best of a few factors, learned factors on random neurons, learning without the KL leash."
    )
    rows = summary.get("steering")
    if not rows:
        return _not_run("steering", title, what, "steering")
    rows = [row for mine in _by_task(rows).values() for row in mine]
    gains = [row for row in rows if "gain" in row]
    domain = span([y for row in gains for y in _measured(row, "gain").reach] or [0.0])
    figures = []
    for task, mine in _by_task(gains).items():
        names = [method_name(row["method"]) for row in mine]
        ours = [method_name(row["method"]) for row in mine if row["method"] == "hones"]
        alt = f"Gain over the untouched model on {task} for {', '.join(names)}, with intervals. Numbers in the table."
        panel = Panel("gain over base", [_measured(row, "gain") for row in mine], domain)
        figures.append(Figure(task, bars(names, ours, [panel], alt)))
    cells = [
        [
            row["task"],
            method_name(row["method"]),
            _cell(row["value"], row["ci95"]),
            _cell(row["gain"], row.get("gain_ci95")) if "gain" in row else None,
            row["n"],
            row["seeds"],
        ]
        for row in rows
    ]
    columns = [Column("task"), Column("method"), Column("value", "value"), Column("gain over base", "change")]
    columns += [Column("n", "number"), Column("seeds", "number")]
    return Section(
        "steering",
        title,
        f"{what} {_bank_size(summary)}",
        examples={row["task"]: row["n"] for row in rows},
        seeds=seeds_of(rows),
        intervals=True,
        figures=figures,
        tables=[Table("Steering and its baselines", columns, cells), *_by_seed("Values, seed by seed", rows)],
    )


def _strength(summary: Summary) -> Section:
    title = "Strength"
    what = (
        "The learned factors weakened, turned round or exaggerated: 0 is the untouched model, 1 the profile as learned."
    )
    rows = summary.get("strength")
    if not rows:
        return _not_run("strength", title, what, "strength")
    rows = sorted(rows, key=lambda row: (row["task"], row["strength"]))
    figures = []
    for task, mine in _by_task(rows).items():
        points = {"steered": [(row["strength"], Measured(row["value"], row["ci95"])) for row in mine]}
        labels = {row["strength"]: f"{row['strength']:g}".replace("-", "−") for row in mine}
        base = ("base", summary["tasks"][task]["base"])
        alt = f"{task} against the strength of its profile. Numbers in the table."
        figures.append(Figure(task, lines(points, labels, summary["tasks"][task]["metric"], alt, level=base)))
    columns = [Column("task"), Column("strength", "number"), Column("value", "value"), Column("n", "number")]
    cells = [[row["task"], row["strength"], _cell(row["value"], row["ci95"]), row["n"]] for row in rows]
    return Section(
        "strength",
        title,
        what,
        examples={row["task"]: row["n"] for row in rows},
        intervals=True,
        figures=figures,
        tables=[Table("Value at each strength", columns, cells, folded=True)],
    )


def _stability(summary: Summary) -> Section:
    title = "Stability"
    what = (
        "How alike the banks are that different seeds of data lead to: the mean overlap (Jaccard) of two of them. A "
        "method that finds something real finds it again."
    )
    found = summary.get("stability")
    if not found:
        return _not_run("stability", title, what, "stability")
    methods = sorted({method for one in found.values() for method in one}, key=place)
    tasks = list(found)
    rows = [[method_name(method), *(found[task].get(method) for task in tasks)] for method in methods]
    columns = [Column("method"), *(Column(task, "value") for task in tasks)]
    return Section(
        "stability",
        title,
        f"{what} {_bank_size(summary)}",
        split="attribution",
        examples=_n(summary, "attribution"),
        seeds=_seeds(summary),
        tables=[Table("Mean overlap of banks between seeds", columns, rows, shade=1.0)],
    )


def _settings(summary: Summary) -> Section:
    what = "Everything the numbers depend on, as the run recorded it, and what it took."
    tables = []
    if summary.get("settings"):
        settings: list[list[Cell]] = [[name, _plain(value)] for name, value in summary["settings"].items()]
        tables.append(Table("Settings", [Column("setting"), Column("value")], settings))
    model: list[list[Cell]] = [[name.replace("_", " "), value] for name, value in summary["model"].items()]
    tables.append(Table("Model", [Column("fact"), Column("value", "number")], model))
    if summary.get("seconds"):
        seconds: list[list[Cell]] = [[stage, value] for stage, value in summary["seconds"].items()]
        tables.append(Table("Time", [Column("stage"), Column("seconds", "number")], seconds))
    notes = [] if summary.get("settings") else ["The run recorded no settings."]
    ignored = unknown(summary)
    if ignored:
        notes.append(f"In summary.json, but not shown here: {', '.join(ignored)}.")
    return Section("settings", "Settings", what, tables=tables, notes=notes)


def _failures(summary: Summary) -> Section:
    title = "Failures"
    what = "Examples that could not be used, each with its reason; they are in no number above."
    recorded = {task: one["failures"] for task, one in summary["tasks"].items() if "failures" in one}
    if not recorded:
        return _not_run("failures", title, what, "failures")
    rows = [
        [task, split, example, reason]
        for task, splits in recorded.items()
        for split, examples in splits.items()
        for example, reason in examples.items()
    ]
    counts = [[task, split, len(examples)] for task, splits in recorded.items() for split, examples in splits.items()]
    columns = [Column("task"), Column("split"), Column("example"), Column("reason")]
    tables = [Table("Examples left out", [*columns[:2], Column("examples", "number")], [c for c in counts if c[2]])]
    missing = [task for task in summary["tasks"] if task not in recorded]
    notes = [f"Not recorded for {', '.join(missing)}."] if missing else []
    if not rows:
        return Section("failures", title, what, notes=["No example failed.", *notes])
    return Section(
        "failures", title, what, tables=[*tables, Table("Each of them", columns, rows, folded=True)], notes=notes
    )


BUILDERS: tuple[Callable[[Summary], Section], ...] = (
    _tasks,
    _heads,
    _neurons,
    _overlap,
    _masking,
    _budgets,
    _cross,
    _groups,
    _steering,
    _strength,
    _stability,
    _settings,
    _failures,
)


def _not_run(name: str, title: str, what: str, key: str, detail: str = "") -> Section:
    return Section(name, title, what, not_run=f"Not run: summary.json has no {key}{' ' + detail if detail else ''}.")


def _cell(value: float, ci95: Sequence[float] | None) -> Cell:
    return {"value": value, "ci95": list(ci95) if ci95 else None}


def _measured(row: Row, name: str) -> Measured:
    return Measured(row[name], row.get(f"{name}_ci95"))


def _by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["task"]].append(row)
    return {task: sorted(mine, key=lambda row: place(row.get("method", ""))) for task, mine in grouped.items()}


def _of_main_size(summary: Summary) -> list[Row]:
    """Each task's masking rows at the summary's fraction, or, where it was not masked at that size, its first row's."""
    main = []
    for rows in _by_task(summary["masking"]).values():
        sizes = [row["fraction"] for row in rows]
        size = summary["fraction"] if summary.get("fraction") in sizes else sizes[0]
        main += [row for row in rows if row["fraction"] == size]
    return main


def _n(summary: Summary, split: str) -> dict[str, int]:
    return {task: one["n"][split] for task, one in summary["tasks"].items() if split in one["n"]}


def _test_n(summary: Summary) -> dict[str, int]:
    return _n(summary, "test")


def _seeds(summary: Summary) -> Sequence[int]:
    """Of results that the contract calls means over the run's seeds."""
    return seeds_of([*summary.get("heads", {}).values(), *summary.get("masking", ())])


def _bank_size(summary: Summary) -> str:
    return f"Banks of {percent(summary['fraction'])} of all FFN neurons." if "fraction" in summary else ""


def _numbers(cells: Iterable[Cell]) -> list[float]:
    values = [cell["value"] if isinstance(cell, Mapping) else cell for cell in cells]
    return [value for value in values if isinstance(value, int | float)]


def _largest(rows: Sequence[Sequence[Cell]], first: int) -> float:
    return max((abs(value) for row in rows for value in _numbers(row[first:])), default=0.0) or 1.0


def _has_intervals(rows: Sequence[Sequence[Cell]]) -> bool:
    return any(isinstance(cell, Mapping) and cell["ci95"] for row in rows for cell in row)


def _explained(methods: Collection[str] | Iterable[str]) -> list[str]:
    """What the abbreviations mean, of the methods that occur."""
    bases = {method.partition(":")[0] for method in methods}
    return [f"{title}: {meaning}." for base, (title, meaning) in MASKING.items() if base in bases]


def _plain(value: Any) -> Cell:
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
