"""Tables of the report: each column says how it reads a row, so that titles and cells cannot come apart.

A function per section turns a checked summary into its tables; `sections.SECTIONS` says which is whose.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hones_offline.report.numbers import percent
from hones_offline.report.rows import Row, Summary, highest_head, main_size_rows, rows_of
from hones_offline.report.titles import method_title, place

Cell = str | int | float | None | Mapping[str, Any]
"""Text, a number, nothing (not measured), or {"value": number, "ci95": [low, high] or None}."""
Kind = Literal["text", "number", "value", "change", "percent"]
"""A way of writing a column's numbers: a change has its sign, a value is a metric's."""

SCORED_BY = {"task": "the task's metric", "logprob": "the answers' log-probability"}
SPREAD = {"one": "one task's alone", "pair": "shared by two", "triple": "shared by three", "all": "shared by all"}
SPLITS = ("discovery", "attribution", "dev", "test")
SET_TO = {"zero": "zero", "mean": "the mean"}
GROUP_EFFECTS = (("drops", "drop", "Drop when masked"), ("gains", "gain", "Gain when steered"))


@dataclass(frozen=True)
class Column:
    """A column's title, how its numbers are written, and where its cells come from."""

    title: str
    kind: Kind = "text"
    source: str | Callable[[Row], Cell] | None = None
    """A key of each row, by default the title; or a function of the row."""

    def cell(self, row: Row) -> Cell:
        """The cell that a row has in this column. Raises KeyError if the row lacks the key."""
        if callable(self.source):
            return self.source(row)
        cell: Cell = row[self.title if self.source is None else self.source]
        return cell


@dataclass(frozen=True)
class Table:
    """Rows of cells; in a shaded one numbers color their cells, full strength at `shade`."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    shade: float | None = None
    folded: bool = False
    """Shown only once the reader unfolds it."""

    @property
    def groups(self) -> list[tuple[Cell, list[Sequence[Cell]]]]:
        """Neighboring rows with the same first cell."""
        groups: list[tuple[Cell, list[Sequence[Cell]]]] = []
        for row in self.rows:
            if not groups or groups[-1][0] != row[0]:
                groups.append((row[0], []))
            groups[-1][1].append(row)
        return groups

    @property
    def has_intervals(self) -> bool:
        """Whether any cell holds a 95% interval."""
        return any(isinstance(cell, Mapping) and cell["ci95"] for row in self.rows for cell in row)


def table(
    caption: str, columns: Sequence[Column], rows: Iterable[Row], *, shade: float | None = None, folded: bool = False
) -> Table:
    """The table of these rows, each read by every column."""
    return Table(caption, columns, [[column.cell(row) for column in columns] for row in rows], shade, folded)


def change_table(caption: str, columns: Sequence[Column], rows: Sequence[Row], *, folded: bool = False) -> Table:
    """A table whose changes (drops, gains) are shaded, the largest at full strength."""
    cells = [column.cell(row) for row in rows for column in columns if column.kind == "change"]
    values = [cell["value"] if isinstance(cell, Mapping) else cell for cell in cells]
    largest = max((abs(value) for value in values if isinstance(value, int | float)), default=0.0)
    return table(caption, columns, rows, shade=largest or 1.0, folded=folded)


def with_interval(name: str, interval: str = "") -> Callable[[Row], Cell]:
    """A column's source: a row's number `name` and its interval, by default `name`_ci95; nothing if not measured."""

    def cell(row: Row) -> Cell:
        ci95 = row.get(interval or f"{name}_ci95")
        return {"value": row[name], "ci95": list(ci95) if ci95 else None} if row.get(name) is not None else None

    return cell


def entry(name: str, key: Any) -> Callable[[Row], Cell]:
    """A column's source: one entry, by index or key, of a row's list or object `name`; nothing if it is not there."""

    def cell(row: Row) -> Cell:
        values = row[name]
        present = key in values if isinstance(values, Mapping) else key < len(values)
        content: Cell = values[key] if present else None
        return content

    return cell


def effect_on(task: str, effects: str, name: str) -> Callable[[Row], Cell]:
    """A column's source: the drop or gain (`name`) on a task, from a row's object `effects` of all tasks or ways."""
    effect = with_interval(name, "ci95")
    return lambda row: effect(row[effects].get(task, {}))


TASK = Column("task")
BANK_OF = Column("bank of", source="task")
METHOD = Column("method", source=lambda row: method_title(row["method"]))
BANK = Column("bank", "percent", "fraction")
LAYER = Column("layer", "number")
N = Column("n", "number")
SEEDS = Column("seeds", "number")
VALUE = Column("value", "value", with_interval("value", "ci95"))
OF_THE_BASE = Column("of the base", "percent", lambda row: row.get("relative_drop"))
ABLATION = Column("set to", source=lambda row: SET_TO[row["ablation"]])

CHOSEN_HEADS = (TASK, LAYER, Column("head", "number"), Column("mean score", "change"), Column("weight", "value"))
HEAD_SCORES = (
    TASK,
    Column("scored by", source=lambda row: SCORED_BY[row["metric"]]),
    Column("highest score", "change", lambda row: highest_head(row["scores"])[0]),
    Column("in layer", "number", lambda row: highest_head(row["scores"])[1]),
    Column("head", "number", lambda row: highest_head(row["scores"])[2]),
    Column("lowest score", "change", lambda row: min(map(min, row["scores"]))),
    Column("heads chosen", "number", lambda row: len({(layer, head) for layer, head, _ in row["chosen"]})),
    N,
    SEEDS,
)
MASKING = (
    TASK,
    METHOD,
    BANK,
    Column("neurons", "number"),
    Column("own drop", "change", with_interval("own_drop")),
    OF_THE_BASE,
    Column("selectivity", "change", with_interval("selectivity")),
    N,
    SEEDS,
)
DROPS = (
    Column("own drop", "change", with_interval("own_drop")),
    Column("bystander drop", "change", with_interval("bystander_drop")),
    Column("selectivity", "change", with_interval("selectivity")),
)
FINDING_MEANS = (METHOD, ABLATION, BANK, Column("neurons", "number"), OF_THE_BASE, *DROPS)
FINDING_MATCHED = (
    METHOD,
    ABLATION,
    Column("own drop", "value", "level"),
    Column("bystander drop", "change", with_interval("bystander_drop")),
    Column("resamples that reach it", "percent", "reached"),
)
FINDING = (TASK, METHOD, ABLATION, BANK, Column("neurons", "number"), OF_THE_BASE, *DROPS, N, SEEDS)
GAIN = Column("gain over base", "change", with_interval("gain"))
STEERING = (TASK, METHOD, VALUE, GAIN, N, SEEDS)
FURTHER = {
    "content": Column("content", "value", with_interval("content")),
    "content_gain": Column("gain of content", "change", with_interval("content_gain")),
    "parameters": Column("learned numbers", "number", lambda row: row.get("parameters")),
    "bytes": Column("bytes", "number", lambda row: row.get("bytes")),
}
"""Columns of the steering table that are there if any row has their key."""
WORDS = (
    TASK,
    Column("for the metric", source="words"),
    Column("for the content", source=lambda row: row.get("content_words")),
)
ELSEWHERE = Column("gain on other tasks", "change", with_interval("elsewhere_mean"))
OVER_REFERENCE = Column("over the reference", "change", with_interval("over_reference"))
SIZE = (Column("learned numbers", "number", "parameters"), Column("bytes", "number"))
SELECTIONS = (TASK, METHOD, VALUE, GAIN, OVER_REFERENCE, ELSEWHERE, *SIZE, N, SEEDS)
SELECTION_MEANS = (
    METHOD,
    GAIN,
    OVER_REFERENCE,
    Column("share of IA3's gain", "percent", with_interval("ia3_share")),
    ELSEWHERE,
    *SIZE,
    Column("tasks", "number"),
    SEEDS,
)
STRENGTH = (TASK, Column("strength", "number"), VALUE, ELSEWHERE, N)
FAILURES = (TASK, Column("split"), Column("example"), Column("reason"))
FAILURE_COUNTS = (TASK, Column("split"), Column("examples", "number"))


def task_tables(summary: Summary) -> list[Table]:
    """The untouched model's score on each task, with the examples of each split."""
    rows = rows_of(summary, "tasks")
    splits = list(dict.fromkeys(split for row in rows for split in row["n"]))
    splits.sort(key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS))
    columns = [TASK, Column("metric"), Column("untouched model", "value", with_interval("base"))]
    columns += [Column(f"{split} examples", "number", entry("n", split)) for split in splits]
    return [table("Tasks and examples", columns, rows)]


def head_tables(summary: Summary) -> list[Table]:
    """Head scores: the extremes of each task, the chosen heads, and every head's."""
    rows = rows_of(summary, "heads")
    chosen = [
        {"task": row["task"], "layer": layer, "head": head, "mean score": row["scores"][layer][head], "weight": weight}
        for row in rows
        for layer, head, weight in row["chosen"]
    ]
    layers = [
        {"task": row["task"], "layer": layer, "scores": scores}
        for row in rows
        for layer, scores in enumerate(row["scores"])
    ]
    heads = [Column(f"head {head}", "change", entry("scores", head)) for head in range(summary["model"]["num_heads"])]
    return [
        table("Head scores, mean over seeds", HEAD_SCORES, rows),
        table("The chosen heads of the first seed", CHOSEN_HEADS, chosen, folded=True),
        table("The score of every head", [TASK, LAYER, *heads], layers, folded=True),
    ]


def neuron_tables(summary: Summary) -> list[Table]:
    """Number of neurons of each method's bank in each layer."""
    rows = [
        {"task": task, "method": method, "counts": methods[method]}
        for task, methods in summary["neurons_per_layer"].items()
        for method in sorted(methods, key=place)
    ]
    layers = range(summary["model"]["num_layers"])
    columns = [TASK, METHOD, *(Column(f"layer {layer}", "number", entry("counts", layer)) for layer in layers)]
    return [table("Mean number of neurons in each layer", columns, rows, folded=True)]


def overlap_tables(summary: Summary) -> list[Table]:
    """A matrix of task x task for each method, shaded from 0 to 1."""
    tables = []
    for method in sorted(summary["overlap"], key=place):
        tasks, matrix = summary["overlap"][method]["tasks"], summary["overlap"][method]["jaccard"]
        rows = [{"task": task, "jaccard": row} for task, row in zip(tasks, matrix, strict=True)]
        columns = [BANK_OF, *(Column(task, "value", entry("jaccard", i)) for i, task in enumerate(tasks))]
        tables.append(table(method_title(method), columns, rows, shade=1.0))
    return tables


def masking_tables(summary: Summary) -> list[Table]:
    """Masking at each task's main bank size."""
    rows = main_size_rows(summary)
    return [
        table("Masking, bank by bank", MASKING, rows),
        *_other_drops(summary, rows),
        *_by_seed("Own drop and selectivity, seed by seed", rows),
    ]


def bank_size_tables(summary: Summary) -> list[Table]:
    """Masking at every bank size, folded."""
    rows = rows_of(summary, "masking")
    return [
        table("Masking at every size", MASKING, rows, folded=True),
        *_other_drops(summary, rows),
        *_by_seed("Own drop and selectivity at every size, seed by seed", rows),
    ]


def finding_tables(summary: Summary) -> list[Table]:
    """Means over tasks, differences to the reference method, harm at equal own drop; folded, each task's banks."""
    finding, rows = summary["finding"], rows_of(summary, "finding")
    means, matched = (
        sorted(finding[part], key=lambda row: (place(row["method"]), row["ablation"] != "zero"))
        for part in ("means", "matched")
    )
    tables = [table("Means over tasks", FINDING_MEANS, means)]
    compared = [{**row, **row["difference"]} for row in means if "difference" in row]
    columns = list(FINDING_MATCHED)
    if compared:
        to = method_title(finding["reference"])
        tables.append(table(f"Differences to {to} at the same size", [METHOD, ABLATION, BANK, *DROPS], compared))
        columns.append(Column(f"difference to {to}", "change", with_interval("difference")))
    if matched:
        tables.append(table("Harm to bystanders at equal own drop", columns, matched))
    seeds = []
    for row in rows:
        others = {f"drop of {task}": drops for task, drops in row["by_seed"]["other_drops"].items()}
        seeds.append({**row, "by_seed": {**row["by_seed"], **others}})
    return [
        *tables,
        table("Each task's banks", FINDING, rows, folded=True),
        *_other_drops(summary, rows),
        *_by_seed("Each task's banks, seed by seed", seeds),
    ]


def _other_drops(summary: Summary, rows: Sequence[Row]) -> list[Table]:
    """Drop of every task when each bank is masked, its own task included; no table if no other task was measured."""
    if not any(row["other_drops"] for row in rows):
        return []
    rows = [{**row, "drops": {**row["other_drops"], row["task"]: row["own_drop"]}} for row in rows]
    columns = [BANK_OF, METHOD, *([ABLATION] if "ablation" in rows[0] else []), BANK]
    columns += [Column(task, "change", entry("drops", task)) for task in summary["tasks"]]
    return [change_table("What each bank costs every task", columns, rows, folded=True)]


def _by_seed(caption: str, rows: Sequence[Row]) -> list[Table]:
    """A row for each measure and a column for each seed, as far as seeds were recorded.

    Masking's `by_seed` holds a list for each measure, steering's is one list.
    """
    sized, ablated = (any(key in row for row in rows) for key in ("fraction", "ablation"))
    measured = []
    for row in rows:
        measures = row.get("by_seed", {})
        for measure, values in ({"value": measures} if isinstance(measures, list) else measures).items():
            if isinstance(values, list):  # a key that the contract does not know may hold anything
                measured.append({**row, "measure": measure.replace("_", " "), "values": values})
    if not measured:
        return []
    seeds = range(max(len(row["values"]) for row in measured))
    columns = [TASK, METHOD, *([ABLATION] if ablated else []), *([BANK] if sized else []), Column("measure")]
    columns += [Column(f"seed {seed + 1}", "value", entry("values", seed)) for seed in seeds]
    return [table(caption, columns, measured, folded=True)]


def cross_tables(summary: Summary) -> list[Table]:
    """Drop of every task (column) when a task's bank (row) is masked."""
    cross = summary["cross"]
    rows = [{"task": bank, "drops": drops} for bank, drops in cross["drops"].items()]
    caption = f"Drop when masking banks of {method_title(cross['method'])}, {percent(cross['fraction'])} of neurons"
    return [change_table(caption, [BANK_OF, *_effect_columns(summary, rows, "drops", "drop")], rows)]


def group_tables(summary: Summary) -> list[Table]:
    """Drops when each group of neurons is masked and, where it was run, gains when it is steered: group x task."""
    group = (
        Column("kind", source=lambda row: SPREAD[row["kind"]]),
        Column("group", source=lambda row: row["group"].replace("+", " + ")),
        Column("neurons", "number"),
    )
    tables = []
    for effects, name, caption in GROUP_EFFECTS:
        rows = [row for row in rows_of(summary, "groups") if row.get(effects)]
        if rows:
            tables.append(change_table(caption, [*group, *_effect_columns(summary, rows, effects, name)], rows))
    return tables


def _effect_columns(summary: Summary, rows: Iterable[Row], effects: str, name: str) -> list[Column]:
    """A column for each task on which any row has an effect."""
    tasks = [task for task in summary["tasks"] if any(task in row[effects] for row in rows)]
    return [Column(task, "change", effect_on(task, effects, name)) for task in tasks]


def steering_tables(summary: Summary) -> list[Table]:
    """Each task's values and gains, steered and by the baselines, and what is gained more than with those."""
    rows = rows_of(summary, "steering")
    further = [column for key, column in FURTHER.items() if any(key in row for row in rows)]
    asked = [row for row in rows if "words" in row]
    compared = [row for row in rows if row.get("over")]
    others = dict.fromkeys(other for row in compared for other in row["over"])
    over = [Column(method_title(other), "change", effect_on(other, "over", "gain")) for other in others]
    return [
        table("Steering and its baselines", [*STEERING[:-2], *further, *STEERING[-2:]], rows),
        *([table("Words that asked for the conventions, best on dev", WORDS, asked)] if asked else []),
        *([change_table("Gained more than with others", [TASK, METHOD, *over], compared)] if compared else []),
        *_wrong_routes(summary, rows),
        *_by_seed("Values, seed by seed", rows),
    ]


def _wrong_routes(summary: Summary, rows: Iterable[Row]) -> list[Table]:
    """Each task's gain or loss where it is steered with another's profile; no table if that was not measured."""
    rows = [row for row in rows if row.get("elsewhere")]
    if not rows:
        return []
    columns = [
        Column("learned on", source="task"),
        METHOD,
        ELSEWHERE,
        *_effect_columns(summary, rows, "elsewhere", "gain"),
    ]
    return [change_table("Gain of the other tasks, when routed there by mistake", columns, rows, folded=True)]


def selection_tables(summary: Summary) -> list[Table]:
    """The gains of each selection and comparator, on average and task by task, and the choices on dev."""
    rows, part = rows_of(summary, "selections"), summary["selections"]
    reference = method_title(part["reference"])
    means = sorted(part["means"], key=lambda row: place(row["method"]))
    chosen = [
        {"task": row["task"], "method": row["method"], "seed": seed + 1, "chosen": of_seed}
        for row in rows
        for seed, of_seed in enumerate(row["chosen"])
    ]
    names = dict.fromkeys(name for row in chosen for name in row["chosen"])
    columns = [
        TASK,
        METHOD,
        Column("seed", "number"),
        *(Column(name, "number", entry("chosen", name)) for name in names),
    ]
    return [
        table(f"Means over tasks; the reference is {reference}", SELECTION_MEANS, means),
        table("Task by task", SELECTIONS, rows),
        *_wrong_routes(summary, rows),
        *_by_seed("Values, seed by seed", rows),
        table("Chosen on dev", columns, chosen, folded=True),
    ]


def strength_tables(summary: Summary) -> list[Table]:
    """Each task's value at each strength of its profile, and what the other tasks gain there, folded."""
    return [table("Value at each strength", STRENGTH, rows_of(summary, "strength"), folded=True)]


def stability_tables(summary: Summary) -> list[Table]:
    """Overlap of the banks that different seeds lead to: method x task."""
    tasks = summary["stability"]
    methods = sorted({method for overlaps in tasks.values() for method in overlaps}, key=place)
    rows = [
        {"method": method, "overlap": {t: tasks[t][method] for t in tasks if method in tasks[t]}} for method in methods
    ]
    columns = [METHOD, *(Column(task, "value", entry("overlap", task)) for task in tasks)]
    return [table("Mean overlap of banks between seeds", columns, rows, shade=1.0)]


def settings_tables(summary: Summary) -> list[Table]:
    """Settings, facts of the model, and the time each stage took, as far as they were recorded."""
    tables = []
    if summary.get("settings"):
        settings = [{"setting": name, "value": _plain(value)} for name, value in summary["settings"].items()]
        tables.append(table("Settings", [Column("setting"), Column("value")], settings))
    facts = [{"fact": name.replace("_", " "), "value": value} for name, value in summary["model"].items()]
    tables.append(table("Model", [Column("fact"), Column("value", "number")], facts))
    if summary.get("seconds"):
        stages = [{"stage": stage, "seconds": seconds} for stage, seconds in summary["seconds"].items()]
        tables.append(table("Time", [Column("stage"), Column("seconds", "number")], stages))
    return tables


def _plain(value: Any) -> Cell:
    """A setting as text: a flat list with commas, anything but text as JSON."""
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def failure_tables(summary: Summary) -> list[Table]:
    """The examples that were left out: how many of each split, and each with its reason; no table if there are none."""
    rows, counts = failures(summary), []
    for row in rows_of(summary, "tasks"):
        for split, examples in row.get("failures", {}).items():
            if examples:
                counts.append({"task": row["task"], "split": split, "examples": len(examples)})
    if not rows:
        return []
    each = table("Each of them", FAILURES, rows, folded=True)
    return [table("Examples left out", FAILURE_COUNTS, counts), each]


def failures(summary: Summary) -> list[Row]:
    """A row for each example that could not be used."""
    return [
        {"task": row["task"], "split": split, "example": example, "reason": reason}
        for row in rows_of(summary, "tasks")
        for split, examples in row.get("failures", {}).items()
        for example, reason in examples.items()
    ]
